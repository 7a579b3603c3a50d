"""Causes of errors: what TensorStore, the system and JAX really raise, by kind."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from ema_optax._checkpoint.errors import CorruptCheckpointError, as_cause


def _spec(folder):
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder}/"},
        "path": "w/",
    }
    return {"driver": "zarr", "kvstore": kvstore}


@pytest.fixture
def array(tmp_path):
    """A folder with an array of 256 kB, as Orbax writes them."""
    metadata = {"shape": [256, 256], "dtype": "<f4", "compressor": None}
    spec = _spec(tmp_path) | {"metadata": metadata, "create": True}
    ts.open(spec).result().write(np.ones((256, 256), np.float32)).result()
    return tmp_path


def _read(folder):
    return ts.open(_spec(folder)).result().read().result()


def _caused(call):
    with pytest.raises(Exception, match=r"[a-z]") as caught:
        call()
    cause = as_cause(caught.value, "leaf 'w'")
    text = str(cause)
    assert text.startswith("leaf 'w': ")
    assert "\n" not in text
    assert "tensorstore_spec" not in text
    assert len(text) < 450
    return cause


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def _data(folder):
    """Its files of data, the largest last."""
    return sorted((folder / "d").iterdir(), key=lambda path: path.stat().st_size)


def _zarray(folder, raw):
    store = ts.KvStore.open(_spec(folder)["kvstore"]).result()
    store.write(".zarray", raw).result()


def _metadata(**fields):
    known = {"shape": [4], "chunks": [4], "dtype": "<f4", "zarr_format": 2}
    known |= {"compressor": None, "order": "C", "filters": None, "fill_value": None}
    return lambda folder: _zarray(folder, json.dumps(known | fields).encode())


def _link_to_itself(folder):
    (folder / "manifest.ocdbt").unlink()
    (folder / "manifest.ocdbt").symlink_to(folder / "manifest.ocdbt")


DAMAGE = {
    "no folder": shutil.rmtree,
    "no manifest": lambda folder: (folder / "manifest.ocdbt").unlink(),
    "no data": lambda folder: _data(folder)[-1].unlink(),
    "no data at all": lambda folder: shutil.rmtree(folder / "d"),
    "data cut short": lambda folder: os.truncate(_data(folder)[-1], 100),
    "empty data": lambda folder: os.truncate(_data(folder)[-1], 0),
    "a manifest cut short": lambda folder: os.truncate(folder / "manifest.ocdbt", 10),
    "an empty manifest": lambda folder: os.truncate(folder / "manifest.ocdbt", 0),
    "metadata that is no JSON": lambda folder: _zarray(folder, b"\0{{"),
    "metadata of nothing": lambda folder: _zarray(folder, b"{}"),
    "a dtype that is none": _metadata(dtype="<x9"),
    "a shape of text": _metadata(shape="44"),
    "a link to itself": _link_to_itself,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(array, name):
    DAMAGE[name](array)
    cause = _caused(lambda: _read(array))
    assert type(cause) is CorruptCheckpointError
    assert str(cause).endswith("If it was copied, copy it again.")


def test_flipped_bits_of_the_store_are_damage(array):
    """Its magic, checksums and zstd notice any; a flipped bit of an array, ours do."""
    size = (array / "manifest.ocdbt").stat().st_size
    whole = (array / "manifest.ocdbt").read_bytes()
    for at in range(0, size, 3):
        _flip(array / "manifest.ocdbt", at)
        assert type(_caused(lambda: _read(array))) is CorruptCheckpointError, at
        (array / "manifest.ocdbt").write_bytes(whole)
    _read(array)


def test_too_many_open_files(array):
    """The system's number says it, where absl's status is that of memory."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        cause = _caused(lambda: _read(array))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert type(cause) is OSError
    assert str(cause).endswith("ulimit -n 65536.")


def test_details_come_in_any_order():
    """TensorStore's versions differ in which come first, and so does each process."""
    details = ["[source locations='a.cc:1\nb.cc:2']", "[tensorstore_spec='{}']"]
    for order in (details, details[::-1]):
        text = (
            f"PERMISSION_DENIED: Error reading w: Permission denied {' '.join(order)}"
        )
        told = str(as_cause(ValueError(text), "leaf 'w'"))
        assert "Error reading w: Permission denied. Give this user access" in told
        assert ".cc" not in told


