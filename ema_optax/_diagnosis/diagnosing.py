"""`diagnose`: checks all averages of an optimizer state."""

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
from ema_optax._averages.states import RingMadeBy
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

    - `initial_weight`: the average still holds the initial params, with weight Πβ.
    - `lag`: the mean age of the averaged params is more than a third of the run.
    - `too_short`: the average is of fewer than two params.
    - `not_started`, `never_folded`, `standing_still`: the average copies the params,
      was never folded, or its decay has ended at 1.
    - `dead_zone`: a fold would leave most elements as they are, because the dtype of
      the shadow is too narrow.
    - `rounding_noise`: most elements are rounded by more than they differ from the
      params.
    - `batch_stats`: BatchNorm's running statistics are those of the raw params.
    - `restarted`: the average has seen fewer updates than the optimizer.
    - `micro_batches`: the average counts each micro-batch as an update.
    - `batch_size`: the decay was chosen for another batch size.
    - `equal`, `nothing_averaged`: reading gives the raw params.
    - `nonfinite_shadow`, `nonfinite_params`: some elements are NaN or infinite.

    With `evaluate`, also from the loss at seven points s + λ(p − s), λ from −¼ to 1¼,
    with s the shadow and p the params:

    - `too_long`: the loss is lowest between shadow and params.
    - `params_best`, `still_falling`: the loss is lowest at the params, or beyond them.
    - `longer`: the loss is lowest beyond the shadow, away from the params.
    - `barrier`: the loss is higher between shadow and params than at both.
    - `within_noise`, `flat`: the loss does not tell shadow and params apart.
    - `evaluation`: `evaluate` failed at a point.

    A healthy average gives no finding. Nothing is changed. The arrays are read on the
    host, leaf by leaf; this does not work under `jit`.

    Args:
        opt_state: The optimizer state.
        params: The live params.
        evaluate: Function from params to a loss. It returns a number; two numbers or
            more, such as one for each batch; or a `reconstruction.Score(value, error)`.
            It is called seven times for each shadow, at λ = 0, 1, ½, ¼, ¾, −¼, 1¼. An
            error, or a value that is not finite, is reported, and the other points are
            still evaluated. Two values count as different from twice the standard error
            of their difference on. Where no standard error is known, the scatter of the
            values around a cubic takes its place.
        name: Name of the shadow. None diagnoses every shadow.
        maximize: Whether larger values of `evaluate` are better, as of an accuracy.
        batch_sizes: The batch size that the decay was chosen for, and that of the run.

    Returns:
        A `Diagnosis`; print it.

    Raises:
        ValueError: If there is no shadow, or no such name, if the params do not fit it,
            or if the state is stacked.
        TypeError: If an argument is of another kind, or `evaluate` returns something
            that is no score.

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
    every_average = averages.find(opt_state, call=_CALL, params=params)
    counts = _other_counts(opt_state, every_average)
    checkup = _Checkup(opt_state, params, evaluate, maximize, sizes, counts)
    if name is not None or len(every_average.names) < 2:
        checkup.check_shadow(every_average.of(name))
    else:
        for shadow in every_average.names:
            checkup.check_shadow([a for a in every_average if a.name == shadow])
    return Diagnosis(
        findings=ordered(checkup.findings),
        figures=checkup.figures,
        evaluated=checkup.evaluated,
        unchecked=tuple(checkup.unchecked),
    )


