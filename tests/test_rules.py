"""Rules between files and trees: round trips to the bit, shapes unread, refusals."""

import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_optax.interop import Rule, Rules, read_rules

DTYPES = ("float32", "bfloat16", "float16", "int32", "float8_e4m3fn", "bool")


def filled(shape, dtype="float32", seed=0):
    """An array of bits drawn at random, those of NaN too."""
    kind = jnp.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    bits = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    if kind == np.bool_:
        bits &= 1
    return bits.view(kind).reshape(shape)


def there(rules, names):
    """The tree of a file, each leaf of the shape that was said before."""
    moves = rules.to_tree({name: array.shape for name, array in names.items()})
    tree = {p: move([names[s] for s in move.sources]) for p, move in moves.items()}
    assert {p: leaf.shape for p, leaf in tree.items()} == {
        p: move.shape for p, move in moves.items()
    }
    return tree


def back(rules, tree):
    """The file of a tree."""
    moves = rules.to_names({path: leaf.shape for path, leaf in tree.items()})
    names = {n: move([tree[s] for s in move.sources]) for n, move in moves.items()}
    assert {n: array.shape for n, array in names.items()} == {
        n: move.shape for n, move in moves.items()
    }
    return names


def bits(arrays):
    return {
        k: (a.dtype.name, a.shape, np.ascontiguousarray(a).tobytes())
        for k, a in arrays.items()
    }


def round_trip(given, names):
    """Through JSON and both directions; returns the tree."""
    rules = Rules.of(given)
    if given is not None:
        rules = Rules.from_json(rules.to_json())
        assert rules == Rules.of(given)
    tree = there(rules, names)
    assert bits(back(rules, tree)) == bits(names)
    assert bits(there(rules, back(rules, tree))) == bits(tree)
    return tree


axes = st.integers(1, 4)
dtypes = st.sampled_from(DTYPES)


@settings(deadline=None)
@given(o=axes, i=axes, dtype=dtypes)
def test_a_linear_layer_is_transposed(o, i, dtype):
    """And what is beside it stays as it lies."""
    names = {"fc.weight": filled((o, i), dtype), "fc.bias": filled((o,), dtype, 1)}
    rules = [Rule("**.weight", "**/kernel", "o i -> i o"), Rule("**", "**")]
    tree = round_trip(rules, names)
    assert bits(tree) == bits(
        {"fc/kernel": names["fc.weight"].T, "fc/bias": names["fc.bias"]}
    )


@settings(deadline=None)
@given(
    shape=st.lists(axes, min_size=3, max_size=5).map(tuple),
    dtype=dtypes,
)
def test_convolutions_have_their_channels_last(shape, dtype):
    """In one, two and three dimensions."""
    space = " ".join("hwd"[: len(shape) - 2])
    rule = Rule("conv.weight", "conv/kernel", f"o i {space} -> {space} i o")
    names = {"conv.weight": filled(shape, dtype)}
    tree = round_trip([rule], names)
    expected = np.moveaxis(names["conv.weight"], (0, 1), (-1, -2))
    assert bits(tree) == bits({"conv/kernel": expected})


@settings(deadline=None)
@given(h=axes, d=axes, i=axes, dtype=dtypes)
def test_heads_have_an_axis(h, d, i, dtype):
    """Of a query, whose rows in the file are head by head."""
    rule = Rule("q", "query/kernel", "(h d) i -> i h d", sizes={"h": h})
    names = {"q": filled((h * d, i), dtype)}
    tree = round_trip([rule], names)
    expected = names["q"].reshape(h, d, i).transpose(2, 0, 1)
    assert bits(tree) == bits({"query/kernel": expected})


@settings(deadline=None)
@given(n=st.integers(1, 12), o=axes, i=axes, dtype=dtypes)
def test_layers_are_stacked(n, o, i, dtype):
    """By number, 10 after 9; with a layout and without."""
    names = {f"h.{k}.w": filled((o, i), dtype, k) for k in range(n)}
    names |= {f"h.{k}.b": filled((o,), dtype, n + k) for k in reversed(range(n))}
    rules = [Rule("h.#.w", "h/w", "l o i -> i l o"), Rule("h.#.b", "h/b")]
    tree = round_trip(rules, names)
    weights = np.stack([names[f"h.{k}.w"] for k in range(n)])
    assert bits(tree) == bits(
        {
            "h/w": weights.transpose(2, 0, 1),
            "h/b": np.stack([names[f"h.{k}.b"] for k in range(n)]),
        }
    )