def test_errors_of_the_system_as_older_versions_spell_them():
    """By their number, and in the words of newer ones."""
    text = (
        "RESOURCE_EXHAUSTED: Error reading w [OS error 24: EMFILE Too many open files] "
        "[source locations='a.cc:1']"
    )
    cause = as_cause(ValueError(text), "leaf 'w'")
    assert type(cause) is OSError
    assert "w Too many open files. Allow more open files: ulimit" in str(cause)


def test_files_of_another_user(array):
    """In a process that is not root, for whom no file is closed."""
    for path in [*array.rglob("*"), array]:
        path.chmod(0)
    code = (
        "import sys, os, tensorstore as ts\n"
        "os.getuid() or os.seteuid(65534)\n"
        f"try: ts.open({_spec(array)!r}).result()\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    array.chmod(0o700)
    for path in array.rglob("*"):
        path.chmod(0o700)
    assert done.stdout.startswith("PERMISSION_DENIED"), done.stderr
    cause = as_cause(ValueError(done.stdout), "leaf 'w'")
    assert type(cause) is PermissionError
    assert "\n" not in str(cause)
    assert "Permission denied. Give this user access" in str(cause)


def test_memory_of_a_device_and_of_python():
    for call in (
        lambda: jnp.zeros(2**40).block_until_ready(),
        lambda: np.ones(2**45),
    ):
        cause = _caused(call)
        assert type(cause) is MemoryError
        assert "read fewer leaves" in str(cause)


UNKNOWN = "UNKNOWN: Error reading local file: Input/output error [os_error_code='5']"
TEXTS = [
    ("DATA_LOSS: CRC-32C checksum failed", CorruptCheckpointError),
    ("NOT_FOUND: bucket", CorruptCheckpointError),
    ("PERMISSION_DENIED: bucket", PermissionError),
    ("UNAUTHENTICATED: bucket", PermissionError),
    ("RESOURCE_EXHAUSTED: Out of memory", MemoryError),
    ("RESOURCE_EXHAUSTED: No space left [os_error_code='28'] [a='b']", OSError),
    ("UNAVAILABLE: Stale file handle [os_error_code='116']", OSError),
    ("UNAVAILABLE: CURL error", OSError),
    ("DEADLINE_EXCEEDED: too slow", OSError),
    ("ABORTED: again", OSError),
    ("INTERNAL: nobody knows", OSError),
    (UNKNOWN, OSError),
    ("Invalid JSON", CorruptCheckpointError),
]


@pytest.mark.parametrize(("text", "kind"), TEXTS)
def test_what_no_disk_here_raises(text, kind):
    cause = as_cause(ValueError(f"{text} [tensorstore_spec='{{\n}}']"))
    assert type(cause) is kind
    assert str(cause).startswith(text.partition(" [")[0] + ". ")
    assert "\n" not in str(cause)


SYSTEM = {
    errno.ENOENT: CorruptCheckpointError,
    errno.EISDIR: CorruptCheckpointError,
    errno.ENOTDIR: CorruptCheckpointError,
    errno.EACCES: PermissionError,
    errno.EPERM: PermissionError,
    errno.EROFS: PermissionError,
    errno.ENOMEM: MemoryError,
    errno.EIO: OSError,
    errno.ESTALE: OSError,
    errno.ETIMEDOUT: OSError,
    errno.ENOSPC: OSError,
    errno.EMFILE: OSError,
}


@pytest.mark.parametrize("number", SYSTEM)
def test_errors_of_the_system(number):
    cause = as_cause(OSError(number, os.strerror(number), "d/x"), "a step")
    assert type(cause) is SYSTEM[number]
    assert str(cause).startswith(f"a step: [Errno {number}] {os.strerror(number)}: 'd")


def test_each_cause_has_an_advice_of_its_own():
    numbers = (errno.ENOENT, errno.EACCES, errno.ENOMEM, errno.ENOSPC, errno.EMFILE)
    advice = {
        str(as_cause(OSError(number, "no"))).partition(". ")[2]
        for number in (*numbers, errno.EIO)
    }
    assert len(advice) == 6
    assert all(text.endswith(".") for text in advice)


def test_what_has_no_cause_here_stays_what_it_is():
    """Errors of the target, or of this library, are not taken for the disk's."""
    for error in (
        CorruptCheckpointError("a"),
        TypeError("a"),
        RuntimeError("INVALID_ARGUMENT: device_put"),
        NotImplementedError("UNIMPLEMENTED: a driver"),
        KeyError("a"),
    ):
        assert as_cause(error) is error
    assert type(as_cause(TimeoutError())) is OSError
    assert str(as_cause(TimeoutError())).startswith("TimeoutError. ")
    assert len(str(as_cause(ValueError("x" * 10**6)))) < 500
