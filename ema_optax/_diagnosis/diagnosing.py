"""`diagnose`: the checks of all averages of an optimizer state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ema_optax._averages import averages
from ema_optax._averages.average import Average
from ema_optax._averages.bema import BemaAverage
from ema_optax._diagnosis import leaf_pairs, line, records
from ema_optax._diagnosis.findings import Diagnosis, Figures, Finding, ordered
from ema_optax._diagnosis.leaf_pairs import Pairs
from ema_optax._diagnosis.records import Record
from ema_optax._messages import arguments
from ema_optax._messages.text import brief
from ema_optax._trees import mistaken, trees
from ema_optax._trees.locating import under

_CALL = "diagnose(opt_state, params)"


def diagnose(
    opt_state: Any,
    params: Any,
    evaluate: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
    maximize: bool = False,
    batch_sizes: tuple[int, int] | None = None,
) -> Diagnosis:
    """Finds why an average is worse than the raw weights: causes and remedies.

    From the state and the params alone:

    - `initial_weight`: the average still holds initial params, Πβ of them.
    - `lag`: its mean age is more than a third of the run; `too_short`: it is of fewer
      than two params; `not_started`, `never_folded`, `standing_still`: it copies the
      params, or was never folded, or its decay has ended at 1.
    - `dead_zone`: most elements would not change in a fold, as their shadow is too
      narrow for it; `rounding_noise`: most are rounded by more than they are apart.
    - `batch_stats`: BatchNorm's running statistics are those of the raw params.
    - `restarted`, `micro_batches`: it has seen fewer updates than the optimizer, or
      each micro-batch. `batch_size`: its decay was chosen for another batch.
    - `equal`, `nothing_averaged`, `nonfinite_shadow`, `nonfinite_params`.

    With `evaluate` also from the loss at seven points s + λ(p − s), λ from −¼ to 1¼,
    with s the shadow and p the params: `too_long` where it is lowest between them,
    `params_best` or `still_falling` where at the params or beyond, `longer` where
    beyond the shadow, `barrier` where it is higher between than at both,
    `within_noise` and `flat` where it does not tell, `evaluation` where it failed.

    Healthy averages give no finding. Nothing is changed, and arrays are looked at on
    the host, leaf by leaf; not under `jit`.

    Args:
        opt_state: The optimizer state.
        params: The live params.
        evaluate: From params to a loss: a number; two numbers or more, such as one for
            each batch; or a `reconstruction.Score(value, error)`.
            Called seven times for each shadow, at λ = 0, 1, ½, ¼, ¾, −¼, 1¼. An error,
            or a value that is not finite, is reported, and the other points go on. Two
            values differ where they do by twice the standard error of the difference;
            without one, what is left beside a cubic through the points is taken for it.
        name: Name of the shadow. None takes each of them.
        maximize: Whether larger values of `evaluate` are better, as of an accuracy.
        batch_sizes: The batch size that the decay was chosen for, and that of the run.

    Returns:
        A `Diagnosis`; print it.

    Raises:
        ValueError: If there is no shadow, or no such name, if the params do not fit it,
            or if the state is stacked.
        TypeError: If an argument is of another kind, or `evaluate` returns what is no
            score.

    >>> import optax, ema_optax
    >>> optimizer = optax.chain(
    ...     optax.sgd(0.1), ema_optax.ema_params(ema_optax.constant(0.9999))
    ... )
    >>> params = {"w": jnp.array([1.0])}
    >>> state = optimizer.init(params)
    >>> for _ in range(20):
    ...     updates, state = optimizer.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(diagnose(state, params, lambda params: params["w"][0] ** 2))
    shadow: constant(decay=0.9999), 20 updates seen, mean age 20, effective size 1, ...
      along s + λ(p − s), λ: -0.25: 1.48..., 0: 0.99..., 0.25: 0.60..., 0.5: 0.31...
    problem: 99.8 % of the average are still the initial params, after 20 updates; ...
      → Use warmup(β) or debiased(β), such as warmup(0.9999): they do not wait that out.
    warning: The loss falls all the way from the average to the params: ...
      → Take a much shorter average, such as power(0.02); ...
    """
    mistaken.check_no_nnx(params, "a tree of arrays", _CALL)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(
            f"evaluate is a function from params to a loss, got {brief(evaluate)}."
        )
    for leaf in jax.tree.leaves((opt_state, params)):
        if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)):
            raise TypeError(
                f"{_CALL} looks at values, and got {brief(leaf)} without any. Call it "
                "outside jit; metrics(opt_state, params) gives figures inside."
            )
    maximize = arguments.flag(maximize, "maximize")
    sizes = _sizes(batch_sizes)
    found = averages.find(opt_state, call=_CALL, params=params)
    seen = _Seen(
        opt_state, params, evaluate, maximize, sizes, _counts(opt_state, found)
    )
    if name is not None or len(found.names) < 2:
        chosen = found.of(name)
        seen.look_at(chosen, None if name is None else chosen[0].name)
    else:
        for each in found.names:
            seen.look_at([a for a in found if a.name == each], each)
    return Diagnosis(
        findings=ordered(seen.findings),
        figures=seen.figures,
        evaluated=seen.evaluated,
        unchecked=tuple(seen.unchecked),
    )


@dataclasses.dataclass
class _Seen:
    """Collects findings on one state and its params."""

    opt_state: Any
    params: Any
    evaluate: Callable[[Any], Any] | None
    maximize: bool
    sizes: tuple[int, int] | None
    counts: dict[str, int]
    findings: list[Finding] = dataclasses.field(default_factory=list)
    figures: dict[str, Figures] = dataclasses.field(default_factory=dict)
    evaluated: dict[str, tuple[Figures, ...]] = dataclasses.field(default_factory=dict)
    unchecked: list[str] = dataclasses.field(default_factory=list)

    def look_at(self, chosen: Sequence[Average], name: str | None) -> None:
        """Checks the averages of one name; several are of disjoint leaves."""
        kept = {each.where: each.kept(self.params) for each in chosen}
        shadow = averages.whole(kept, self.params)
        several = len(chosen) > 1
        looked = [
            self._average(each, each.where if several else each.name) for each in chosen
        ]
        paths, leaves, _ = trees.flatten(shadow)
        masked = [
            path
            for path, leaf in zip(paths, leaves, strict=True)
            if trees.is_placeholder(leaf)
        ]
        statistics = leaf_pairs.statistics_in(paths)
        stale = [path for path in statistics if path in set(masked)]
        record = looked[0]
        if stale:
            self.findings.append(leaf_pairs.stale_statistics(record, stale))
        if self.evaluate is not None:
            norms = [] if statistics else leaf_pairs.norms_in(paths)
            self._along(chosen, name, record, norms)

    def _average(self, average: Average, label: str) -> Record:
        record = _record(average, label)
        pairs = Pairs(record)
        kept = average.kept(self.params) if average.is_computed else average.tree
        tree = trees.arranged(kept, self.params)
        paths, shadows, structure = trees.flatten(tree)
        for path, s, p in zip(
            paths, shadows, structure.flatten_up_to(self.params), strict=True
        ):
            if trees.is_placeholder(s):
                continue
            if not all(_is_here(x) for x in (s, p)):
                self.unchecked.append(
                    f"{path!r} and others, parts of which are on other processes"
                )
                break
            pairs.add(path, np.asarray(s), np.asarray(p))
        else:
            self.findings += pairs.check()
        self.figures[label] = record.figures() | pairs.figures()
        self.findings += records.check(
            record, others=self.counts, batch_sizes=self.sizes
        )
        if record.length is None:
            self.unchecked.append(records.why_unknown(label))
        return record

    def _along(
        self,
        chosen: Sequence[Average],
        name: str | None,
        record: Record,
        norms: list[str],
    ) -> None:
        assert self.evaluate is not None
        points = []
        for at in line.POINTS:
            tree = _between(chosen, self.params, at)
            points.append(line.evaluated(self.evaluate, tree, at))
        self.evaluated[record.shadow] = tuple(
            dataclasses.asdict(each) for each in sorted(points, key=lambda p: p.at)
        )
        self.findings += line.check(record, points, maximize=self.maximize, norms=norms)


def _record(average: Average, label: str) -> Record:
    count = average.count
    if jnp.ndim(count):
        raise ValueError(
            f"The optimizer state is stacked: its count is of shape {count.shape}. "
            "Diagnose each member: jax.tree.map(lambda x: x[0], opt_state)."
        )
    by_chance = tuple(
        name
        for name in ("bfloat16", "float32")
        if average.is_rounded_by_chance(jnp.dtype(name))
    )
    bema = isinstance(average, BemaAverage)
    if bema:
        made = average.made_by
        decay = records.BemaDecay(made) if made else None
    else:
        decay = average.decay
    made_by = average.made_by if bema else decay
    text = None if made_by is None else str(made_by)
    return Record(
        label, int(count), decay, average.every, text, bema, by_chance=by_chance
    )


def _between(chosen: Sequence[Average], params: Any, at: float) -> Any:
    """Computes s + λ(p − s) like the params, in arrays of its own.

    Leaves that are not averaged are the params'. It is exact to the bit at 0 and 1.
    """
    shadow = averages.whole({each.where: each.read(params) for each in chosen}, params)
    shadows = jax.tree.leaves(shadow, is_leaf=trees.is_placeholder)
    slots, structure = jax.tree.flatten(params, is_leaf=trees.is_placeholder)

    def point(s: Any, p: Any) -> Any:
        if trees.is_placeholder(s) or at == 1:
            return jnp.copy(p) if isinstance(p, jax.Array) else p
        if at:
            s = s.astype(trees.wide(s.dtype))
            s += at * (jnp.asarray(p).astype(s.dtype) - s)
        return jnp.array(s, dtype=jnp.result_type(p))

    pairs = zip(shadows, slots, strict=True)
    return jax.tree.unflatten(structure, [point(s, p) for s, p in pairs])


def _counts(opt_state: optax.OptState, found: averages.Averages) -> dict[str, int]:
    """Lists the counts of updates in a state by path, without those of the averages."""
    ours = {under(each.path, records.COUNT) for each in found}
    counts = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        path = trees.path_name(key_path)
        if path not in ours and records.is_count(path, leaf) and _is_here(leaf):
            counts[path] = int(leaf)
    return counts


def _is_here(leaf: object) -> bool:
    """Whether this process can read all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _sizes(given: object) -> tuple[int, int] | None:
    if given is None:
        return None
    example = "batch_sizes=(256, 4096) is 16 times the batch that β was chosen for."
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"batch_sizes is a pair, got {brief(given)}. {example}")
    before, now = (arguments.whole(x, "A batch size", 1, example) for x in given)
    return before, now