@settings(deadline=None)
@given(n=axes, m=axes, o=axes)
def test_stacks_of_stacks(n, m, o):
    """Experts in layers: two numbers, two axes."""
    names = {
        f"h.{a}.experts.{b}.w": filled((o,), seed=a * m + b)
        for a in range(n)
        for b in range(m)
    }
    tree = round_trip([Rule("h.#.experts.#.w", "h/experts/w")], names)
    assert tree["h/experts/w"].shape == (n, m, o)
    assert bits({"": tree["h/experts/w"][n - 1, 0]}) == bits(
        {"": names[f"h.{n - 1}.experts.0.w"]}
    )


@pytest.mark.long
@settings(deadline=None)
@given(
    heads=st.lists(axes, min_size=3, max_size=3).map(tuple),
    d=axes,
    n=axes,
    i=axes,
    dtype=dtypes,
)
def test_grouped_queries_are_fused_and_stacked(heads, d, n, i, dtype):
    """Query, key and value of other numbers of heads, along the heads of the tree."""
    names = {
        f"h.{k}.{part}": filled((h * d, i), dtype, 3 * k + at)
        for k in range(n)
        for at, (part, h) in enumerate(zip("qkv", heads, strict=True))
    }
    rule = Rule(
        ("h.#.q", "h.#.k", "h.#.v"),
        "h/qkv",
        "l (h d) i -> l i h d",
        sizes={"d": d},
        axis=2,
        lengths=heads,
    )
    tree = round_trip([rule], names)
    expected = np.stack(
        [np.concatenate([names[f"h.{k}.{part}"] for part in "qkv"]) for k in range(n)]
    )
    expected = expected.reshape(n, sum(heads), d, i).transpose(0, 3, 1, 2)
    assert bits(tree) == bits({"h/qkv": expected})


@settings(deadline=None)
@given(n=axes, i=axes, d=axes, h=axes, dtype=dtypes)
def test_a_fused_tensor_is_split_and_stacked(n, i, d, h, dtype):
    """As in GPT-2, whose c_attn is query, key and value along the last axis."""
    names = {f"h.{k}.c_attn.weight": filled((i, 3 * h * d), dtype, k) for k in range(n)}
    rule = Rule(
        "h.#.c_attn.weight",
        ("h/q/kernel", "h/k/kernel", "h/v/kernel"),
        "l i (h d) -> l i h d",
        sizes={"h": h},
        axis=-1,
    )
    tree = round_trip([rule], names)
    for at, part in enumerate("qkv"):
        own = np.s_[:, at * h * d : (at + 1) * h * d]
        expected = np.stack([a[own].reshape(i, h, d) for a in names.values()])
        assert bits({"": tree[f"h/{part}/kernel"]}) == bits({"": expected})


@pytest.mark.long
@settings(deadline=None)
@given(lengths=st.lists(axes, min_size=2, max_size=4).map(tuple), o=axes, dtype=dtypes)
def test_unequal_parts_are_split(lengths, o, dtype):
    """By their lengths, with no layout: einops is not asked."""
    paths = tuple(f"p{k}" for k in range(len(lengths)))
    rule = Rule("*.w", tuple(f"*/{p}" for p in paths), axis=1, lengths=lengths)
    names = {"a.w": filled((o, sum(lengths)), dtype)}
    tree = round_trip([rule], names)
    assert [tree[f"a/{p}"].shape for p in paths] == [(o, n) for n in lengths]


key = st.text("ab1_#*", min_size=1, max_size=5).filter(
    lambda k: "*" not in k and "#" not in k
)


@settings(deadline=None)
@given(st.dictionaries(st.lists(key, min_size=1, max_size=4).map(tuple), axes))
def test_without_rules_names_become_paths(shapes):
    """Dots are slashes, arrays stay."""
    leaves = {k: n for k, n in shapes.items() if not any(_below(k, o) for o in shapes)}
    names = {".".join(keys): filled((n,)) for keys, n in leaves.items()}
    assert set(round_trip(None, names)) == {"/".join(keys) for keys in leaves}


def _below(one, other):
    return len(other) < len(one) and one[: len(other)] == other


