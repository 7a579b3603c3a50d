"""A stranger's manifest and checksums: what is none is refused, by its name."""

import copy
import json
import math

import pytest
from etils import epath

from ema_optax._checkpoint import manifest
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.manifest import Manifest
from ema_optax._checkpoint.pieces import parse_sums
from ema_optax._checkpoint.sealed import read_sealed, write_sealed
from ema_optax._checkpoint.untrusted import DEPTH
from tests.test_manifest import ITEM, content, through_json


def nested(depth, innermost):
    for _ in range(depth):
        innermost = {"a": innermost}
    return innermost


def _leaf(**fields):
    return lambda c: c["trees"]["params"]["leaves"]["dense/bias"].update(fields)


def _tree(**fields):
    return lambda c: c["trees"]["params"].update(fields)


def _average(**fields):
    return lambda c: c["averages"]["shadow"].update(fields)


def _top(**fields):
    return lambda c: c.update(fields)


def _path(path):
    def change(c):
        tree = c["trees"]["params"]
        tree["leaves"][path] = tree["leaves"].pop("seen")
        tree["structure"]["seen"] = path

    return change


def _key(key):
    def change(c):
        structure = c["trees"]["params"]["structure"]
        structure[key] = structure.pop("seen")

    return change


def _without(key):
    return lambda c: c.pop(key)


