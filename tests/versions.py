"""The versions that the suite runs with.

python -m tests.versions lowest       the lowest that are declared, for pip -c
python -m tests.versions row lowest   what is installed, as a row of docs/versions.md
"""

import importlib.metadata
import pathlib
import platform
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent

# The table's columns, after which versions and which Python.
COLUMNS = (
    *("jax", "optax", "numpy", "orbax-checkpoint", "tensorstore", "xxhash"),
    *("flax", "matplotlib", "scikit-learn", "rich", "safetensors"),
)


def lowest() -> dict[str, str]:
    """The lowest declared version of each library; the tools of the tests not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = [  # TensorFlow and Google's client bring libraries, and are tested apart
        requirement
        for extra, requirements in extras.items()
        if extra not in ("dev", "docs", "gcs", "tensorflow")
        for requirement in requirements
    ]
    return dict(
        requirement.split(">=")
        for requirement in (*project["dependencies"], *users)
        if not requirement.startswith("ema-optax")
    )


def row(which: str) -> str:
    """What this environment has, as the table of docs/versions.md says it."""
    python = ".".join(platform.python_version_tuple()[:2])
    versions = (importlib.metadata.version(name) for name in COLUMNS)
    return f"| {which} | {python} | {' | '.join(versions)} |"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lowest"]:
            for name, version in lowest().items():
                print(f"{name}=={version}")
        case ["row", which]:
            print(row(which))
            if row(which) not in (ROOT / "docs/versions.md").read_text().splitlines():
                print("docs/versions.md says something else.")
        case _:
            sys.exit(__doc__)