@dataclasses.dataclass
class _Checkup:
    """Checks one state and its params, and collects the findings."""

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

    def check_shadow(self, chosen: Sequence[Average]) -> None:
        """Checks the averages of one name; several average disjoint leaves."""
        folded = {average.where: average.kept(self.params) for average in chosen}
        shadow = averages.whole(folded, self.params)
        several = len(chosen) > 1
        checked = [
            self._check_average(average, average.where if several else average.name)
            for average in chosen
        ]
        paths, leaves, _ = trees.flatten(shadow)
        masked = [
            path
            for path, leaf in zip(paths, leaves, strict=True)
            if trees.is_placeholder(leaf)
        ]
        statistics = leaf_pairs.statistics_in(paths)
        stale = [path for path in statistics if path in set(masked)]
        record = checked[0]
        if stale:
            self.findings.append(leaf_pairs.stale_statistics(record, stale))
        if self.evaluate is not None:
            norms = [] if statistics else leaf_pairs.norms_in(paths)
            self._check_line(chosen, record, norms)

    def _check_average(self, average: Average, label: str) -> Record:
        """Checks one average leaf by leaf, and its decay and count."""
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
            if not all(_is_readable(x) for x in (s, p)):
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
            self.unchecked.append(records.why_unknown(record))
        return record

    def _check_line(
        self, chosen: Sequence[Average], record: Record, norms: list[str]
    ) -> None:
        """Evaluates the points between shadow and params, and checks the losses."""
        assert self.evaluate is not None
        points = []
        for at in line.POINTS:
            tree = _between(chosen, self.params, at)
            points.append(line.evaluated(self.evaluate, tree, at))
        self.evaluated[record.shadow] = tuple(
            dataclasses.asdict(point) for point in sorted(points, key=lambda p: p.at)
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
    decay, copies = average.decay, None
    if isinstance(average, BemaAverage) and average.made_by:
        decay = records.BemaDecay(average.made_by)
    if isinstance(average.made_by, RingMadeBy):
        copies = average.made_by.k
    made_by = average.made_by if average.is_computed else decay
    return Record(
        label,
        int(count),
        decay,
        average.every,
        text=None if made_by is None else str(made_by),
        is_bema=isinstance(average, BemaAverage),
        by_chance=by_chance,
        copies=copies,
    )


def _between(chosen: Sequence[Average], params: Any, at: float) -> Any:
    """Computes s + λ(p − s) in new arrays, with the dtypes of the params.

    A leaf that is not averaged is that of the params. At λ = 0 and 1 the result is the
    shadow and the params to the bit.
    """
    shadow = averages.whole({each.where: each.read(params) for each in chosen}, params)
    shadows = jax.tree.leaves(shadow, is_leaf=trees.is_placeholder)
    slots, structure = jax.tree.flatten(params, is_leaf=trees.is_placeholder)

    def point(s: Any, p: Any) -> Any:
        if trees.is_placeholder(s) or at == 1:
            # A copy, because `evaluate` may delete or donate what it gets.
            return jnp.copy(p) if isinstance(p, jax.Array) else p
        if at:
            s = s.astype(trees.wide(s.dtype))
            s += at * (jnp.asarray(p).astype(s.dtype) - s)
        return jnp.array(s, dtype=jnp.result_type(p))

    pairs = zip(shadows, slots, strict=True)
    return jax.tree.unflatten(structure, [point(s, p) for s, p in pairs])


def _other_counts(
    opt_state: optax.OptState, every_average: averages.Averages
) -> dict[str, int]:
    """Lists by path the counts of updates in a state, except those of the averages."""
    ours = {under(average.path, records.COUNT) for average in every_average}
    counts = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        path = trees.path_name(key_path)
        if path not in ours and records.is_count(path, leaf) and _is_readable(leaf):
            counts[path] = int(leaf)
    return counts


def _is_readable(leaf: object) -> bool:
    """Returns whether this process can read all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _sizes(batch_sizes: object) -> tuple[int, int] | None:
    if batch_sizes is None:
        return None
    example = "batch_sizes=(256, 4096) is 16 times the batch that β was chosen for."
    if not isinstance(batch_sizes, (tuple, list)) or len(batch_sizes) != 2:
        raise TypeError(f"batch_sizes is a pair, got {brief(batch_sizes)}. {example}")
    before, now = (arguments.whole(x, "A batch size", 1, example) for x in batch_sizes)
    return before, now
