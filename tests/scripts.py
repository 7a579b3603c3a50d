"""Scripts beside the package, of examples or benchmarks, as modules."""

import importlib.util


def loaded(path):
    """Runs a script under its file's name, not as the main one; returns its module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
