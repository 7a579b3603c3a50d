"""Which part of an optimizer state is which part of another: found by names alone."""

import jax
import jax.numpy as jnp
import optax
import pytest

import ema_optax
from ema_optax._averages import averages
from ema_optax._checkpoint import state_nodes
from ema_optax._checkpoint.slots import by_path
from ema_optax._checkpoint.step import structure_of

PARAMS = {"a": {"w": jnp.ones(2)}, "b": jnp.ones(3)}


def nodes(optimizer, params=PARAMS):
    state = averages.find(optimizer.init(params)).rest()
    structure = structure_of(state)
    known = by_path(params)
    ours = state_nodes.average_nodes(structure)
    parts = {
        path: state_nodes.split(path, known)
        for path in by_path(state)
        if path.rpartition("/")[0] not in ours
    }
    names = {p: [part.param] for p, part in parts.items() if part.param is not None}
    return state_nodes.nodes_of(parts, structure, names).values()


def found(before, after):
    return state_nodes.matched(nodes(after), nodes(before))[0]


def adam(**options):
    return optax.scale_by_adam(**options)


LABELS = {"a": {"w": "x"}, "b": "y"}
GROUPS = optax.multi_transform({"x": adam(), "y": adam()}, LABELS)
CASES = {
    "shifted": (adam(), optax.chain(optax.clip(1.0), adam()), {"1": ""}),
    "wrapped": (
        adam(),
        optax.apply_if_finite(optax.chain(adam()), 3),
        {"inner_state/0": ""},
    ),
    "of other fields": (adam(), optax.scale_by_amsgrad(), {}),
    "two in their order": (
        optax.chain(adam(), optax.clip(1.0), adam()),
        optax.chain(optax.clip(1.0), adam(), adam()),
        {"1": "0", "2": "2"},
    ),
    "one of two at its place": (optax.chain(adam(), adam()), adam(), {}),
    "one where two were": (
        optax.chain(adam(), adam()),
        optax.chain(adam(), optax.clip(1.0)),
        {"0": "0"},
    ),
    "in groups": (
        adam(),
        GROUPS,
        {"inner_states/x/inner_state": "", "inner_states/y/inner_state": ""},
    ),
    "groups called otherwise": (
        GROUPS,
        optax.multi_transform(
            {"b": adam(), "a": adam()},
            jax.tree.map(lambda label: {"x": "b", "y": "a"}[label], LABELS),
        ),
        {
            "inner_states/a/inner_state": "inner_states/y/inner_state",
            "inner_states/b/inner_state": "inner_states/x/inner_state",
        },
    ),
    "of no params": (
        optax.scale_by_schedule(lambda _: 1.0),
        optax.chain(optax.clip(1.0), optax.scale_by_schedule(lambda _: 1.0)),
        {"1": ""},
    ),
}


@pytest.mark.parametrize(("before", "after", "expected"), CASES.values(), ids=CASES)
def test_what_is_found(before, after, expected):
    """One of each kind, those of the same params, those in order, or none."""
    assert found(before, after) == expected


def test_a_param_called_as_a_field():
    """The longest end that is a param's path is the param's, on both sides alike."""
    assert state_nodes.split("0/mu/mu/a/w", {"a/w", "mu/a/w"}) == ("0", "mu", "mu/a/w")
    assert found(adam(), optax.chain(adam())) == {"0": ""}


def test_fields_without_leaves_count():
    """Adam whose moments are all masked is Adam: its count goes with the others."""
    [node] = nodes(optax.masked(adam(), jax.tree.map(lambda _: False, PARAMS)))
    assert node.fields == ("count", "mu", "nu")
    assert node.params == frozenset()


def test_states_of_averages_are_told_from_others():
    """A count beside no shadow, and BEMA's three; Adam's state is none."""
    chain = optax.chain(
        adam(),
        ema_optax.ema_params({"a": 0.9}),
        optax.MultiSteps(
            optax.chain(adam(), ema_optax.bema_params()), 2
        ).gradient_transformation(),
    )
    rest = averages.find(chain.init(PARAMS)).rest()
    assert state_nodes.average_nodes(structure_of(rest)) == {
        "1": False,
        "2/inner_opt_state/1": True,
    }