ONE = {"w": {"shape": [], "dtype": "float32", "kind": "jax"}}
REFUSED = [
    (_leaf(shape=[10**18]), "more than any disk holds"),
    (_leaf(shape=[2**31] * 64), "more than any disk holds"),
    (_leaf(shape=[-1]), r"the shape \[-1\]"),
    (_leaf(shape=[-4, -4]), r"the shape \[-4, -4\]"),
    (_leaf(shape=[1.0]), r"the shape \[1.0\]"),
    (_leaf(shape=[True]), r"the shape \[True\]"),
    (_leaf(shape=[math.nan]), r"the shape \[nan\]"),
    (_leaf(shape="44"), "the shape '44'"),
    (_leaf(shape=[[4]]), r"the shape \[…\]"),
    (_leaf(shape=[1] * 65), "the shape a list of 65"),
    (_leaf(dtype="object"), "the dtype 'object'"),
    (_leaf(dtype="V1000"), "the dtype 'V1000'"),
    (_leaf(dtype="<U9"), "the dtype '<U9'"),
    (_leaf(dtype="f4,f4"), "the dtype 'f4,f4'"),
    (_leaf(dtype="<f4"), "the dtype '<f4'"),
    (_leaf(dtype="datetime64[ns]"), "the dtype 'datetime64"),
    (_leaf(dtype="f" * 10**6), "the dtype 'fff"),
    (_leaf(dtype=4), "the dtype 4"),
    (_leaf(kind="pickle"), "the kind 'pickle'"),
    (_leaf(kind="key:"), "the kind 'key:'"),
    (_leaf(kind=["jax"]), r"the kind \['jax'\]"),
    (_tree(leaves={"w": {"shape": [], "dtype": "int8"}}), "lacks shape, dtype or kind"),
    (_path("../evil"), "leads out of the checkpoint"),
    (_path("a/../../evil"), "leads out of the checkpoint"),
    (_path("/evil"), "leads out of the checkpoint"),
    (_path("a\0b"), "holds a NUL"),
    (_path("a" * 4097), "more than 100 keys or 4096 characters"),
    (_path("a/" * 100 + "b"), "more than 100 keys or 4096 characters"),
    (_key(".."), "a key '..' that leads out"),
    (_key("/etc"), "a key '/etc' that leads out"),
    (_tree(structure=nested(900, "seen")), "nested more than 100 deep"),
    (_tree(structure={"w": 7}), "has 7 in its structure"),
    (_tree(structure={"w": True}), "has True in its structure"),
    (_tree(structure="seen"), "a leaf 'dense/bias' that is not in its structure"),
    (_tree(structure=["w", "w"], leaves=ONE), "'w' in its structure twice"),
    (_tree(structure={"w": "x"}), "'x' in its structure and no such leaf"),
    (_tree(leaves=[1]), "has no leaves by path"),
    (_top(trees={"params": "all"}), "its tree 'params' has no structure or no leaves"),
    (_top(trees={"../x": {}}), "its tree '../x' leads out"),
    (_top(trees=[]), "'trees' is missing or no dict"),
    (_top(trees={}, averages={}), "it has no trees"),
    (_top(averages=[]), "'averages' is missing or no dict"),
    (_top(averages={"x": {}}), "an average 'x' and no such tree"),
    (_top(averages={"shadow": None}), "its average 'shadow' lacks decay, every or"),
    (_without("averages"), "'averages' is missing"),
    (_without("trees"), "'trees' is missing"),
    (_without("format"), "it states no format"),
    (_without("version"), "'version' is no version: None"),
    (_top(processes=0), "'processes' is 0"),
    (_top(processes=0.5), "'processes' is missing or no int"),
    (_top(processes=True), "'processes' is missing or no int"),
    (_top(format="1"), "it states no format"),
    (_top(format=True), "it states no format"),
    (_top(version="1'; touch evil; '"), "'version' is no version"),
    (_top(version="1'; touch evil; '", format=99), "'version' is no version"),
    (_top(extra=nested(101, 1)), "'extra' is nested more than 100 deep"),
    (_average(decay="__import__('os')"), 'has the decay "__import__'),
    (_average(decay=nested(300, 1)), "nested more than 100 deep"),
    (_average(every=0), "has every=0"),
    (_average(every="1"), "has every='1'"),
    (_average(every=True), "has every=True"),
    (_average(every=2**63), "has every=9"),
    (_average(count="1"), "has the count '1'"),
    (_average(count=-1), "has the count -1"),
    (_average(count=[1, -1]), r"has the count \[1, -1\]"),
    (_average(count=1.0), r"has the count 1\.0"),
    (_average(count=2**63), "has the count 9"),
    (_average(count={}), "has the count a dict"),
    (_average(bema=[1]), r"the arguments \[1\] of bema_params"),
    (_average(bema={}), "the arguments a dict of 0 of bema_params"),
    (_average(bema=[{"lag": "1"}]), r"the arguments \[…\] of bema_params"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_lie_is_refused_by_its_name(number):
    change, words = REFUSED[number]
    changed = content()
    change(changed)
    with pytest.raises(CorruptCheckpointError, match=words) as caught:
        Manifest.parse(changed)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [None, [], "x", 1, {}, [1]],
    ids=["null", "empty list", "text", "number", "empty object", "list"],
)
def test_what_is_no_object_is_refused(other):
    with pytest.raises(CorruptCheckpointError, match="states no format"):
        Manifest.parse(other)
    if other != {}:
        with pytest.raises(CorruptCheckpointError, match="holds no trees"):
            parse_sums(other)


def test_a_newer_format_is_no_damage(tmp_path):
    """Nothing of it is looked at but its number and version."""
    for number in (manifest.FORMAT + 1, 10**300):
        newer = {"format": number, "version": "9.1.0", "trees": 7}
        write_sealed(manifest.manifest_path(epath.Path(tmp_path)), newer)
        with pytest.raises(ValueError, match=r"'ema-optax>=9\.1\.0'") as caught:
            manifest.read_manifest(epath.Path(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path} has format {number}, ")
        assert not isinstance(caught.value, CorruptCheckpointError)


def test_what_another_library_wrote(tmp_path):
    with pytest.raises(ValueError, match="was not saved by ema_optax") as caught:
        manifest.read_manifest(epath.Path(tmp_path))
    assert not isinstance(caught.value, CorruptCheckpointError)


@pytest.mark.parametrize(
    "decay",
    [
        {},
        {"kind": ["power"]},
        {"kind": "of version 9", "sharpness": 3},
        {"kind": "schedule", "function": "f"},
        {"kind": "power", "exponent": math.nan},
        {"kind": "power", "exponent": 1, "a": 2},
        {"kind": "constant", "decay": 99.9},
        {"kind": "start_after", "decay": 0.9, "step": 1},
        {"kind": "start_after", "decay": {"kind": "new"}, "step": 1},
    ],
)
def test_a_decay_that_only_a_newer_version_knows(decay):
    """Leaves are restored without it; whoever asks for the averages is told."""
    changed = content()
    changed["averages"]["shadow"]["decay"] = decay
    read = Manifest.parse(changed)
    assert read.trees["shadow"].leaves
    assert json.dumps(read.to_json()) == json.dumps(changed)
    with pytest.raises(ValueError, match=r"decay of 'shadow'.*'ema-optax>=0.1.0'"):
        read.check_decays()


def test_limits_are_what_is_allowed():
    """One less than what is refused above."""
    changed = content()
    for change in (
        _leaf(shape=[1] * 64),
        _path("a" * 4096),
        _top(extra=nested(DEPTH, 1)),
        _average(every=2**63 - 1, count=[[0], [2**63 - 1]]),
    ):
        change(changed)
    read = Manifest.parse(changed)
    assert Manifest.parse(through_json(read.to_json())) == read


ODD = [
    *(None, True, 0, 1, -1, 2**63, 10**300, 1.5, math.nan, math.inf),
    *("", "x", "..", "/", "\0", "w" * 5000, "dense/bias", "float32", "key:x"),
    *([], [None], [[0, 1]], {}, {"": 1}, {"kind": "x"}, nested(200, [])),
]


def _places(value, at=()):
    """Yields the way to each value in a JSON value."""
    yield at
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from _places(value[key], (*at, key))


def _mutants(original):
    """Yields JSON with one value replaced, removed, or under another name."""
    for at in list(_places(original)):
        if not at:
            yield from ODD
            continue
        for odd in (*ODD, _mutants):  # a function: to remove it
            mutant = copy.deepcopy(original)
            node = mutant
            for key in at[:-1]:
                node = node[key]
            if odd is not _mutants:
                node[at[-1]] = odd
                yield mutant
                continue
            removed = node.pop(at[-1])
            yield mutant
            if isinstance(node, dict):
                yield from _renamed(mutant, node, removed)


def _renamed(mutant, node, value):
    for name in ("", "..", "x", "/x", "\0", "shadow", "bema"):
        if name not in node:
            node[name] = value
            yield mutant
            del node[name]


@pytest.mark.long
def test_every_mutant_is_read_or_refused():
    """Any single value of a real manifest: no KeyError, TypeError or RecursionError."""
    read = refused = 0
    for mutant in _mutants(content()):
        try:
            got = Manifest.parse(mutant)
            got.check_decays()
        except ValueError:
            refused += 1
        else:
            assert repr(Manifest.parse(through_json(got.to_json()))) == repr(got)
            _ = [(t.bytes, t.decay, t.every, t.count) for t in got.trees.values()]
            read += 1
    assert read > 100
    assert refused > 2000


def test_every_mutant_of_checksums_is_read_or_refused():
    original = read_sealed(manifest.checksums_path(ITEM, 0))
    read = refused = 0
    for mutant in _mutants({"params": original["params"]}):
        try:
            got = parse_sums(mutant)
        except CorruptCheckpointError:
            refused += 1
        else:
            assert parse_sums(through_json(got)) == got
            read += 1
    assert read > 100
    assert refused > 300
