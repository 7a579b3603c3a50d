"""TEMPORARY shim."""

import dataclasses
from typing import Any

import jax

import ema_optax.states as _s
from ema_optax import bema, trees
from ema_optax.states import (
    BemaParamsState,
    EmaParamsState,
    NamedShadowsState,
    record_of,
)
from ema_optax.states import (
    BemaRecord as BemaMadeBy,
)

_s.BemaMadeBy = BemaMadeBy


@dataclasses.dataclass(frozen=True)
class Average:
    path: str
    name: str
    count: Any
    made_by: Any
    tree: Any
    is_computed: bool
    decay: Any
    every: Any
    state: Any

    def read(self, params):
        if self.is_computed:
            return bema.corrected(
                self.state, trees.arranged(params, self.state.average)
            )
        return self.tree


class Averages:
    def __init__(self, opt_state):
        isl = lambda n: isinstance(n, (EmaParamsState, BemaParamsState))
        self.state = opt_state
        self.isl = isl
        self.list = []
        for path, node in jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=isl)[
            0
        ]:
            if isinstance(node, BemaParamsState):
                r = _s.bema_record_of(node)
                self.list.append(
                    Average(
                        trees.path_name(path) + " (bema_params)",
                        "",
                        node.count,
                        r,
                        node.average,
                        True,
                        None,
                        r.every,
                        node,
                    )
                )
            elif isinstance(node, EmaParamsState):
                r = record_of(node)
                named = (
                    node.shadow
                    if isinstance(node, NamedShadowsState)
                    else {"": node.shadow}
                )
                for n, t in named.items():
                    self.list.append(
                        Average(
                            trees.path_name(path),
                            n,
                            node.count,
                            r,
                            t,
                            False,
                            r.decays.get(n) if r else None,
                            r.every if r else None,
                            node,
                        )
                    )

    def __iter__(self):
        return iter(self.list)

    def __len__(self):
        return len(self.list)

    def rest(self):
        return jax.tree.map(
            lambda n: n._replace(shadow=None) if isinstance(n, EmaParamsState) else n,
            self.state,
            is_leaf=self.isl,
        )

    def put_back(self, rest, filled):
        filled = iter(filled)

        def put(node, old):
            if isinstance(old, BemaParamsState):
                next(filled)
                return node
            if not isinstance(old, EmaParamsState):
                return node
            if isinstance(old, NamedShadowsState):
                sh = {n: next(filled) for n in old.shadow}
            else:
                sh = next(filled)
            return old._replace(count=node.count, shadow=sh)

        return jax.tree.map(put, rest, self.state, is_leaf=self.isl)


def find(s):
    return Averages(s)
