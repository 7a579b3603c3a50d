"""Files that carry a checksum of their own: damage and edits are noticed."""

import errno
import os
import shutil

import pytest
from etils import epath

from ema_optax._checkpoint import manifest
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.sealed import read_sealed, write_sealed
from ema_optax._checkpoint.untrusted import LIMIT
from tests.test_manifest import ITEM, content


def test_a_changed_byte_breaks_the_seal(tmp_path):
    """Any of them, but for spaces between: none is taken for what was written."""
    path = epath.Path(tmp_path) / "m.json"
    write_sealed(path, {"a": [1, "é"], "b": None})
    text = path.read_text()
    for at in range(len(text)):
        path.write_text(text[:at] + ("7" if text[at] != "7" else "8") + text[at + 1 :])
        if text[at] != " ":
            with pytest.raises(CorruptCheckpointError, match=r"m\.json cannot be"):
                read_sealed(path)
        path.write_text(text[:at])
        with pytest.raises(CorruptCheckpointError, match=r"m\.json cannot be"):
            read_sealed(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe", "can't decode"),
        (b"[1]", "cannot be trusted"),
        (b'{"content": 1}', "xxh3"),
        (b" " * (LIMIT + 1), "it has more than"),
    ],
)
def test_what_is_no_sealed_file(tmp_path, raw, words):
    path = tmp_path / "m.json"
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpointError, match=words):
        read_sealed(epath.Path(path))
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match="No such file"):
        read_sealed(epath.Path(path))


def test_a_manifest_names_its_file(tmp_path):
    """Of a step that was copied and then edited by hand, and sealed again."""
    item = epath.Path(shutil.copytree(ITEM, tmp_path / "item"))
    changed = content()
    changed["processes"] = 0
    write_sealed(manifest.manifest_path(item), changed)
    words = r"manifest\.json is no manifest of ema_optax: 'processes' is 0\."
    with pytest.raises(CorruptCheckpointError, match=words):
        manifest.read_manifest(item)
    write_sealed(manifest.checksums_path(item, 0), {"params": {"w": 1}})
    words = r"0\.json holds no checksums: the pieces of 'w' are not bounds and a"
    with pytest.raises(CorruptCheckpointError, match=words):
        manifest.read_sums(item, manifest.read_manifest(ITEM))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, PermissionError), (errno.EIO, OSError)]
)
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, number, kind):
    path = epath.Path(tmp_path) / "m.json"
    write_sealed(path, {})

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=r"m\.json cannot be read: .*denied|error") as caught:
        read_sealed(path)
    assert type(caught.value) is kind
    with pytest.raises(kind, match="cannot be read"):  # nor called another's
        manifest.read_manifest(epath.Path(tmp_path))