def test_names_only_do_without_einops(monkeypatch):
    """A rule that rearranges says which installation brings it."""
    monkeypatch.setitem(sys.modules, "einops", None)
    names = {f"h.{k}.w": filled((2, 3), seed=k) for k in range(3)}
    round_trip([Rule("h.#.w", ("h/a", "h/b"), axis=0)], names)
    rules = Rules.of([Rule("h.#.w", "h/w", "l o i -> l i o")])
    with pytest.raises(ModuleNotFoundError, match=r"ema-optax\[safetensors\]"):
        rules.to_tree({"h.0.w": (2, 3)})


def test_the_first_rule_that_fits_counts():
    """In both directions."""
    rules = Rules.of(
        [
            Rule("**.norm*.weight", "**/norm*/scale"),
            Rule("**.weight", "**/kernel", "o i -> i o"),
            Rule("**.mask", None),
            Rule(None, "**/key"),
            Rule("**", "**"),
        ]
    )
    shapes = {"a.norm1.weight": (3,), "fc.weight": (4, 2), "mask": (1,), "x.mask": (1,)}
    moves = rules.to_tree({**shapes, "fc.bias": (4,)})
    assert {p: m.shape for p, m in moves.items()} == {
        "a/norm1/scale": (3,),
        "fc/kernel": (2, 4),
        "fc/bias": (4,),
    }
    paths = {p: m.shape for p, m in moves.items()} | {"dropout/key": (2,)}
    assert {n: m.shape for n, m in rules.to_names(paths).items()} == {
        "a.norm1.weight": (3,),
        "fc.weight": (4, 2),
        "fc.bias": (4,),
    }


@pytest.mark.parametrize(
    ("pattern", "path", "name", "expected"),
    [
        ("**.w", "**/k", "w", "k"),
        ("**.w", "**/k", "a.b.w", "a/b/k"),
        ("a.**.w", "**/k", "a.w", "k"),
        ("**.*.w", "**/*_k", "a.b.w", "a/b_k"),
        ("*_*.w", "*/*", "a_b_c.w", "a_b/c"),
        ("h_#_*.w", "h/#/*", "h_12_x.w", "h/12/x"),
        ("*_#.w", "*/#", "h_1_2.w", "h_1/2"),
        ("**.x.**.w", "**/y/**", "x.a.x.b.w", "x/a/y/b"),
        ("l#1.w", "l/#", "l21.w", "l/2"),
    ],
)
def test_wildcards_carry_over_in_order(pattern, path, name, expected):
    """Each takes as much as it can, the first one first."""
    rules = Rules.of([Rule(pattern, path)])
    assert list(rules.to_tree({name: ()})) == [expected]
    assert list(rules.to_names({expected: ()})) == [name]


@pytest.mark.parametrize(
    "name",
    ["h.00.w", "h.01.w", "h.-1.w", "h.٣.w", "h..w"],
    ids=["two zeros", "leading zero", "negative", "Arabic digit", "no digit"],
)
def test_numbers_are_plain(name):
    """What would not come back as it was is no number."""
    with pytest.raises(ValueError, match="fits no name"):
        Rules.of([Rule("h.#.w", "h/w")]).to_tree({name: ()})


W = {"fc.weight": (4, 2), "fc.bias": (4,)}


