"""Errors for missing Python modules, with the installation that brings them."""

import contextlib
from collections.abc import Iterator

# The extra in pyproject.toml that brings each module.
EXTRAS = {
    "rich": "cli",
    "shtab": "cli",
    "matplotlib": "plots",
    "safetensors": "safetensors",
    "einops": "safetensors",
    "flax": "demo",
    "sklearn": "demo",
    "tensorflow": "tensorflow",
    "keras": "keras",
    "torch": "torch",
    "gcsfs": "gcs",
    "msgpack": "msgpack",
}
REQUIRED = ("etils", "jax", "numpy", "optax", "orbax", "tensorstore", "xxhash")


def advice(
    caller: str, error: ModuleNotFoundError, *, extra: str | None = None
) -> str | None:
    """Writes one line on the missing module and how to install it.

    Args:
        caller: What needs the module, as the user called it.
        error: From its import.
        extra: All extras that the caller needs, `"cli,tensorflow"`; None names the
            extra of the module alone.

    Returns:
        The line, or None where no installation helps: a module of this library.

    >>> advice("export", ModuleNotFoundError(name="rich.table"))
    "export needs rich, which is not installed. Run: pip install 'ema-optax[cli]'"
    """
    module = (error.name or "").partition(".")[0]
    if module in ("", "ema_optax"):
        return None
    needs = f"{caller} needs {module}, which is not installed."
    if module in EXTRAS:
        return f"{needs} Run: pip install 'ema-optax[{extra or EXTRAS[module]}]'"
    if module in REQUIRED:
        return f"{needs} It comes with ema-optax, run again: pip install ema-optax"
    return f"{needs} Run: pip install {module}"


@contextlib.contextmanager
def needed_by(caller: str, otherwise: str = "") -> Iterator[None]:
    """Adds to an import's error who needs the module and how to install it.

        with extras.needed_by("ema_optax.safetensors.export"):
            from safetensors.numpy import save_file

    Args:
        caller: What needs the module, as the user called it.
        otherwise: A way to go without, such as `"progress=None goes without."`.

    Raises:
        ModuleNotFoundError: With the advice, if a module of others is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        text = advice(caller, error)
        if text is None:
            raise
        text = f"{text}. {otherwise}" if otherwise else text
        raise ModuleNotFoundError(text, name=error.name) from error