@pytest.mark.parametrize(
    ("rules", "names", "words"),
    [
        ([Rule("h.#.w", "h/w")], {"h.0.w": (), "h.2.w": ()}, "'h.1.w' is missing"),
        ([Rule("h.#.w", "h/w")], {"h.0.w": (), "h.999999999.w": ()}, "'h.1.w' is mis"),
        ([Rule("h.#.w", "h/w")], {"h.1.w": ()}, "'h.0.w' is missing"),
        ([Rule("h.#.w", "h/w")], {"h.0.w": (2,), "h.1.w": (3,)}, "h.1.w' is .3,."),
        ([Rule("a.#.b.#", "c")], {"a.0.b.1": (), "a.1.b.0": ()}, "'a.0.b.0' is miss"),
        ([Rule(("q", "k"), "qk")], {"q": (2,)}, "'k' is missing"),
        ([Rule(("q", "k"), "qk")], {"q": (2,), "k": (3,)}, r"give lengths=\(2, 3\)"),
        (
            [Rule(("q", "k"), "qk", lengths=(3, 2))],
            {"q": (2,), "k": (3,)},
            r"are \(2, 3\), and lengths says \(3, 2\)",
        ),
        ([Rule(("q", "k"), "qk")], {"q": (2, 1), "k": (2, 3)}, "differs elsewhere"),
        ([Rule(("q", "k"), "x", axis=1)], {"q": (2,), "k": (2,)}, "axis 1 is none"),
        ([Rule("x", ("q", "k"))], {"x": (3,)}, "not split into 2 equal parts"),
        ([Rule("x", ("q", "k"), lengths=(1, 1))], {"x": (3,)}, r"are 2 in all, and"),
        ([Rule("x", ("q", "k"), axis=-3)], {"x": (4, 4)}, "axis -3 is none"),
        (
            [Rule("w", "k", "(h d) i -> i h d", sizes={"h": 5})],
            {"w": (12, 3)},
            "divide axis of length 12 in chunks of 5",
        ),
        ([Rule("w", "k", "(h d) i -> i h d")], {"w": (12, 3)}, "give them, as in size"),
        ([Rule("w", "k", "o i -> i o")], {"w": (12, 3, 1)}, "expected 2 dims"),
        ([Rule("w", "k", "o_ i -> i o_")], {"w": (12, 3)}, "rearrange 'o_ i"),
        ([Rule("w", "k"), Rule("w2", "k")], {"w": (), "w2": ()}, "both have the path"),
        ([Rule("**", "**"), Rule("w", "k")], {"w": ()}, "a rule before it takes 'w'"),
        (
            [Rule("fc.weigt", "k"), Rule("**", "**")],
            W,
            "fits no name. The nearest are '",
        ),
        ([Rule("**", "**")], {}, "and there are none"),
        ([Rule("*.weight", "*/kernel")], W, r"1 of 2 names: 'fc.bias'.*\*\.weight"),
        ([], W, "There are no rules"),
        (None, {"fc": (), "fc.bias": ()}, "'fc' would be the leaf 'fc', and 'fc.bias'"),
        (None, {"a..b": ()}, "with the key ''"),
        (None, {"": ()}, "with the key ''"),
        ([Rule("w", "a/../k")], {"w": ()}, r"with the key '\.\.'"),
        ([Rule("**", "**")], {"a/b": (), "a.b": ()}, "both have the path 'a/b'"),
    ],
)
def test_what_does_not_fit_a_file(rules, names, words):
    """The error names the rule, the tensor and the way out."""
    with pytest.raises(ValueError, match=words):
        Rules.of(rules).to_tree(names)


@pytest.mark.parametrize(
    ("rules", "paths", "words"),
    [
        ([Rule("w", "k", "h d i -> (h d) i")], {"k": (12, 3)}, "give them, as in size"),
        ([Rule("h.#.w", "h/w")], {"h/w": ()}, "has no axis of a stack"),
        ([Rule(("q", "k"), "qk")], {"qk": (3,)}, "not split into 2 equal parts"),
        ([Rule("h.#.x", ("q", "k"))], {"q": (2, 1), "k": (3, 1)}, "different lengths"),
        ([Rule("h.#.x", ("q", "k"))], {"q": (2, 1), "k": (2, 2)}, "give lengths=.1, 2"),
        ([Rule("x", ("q", "k"))], {"q": (2,)}, "'k' is missing"),
        (
            [Rule("h.#.w", "h/w"), Rule("*.0.w", "*/v")],
            {"h/w": (2,), "h/v": ()},
            "both",
        ),
        ([Rule("w", "kernl")], {"kernel": ()}, "fits no path. The nearest are 'kernel"),
        ([Rule("w", "kernel")], {"kernel": (), "b": ()}, r"out: Rule\(None, \"b\"\)"),
        (None, {"a.b": (), "a/b": ()}, "both have the name 'a.b'"),
    ],
)
def test_what_does_not_fit_a_tree(rules, paths, words):
    """The same backwards."""
    with pytest.raises(ValueError, match=words):
        Rules.of(rules).to_names(paths)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"rearrange": "o i -> i"}, "cannot be turned round"),
        ({"rearrange": "o -> o r"}, "cannot be turned round"),
        ({"rearrange": "o i - i o"}, "cannot be turned round"),
        ({"rearrange": "o o -> o o"}, "an axis twice"),
        ({"rearrange": "o i -> i o", "sizes": {"h": 2}}, "no axis of"),
        ({"rearrange": "o i -> i o", "sizes": {"o": 0}}, "≥ 1"),
        ({"rearrange": 3}, "rearrange is a text"),
        ({"sizes": {"h": 2}}, "those of a rearrange"),
        ({"name": "*.w"}, "wildcards do not fit"),
        ({"name": "h.#.w", "path": "h/*/w"}, "wildcards do not fit"),
        ({"name": "a.#.b.#", "path": "a_#/b"}, "wildcards do not fit"),
        ({"name": ("a.*", "b.#"), "path": "*"}, "wildcards do not fit"),
        ({"name": "*.#", "path": "#/*"}, "wildcards do not fit"),
        ({"name": "w", "path": "h_#"}, "wildcards do not fit"),
        ({"name": ("a", "b"), "path": ("c", "d")}, "both several"),
        ({"name": ("a", "a")}, "got"),
        ({"name": ()}, "got"),
        ({"name": 3}, "name is a text"),
        ({"name": None, "path": None}, "None for both"),
        ({"path": None, "rearrange": "o i -> i o"}, "nothing to rearrange"),
        ({"name": "a**b", "path": "**"}, "is a key by itself"),
        ({"name": "a..b"}, "empty key"),
        ({"path": "a//b"}, "empty key"),
        ({"name": ""}, "empty key"),
        ({"axis": 1}, "joins none"),
        ({"lengths": (1, 2)}, "2 for 1 parts"),
        ({"name": ("a", "b"), "lengths": (1, 2, 3)}, "3 for 2 parts"),
        ({"name": ("a", "b"), "lengths": (1, 0)}, "≥ 1"),
        ({"name": ("a", "b"), "axis": "0"}, "axis must be a whole number"),
        (
            {"name": "h.#.w", "path": "h/w", "rearrange": "(l o) i -> l i o"},
            "does not name the stacked axis",
        ),
        (
            {"name": "h.#.w", "path": "h/w", "rearrange": "... o i -> ... i o"},
            "does not name the stacked axis",
        ),
    ],
)
def test_rules_that_are_none(rule, words):
    """Are refused where they are written, by what is wrong with them."""
    with pytest.raises((TypeError, ValueError), match=words):
        Rule(**{"name": "w", "path": "k", **rule})
    with pytest.raises((TypeError, ValueError), match=rf"rules\[0\]: .*{words}"):
        Rules.of([{"name": "w", "path": "k", **rule}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "not a list of rules"),
        ("[3]", r"rules\[0\] is a Rule or a mapping"),
        ('[{"name": "w"}]', "needs both name and path"),
        ('[{"name": "w", "path": "k", "rearange": ""}]', "are 'rearrange'"),
        ('[{"name": "w", "name": "k"}]', "a field twice"),
        ("[" * 100_000, "nested too deeply"),
        ("nonsense", "Expecting value"),
        ("\xff", "Cannot read rules from"),
    ],
)
def test_files_that_hold_no_rules(tmp_path, text, words):
    """The error says which file."""
    path = tmp_path / "rules.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises((TypeError, ValueError), match=words):
        read_rules(path)


def test_a_file_of_rules(tmp_path):
    """Lists are tuples, and null leaves out."""
    rules = [
        Rule(("q", "k"), "qk", axis=1, lengths=(2, 1)),
        Rule("w", "k", "(h d) i -> i h d", sizes={"h": 2}),
        Rule("mask", None),
    ]
    path = tmp_path / "rules.json"
    path.write_text(Rules.of(rules).to_json())
    assert list(read_rules(path).rules) == rules
    assert Rules.of(read_rules(path)) == Rules.of(json.loads(path.read_text()))


def test_arrays_that_are_not_those_that_were_said():
    """Others in shape or in dtype are refused, not converted."""
    move = Rules.of([Rule("h.#", "h")]).to_tree({"h.0": (2,), "h.1": (2,)})["h"]
    with pytest.raises(ValueError, match=r"'h.0' is float32, 'h.1' is float16"):
        move([np.zeros(2, np.float32), np.zeros(2, np.float16)])
    with pytest.raises(ValueError, match="have the shapes"):
        move([np.zeros(2), np.zeros(3)])
    with pytest.raises(ValueError, match="have the shapes"):
        move([np.zeros(2)])


def test_a_pattern_takes_no_time_on_hostile_names():
    """No name of a file makes a search that grows as a power of its length."""
    rules = Rules.of([Rule("**.*a*a*a*a*b.**.a.**.b", None), Rule("**", None)])
    names = ["." * 4000, "a" * 4000, "a." * 4000, "1" * 4000, ".".join(["aaaa"] * 2000)]
    started = time.process_time()
    with pytest.raises(ValueError, match="fits no name"):
        rules.to_tree(dict.fromkeys(names, ()))
    # Backtracking would take hours; the bound is no measure of speed.
    assert time.process_time() - started < 60
