"""`reconstruction.choose`: what it finds, tells apart, keeps, resumes and refuses."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import checkpoint, reconstruction
from ema_optax._reconstruction import ingredients
from ema_optax.reconstruction import Score, Snapshot, choose

STEPS = range(25, 1001, 25)
EXPONENTS = (6.94, 16.97)


def line(scale: float = 1.0) -> list[Snapshot]:
    """Snapshots of a run whose param is the number of the step.

    The density (γ+1)·t^γ of an average has its mean at (γ+1)/(γ+2).
    """
    return [
        Snapshot(step, g, {"w": np.float64([scale * step * (g + 1) / (g + 2)])})
        for step in STEPS
        for g in EXPONENTS
    ]


def age(params: Any) -> float:
    """Mean age of what is averaged, as a share of the run."""
    return 1 - float(params["w"][0]) / STEPS[-1]


def age_of(width: float) -> float:
    g = ema_optax.exponent_from_width(width)
    return 1 - (g + 1) / (g + 2)


def best_at(width: float) -> Any:
    return lambda params: abs(math.log(max(age(params), 1e-9) / age_of(width)))


VALUES = np.random.default_rng(0).normal(size=(11, 7)).astype(np.float32)
RUN_STEPS = range(100, 1200, 100)


def at(i: int) -> dict[str, Any]:
    """Params of a step, with leaves that are not averaged."""
    return {"w": jnp.asarray(VALUES[i]), "n": jnp.int32(i), "key": jax.random.key(3)}


def save(folder: Path, i: int, params: Any) -> None:
    state = ema_optax.ema_params(0.9).init(params)
    checkpoint.save(folder, params, state, step=RUN_STEPS[i])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven steps of unrelated params."""
    folder = tmp_path_factory.mktemp("choose") / "run"
    for i in range(len(RUN_STEPS)):
        save(folder, i, at(i))
    return folder


def near(weights: np.ndarray) -> Any:
    """A loss that is least at a weighted mean of the checkpoints."""
    target = np.tensordot(weights, VALUES.astype(np.float64), axes=1)
    return lambda params: float(np.sum((np.asarray(params["w"]) - target) ** 2))


def last(n: int) -> np.ndarray:
    return np.where(np.arange(11) >= 11 - n, 1 / n, 0.0)


class Counted:
    """A function that knows how often it was called, and stops at a call."""

    def __init__(self, evaluate: Any, stop: int | None = None) -> None:
        self.evaluate, self.stop, self.calls = evaluate, stop, 0

    def __call__(self, params: Any) -> Any:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.evaluate(params)


# Widths.


@pytest.mark.parametrize("width", [0.03, 0.07, 0.16])
def test_the_best_width_is_found(width: float):
    """In twelve evaluations, to a tenth of it, and its average is the reconstruction.

    Age is about the width here, and the grid's neighbours differ by more than half.
    """
    evaluate = Counted(best_at(width))
    found = choose(line(), evaluate)
    assert found.evaluations == evaluate.calls == len(found.points) <= 12
    assert found.best.value == pytest.approx(width, rel=0.1)
    assert found.best.score == min(point.score for point in found.points)
    assert found.best.score == pytest.approx(best_at(width)(found.tree), abs=1e-9)
    again = reconstruction.reconstruct(line(), width=float(found.best.value))
    np.testing.assert_array_equal(found.tree["w"], again.tree["w"])
    np.testing.assert_allclose(found.best.coefficients, again.coefficients)
    assert (found.ties, found.step) == ((), 1000)


def test_the_greatest_score_where_that_is_asked_for():
    """The negated loss has the same best, of all points the same ones."""
    least = choose(line(), best_at(0.07))
    greatest = choose(line(), lambda p: -best_at(0.07)(p), maximize=True)
    assert [p.value for p in greatest.points] == [p.value for p in least.points]
    assert greatest.best.value == least.best.value


def test_nothing_is_tried_outside_what_the_snapshots_give():
    """All widths lie in what is reachable, and its ends are among them."""
    found = choose(line(), best_at(0.0001))
    widths = [float(point.value) for point in found.points]
    ridge = reconstruction.rounding_variance("float64")
    steps, exponents = np.repeat(STEPS, 2), EXPONENTS * len(STEPS)
    low, high = reconstruction.reachable(steps, exponents, 1000, ridge=ridge)
    assert low <= min(widths) == found.best.value <= low * 1.001
    assert high * 0.999 <= max(widths) <= high
    assert all(float(f"{width:.4g}") == width for width in widths)  # to write again
    narrow = choose(line(), best_at(0.0001), between=(0.05, 0.08))
    tried = [point.value for point in narrow.points]
    assert (min(tried), max(tried)) == (0.05, 0.08)
    with pytest.raises(ValueError, match=r"outside the widths .*: from 0\.0\d+ to 0"):
        choose(line(), best_at(0.1), between=(0.05, 0.5))


def test_an_axis_with_noise_and_a_plateau_is_reported_as_a_tie():
    """Batches share their difficulty: what is flat is tied, what is not is told apart.

    The curve is flat from 0.05 to 0.12, and rises by 0.2 at each doubling outside; the
    noise of a batch alone is 0.01, that which batches share 1.
    """
    rng = np.random.default_rng(1)
    shared = rng.normal(size=32)

    def evaluate(params: Any) -> np.ndarray:
        a = age(params)
        outside = max(age_of(0.05) / a, a / age_of(0.12), 1.0)
        own = rng.normal(size=32, scale=0.01)
        return 0.2 * math.log2(outside) + shared + own

    found = choose(line(), evaluate, budget=30)
    flat = [p for p in found.points if 0.05 <= p.value <= 0.12]
    tied = {found.best, *found.ties}
    assert len(flat) >= 2
    assert set(flat) <= tied
    assert all(0.047 < point.value < 0.127 for point in tied)
    assert found.evaluations < 30  # what is left is inside the noise
    assert found.best.error == pytest.approx(np.std(shared, ddof=1) / 32**0.5, rel=0.05)


def test_of_equal_scores_the_middle_one_is_the_best():
    """All are tied, and nothing is tried beyond the grid."""
    found = choose(line(), lambda params: 0.5)
    tried = sorted(point.value for point in found.points)
    assert len(tried) == 7
    assert found.best.value == tried[3]
    assert len(found.ties) == 6


@pytest.mark.parametrize(
    ("error", "tied"), [(None, []), (0.1, []), (0.11, [1.3]), (0.4, [1.3, 2.0])]
)
def test_unknown_noise_and_known_noise(error: float | None, tied: list[float]):
    """Equal scores alone are tied without it; with it, two of its standard errors.

    Of a difference it is √2 as much: 0.3 is more than 0.283, and less than 0.311.
    """
    values = iter([1.3, 1.0, 2.0])
    found = choose(line(), lambda params: Score(next(values), error), budget=3)
    assert [point.score for point in found.ties] == tied


def test_the_structure_of_params_is_given_to_the_evaluation():
    """Their leaves that are not averaged are theirs, as in a reconstruction."""
    kinds = set()

    def evaluate(params: Any) -> float:
        kinds.add((type(params).__name__, int(params[1]), params[0].dtype.name))
        return 1.0

    snapshots = [Snapshot(s.step, s.exponent, (s.tree["w"], None)) for s in line()]
    params = (jnp.zeros(1, jnp.bfloat16), 5)
    found = choose(snapshots, evaluate, params=params, budget=3)
    assert kinds == {("tuple", 5, "bfloat16")}
    assert found.tree[1] == 5


def test_memory_and_passes(monkeypatch: pytest.MonkeyPatch):
    """So many averages are made in one pass, and no more."""
    made = []
    merge = ingredients.merge

    def counted(trees: Any, coefficients: Any, **settings: Any) -> Any:
        made.append(len(coefficients))
        return merge(trees, coefficients, **settings)

    monkeypatch.setattr(ingredients, "merge", counted)
    choose(line(), best_at(0.07), at_once=3)
    assert made == [3, 3, 1, 2, 2, 1, 1]  # grid, halves, and the best again
    made.clear()
    choose(line(), best_at(0.07), at_once=1)
    assert made == [1] * 13


# Evaluations that fail.


@pytest.mark.parametrize("kind", ["nan", "inf", "raises", "nan in a batch"])
def test_what_fails_is_kept_and_told(kind: str):
    """With its reason; the search goes on, and the best is among the others."""

    def evaluate(params: Any) -> Any:
        if age(params) > age_of(0.1):
            if kind == "raises":
                raise RuntimeError("the model\ndiverged")
            return {"nan": math.nan, "inf": math.inf}.get(kind, [1.0, math.nan])
        return best_at(0.08)(params)

    with pytest.warns(
        reconstruction.EvaluationWarning, match=r"width 0\.\d+ failed: it"
    ) as caught:
        found = choose(line(), evaluate)
    failed = [point for point in found.points if point.failure]
    assert len(caught) == len(failed) >= 2
    assert all(point.value > 0.1 and math.isnan(point.score) for point in failed)
    said = {"raises": "it raised RuntimeError: the model diverged"}
    wanted = {"nan": "it returned nan", "inf": "it returned inf"}
    assert failed[0].failure == said.get(kind, wanted.get(kind, "it returned nan"))
    assert found.best.value == pytest.approx(0.08, rel=0.1)
    assert found.evaluations == len(found.points) <= 12
    content = json.loads(found.to_json())
    assert [p.get("failure") for p in content["points"]].count(None) < 12
    assert found.provenance["chosen"]["value"] == found.best.value


def test_nothing_can_be_evaluated():
    """An error with the first reason, after the grid."""
    evaluate = Counted(lambda params: params["v"])
    with (
        pytest.warns(reconstruction.EvaluationWarning),
        pytest.raises(ValueError, match=r"None of 7 .* first, width 0.*KeyError: 'v'"),
    ):
        choose(line(), evaluate)
    assert evaluate.calls == 7


@pytest.mark.parametrize(
    "returned",
    [
        *("0.5", True, None, [1.0], [[1.0, 2.0]], [], {"loss": 1.0}, 1j, ["a", "b"]),
        *([1, []], np.ones((2, 2)), np.ones(1), np.array([True, False])),
    ],
)
def test_what_is_no_score_ends_at_once(returned: object):
    """A mistake in the evaluation is that of all: nothing else is evaluated."""
    evaluate = Counted(lambda params: returned)
    with pytest.raises(TypeError, match=r"evaluate\(params\) returns a number; or two"):
        choose(line(), evaluate)
    assert evaluate.calls == 1


@pytest.mark.parametrize(
    "returned",
    [
        *(np.float32(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), np.array(0.5)),
        *([0.25, 0.75], (jnp.float32(0.25), 0.75), jnp.array([0.25, 0.75]), [1, 0]),
        *(Score(0.5), Score(np.float32(0.5), 0.1)),
    ],
    ids=[
        "NumPy number",
        "JAX number",
        "bfloat16",
        "NumPy scalar array",
        "list",
        "tuple",
        "JAX array",
        "whole numbers",
        "Score",
        "Score with noise",
    ],
)
def test_what_is_a_score(returned: object):
    """Numbers of any library, several of them, or a score."""
    found = choose(line(), lambda params: returned, budget=3)
    assert found.best.score == 0.5
    assert isinstance(found.best.score, float)
    if found.best.samples:  # two numbers: their error is half of their distance
        apart = max(found.best.samples) - min(found.best.samples)
        assert found.best.error == pytest.approx(apart / 2)


def test_scores():
    """They hold numbers, and an error that can be one."""
    assert Score(np.float32(0.5), 0) == Score(0.5, 0.0)
    assert Score(2, samples=np.float32([1, 3])).samples == (1.0, 3.0)
    for wrong in ((None,), ([1.0],), ("1",), (1.0, "0"), (1.0, [0.1])):
        with pytest.raises(TypeError, match="of a Score must be one number"):
            Score(*wrong)
    for error in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="standard error ≥ 0"):
            Score(1.0, error)


# Runs on disk.


@pytest.mark.parametrize("n", [1, 4, 7, 11])
def test_the_last_checkpoints(run: Path, n: int):
    """Their best number is found, as the plain mean; the rest is the newest's."""
    found = choose(run, near(last(n)), over="last")
    assert (found.best.over, found.best.value) == ("last", n)
    np.testing.assert_allclose(found.best.coefficients, last(n), atol=1e-15)
    target = np.tensordot(last(n), VALUES.astype(np.float64), axes=1)
    np.testing.assert_allclose(found.tree["w"], target, atol=1e-7)
    assert int(found.tree["n"]) == 10
    assert found.tree["key"] == at(0)["key"]
    assert found.best.steps == tuple(RUN_STEPS)
    assert all(isinstance(point.value, int) for point in found.points)
    assert len({point.value for point in found.points}) == found.evaluations


@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.7])
def test_extrapolations(run: Path, alpha: float):
    """θ̄ + α·(θ̄ − θ̄') with coefficients that sum to 1; the middle is in the newer."""
    newer, older = last(6), np.where(np.arange(11) < 5, 1 / 5, 0.0)
    weights = newer + alpha * (newer - older)
    found = choose(str(run), near(weights), over="alpha", budget=16)
    assert found.best.value == pytest.approx(alpha, abs=0.05)
    for point in found.points:
        expected = newer + point.value * (newer - older)
        np.testing.assert_allclose(point.coefficients, expected, atol=1e-15)
        assert point.coefficients.sum() == pytest.approx(1, abs=1e-12)
        norm = math.sqrt(sum(c * c for c in expected))
        assert point.noise_gain == pytest.approx(norm)
    tried = [point.value for point in found.points]
    assert (min(tried), max(tried)) == (-1, 1)
    further = choose(run, near(weights), over="alpha", between=(0.5, 3), budget=3)
    assert [point.value for point in further.points] == [0.5, 1.75, 3]


def test_schedules(run: Path):
    """Those of names, windows and decays, each average evaluated once."""
    among = ["uniform", "linear", "1-sqrt@4", ema_optax.power(0.1), "ema:0.5@3"]
    expected = {
        "uniform": last(11),
        "linear": last(11),  # the same: steps are evenly spaced
        "1-sqrt@4": np.append(
            np.zeros(7), reconstruction.schedule_coefficients("1-sqrt", [8, 9, 10, 11])
        ),
        "power(width=0.1)": reconstruction.decay_coefficients(
            ema_optax.power(0.1), list(RUN_STEPS)
        ),
        "ema:0.5@3": np.append(np.zeros(8), [0.25, 0.25, 0.5]),
    }
    evaluate = Counted(near(expected["1-sqrt@4"]))
    found = choose(run, evaluate, over="schedule", among=among, budget=4, at_once=9)
    assert [point.value for point in found.points] == list(expected)
    for point in found.points:
        np.testing.assert_allclose(point.coefficients, expected[point.value])
    assert evaluate.calls == found.evaluations == 4
    assert found.points[0].score == found.points[1].score
    assert found.best.value == "1-sqrt@4"
    with pytest.raises(ValueError, match="budget=3 is too small: it takes 4 for sched"):
        choose(run, evaluate, over="schedule", among=among, budget=3)


def test_several_at_once(run: Path):
    """One budget for all of them, and one average has one evaluation."""
    evaluate = Counted(near(last(5)))
    found = choose(run, evaluate, over=("last", "schedule", "alpha"), budget=26)
    assert {point.over for point in found.points} == {"last", "schedule", "alpha"}
    assert evaluate.calls == found.evaluations <= 26
    assert (found.best.over, found.best.value) == ("last", 5)
    scores = {(p.over, p.value): p.score for p in found.points}
    assert scores["schedule", "uniform"] == scores["last", 11]
    assert scores["alpha", 0.0] == scores["schedule", "uniform@6"]
    assert scores["last", 5] not in [v for k, v in scores.items() if k[0] != "last"]


@pytest.mark.long
def test_widths_and_windows_of_one_run(tmp_path: Path):
    """The snapshots give the one, the params of the same steps the other."""
    optimizer = ema_optax.ema_params(
        {"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}
    )
    params = {"w": jnp.zeros(2), "n": jnp.int32(0)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1, 41):
        _, state = update({"w": jnp.ones(2), "n": jnp.int32(0)}, state, params)
        params = {"w": params["w"] + 1, "n": jnp.int32(step)}
        if step % 4 == 0:
            checkpoint.save(tmp_path, params, state, step=step)
    found = choose(
        tmp_path, lambda p: float(abs(p["w"][0] - 37.0)), over=["width", "last"]
    )
    counts = [p.over for p in found.points]
    assert 3 <= counts.count("width") <= 6
    assert 3 <= counts.count("last") <= 6
    assert found.best.score == min(point.score for point in found.points)
    wide = choose(tmp_path, lambda p: float(abs(p["w"][0] - 33.3)), over="width")
    assert float(wide.tree["w"][0]) == pytest.approx(33.3, abs=0.3)
    assert int(wide.tree["n"]) == 40  # the whole model
    assert wide.best.exponents is not None


def test_an_old_checkpoint_that_diverged(tmp_path: Path):
    """It spoils no average that leaves it out, made in the same pass as others."""
    for i in range(6):
        w = jnp.full(7, jnp.inf) if i == 0 else jnp.asarray(VALUES[i])
        save(tmp_path, i, {"w": w})
    target = VALUES[4:6].astype(np.float64).mean(0)
    with pytest.warns(reconstruction.EvaluationWarning, match="last 6 failed"):
        found = choose(
            tmp_path,
            lambda p: float(np.sum((np.asarray(p["w"]) - target) ** 2)),
            over="last",
            at_once=8,
        )
    assert found.best.value == 2
    assert [p.value for p in found.points if p.failure] == [6]


def test_the_chosen_one_as_a_checkpoint(run: Path, tmp_path: Path):
    """With what it was made of, and how it was chosen."""
    out = tmp_path / "out"
    found = choose(run, near(last(4)), over="last", tree="shadow", out=out)
    restored = checkpoint.restore(out, "shadow")
    np.testing.assert_array_equal(restored["w"], found.tree["w"])
    described = checkpoint.describe(out)
    chosen = described.extra["chosen"]
    assert (chosen["run"], chosen["tree"], chosen["value"]) == ("run", "shadow", 4)
    assert chosen["steps"] == list(RUN_STEPS)
    np.testing.assert_allclose(chosen["coefficients"], last(4))
    assert described.step == RUN_STEPS[-1]
    checkpoint.verify(out)
    evaluate = Counted(near(last(4)))
    with pytest.raises(FileExistsError, match="holds steps already: 1100"):
        choose(run, evaluate, over="last", out=out)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        choose(run, evaluate, over="last", out=tmp_path / "file")
    assert evaluate.calls == 0
    choose(line(), best_at(0.1), out=tmp_path / "width", budget=3)
    decay = checkpoint.describe(tmp_path / "width").trees["shadow"].decay
    assert isinstance(decay, ema_optax.power)


def test_steps_that_change_while_they_are_read(tmp_path: Path):
    """The checksums tell, and the error names the step; the log has the rest."""
    held = np.random.default_rng(5).normal(size=(8, 64, 64)).astype(np.float32)
    for i in range(8):
        save(tmp_path / "run", i, {"w": jnp.asarray(held[i])})
    files = [path for path in (tmp_path / "run" / "700").rglob("*") if path.is_file()]
    large = [path for path in files if path.stat().st_size > 10_000]

    def evaluate(params: Any) -> float:
        for path in large:  # of params and of shadow
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        return float(np.asarray(params["w"])[0, 0])

    log = tmp_path / "log"
    with pytest.raises(checkpoint.CorruptCheckpointError, match="Step 700 of"):
        choose(tmp_path / "run", evaluate, over="last", at_once=1, log=log)
    assert len(log.read_text().splitlines()) == 2  # what it is of, and last 1


def test_two_runs_mixed(tmp_path: Path):
    """Other shapes, or other leaves, are an error that names the steps."""
    save(tmp_path, 0, at(0))
    save(tmp_path, 1, {"w": jnp.zeros((2, 3))})
    evaluate = Counted(near(last(4)))
    with pytest.raises(ValueError, match=r"'w' is .* step 100 and .* step 200"):
        choose(tmp_path, evaluate, over="last")
    other = [Snapshot(5, 6.94, {"v": np.zeros(1)})]
    with pytest.raises(ValueError, match=r"'[vw]' is only in the tree of step"):
        choose(line() + other, evaluate)
    with pytest.raises(ValueError, match="Two snapshots are of the same step 25"):
        choose(line() + line(2.0), evaluate)
    assert evaluate.calls == 0


# Logs.


def table(found: reconstruction.Choice) -> list[str]:
    return sorted(str(found).splitlines())


@pytest.mark.long
def test_a_choice_goes_on_wherever_it_was_stopped(run: Path, tmp_path: Path):
    """Ctrl-C at any evaluation: that alone is made again, with the same result."""
    settings = {"over": ("last", "alpha"), "budget": 10}
    whole = choose(run, near(last(6)), **settings)
    for stop in range(whole.evaluations):
        log = tmp_path / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            choose(run, Counted(near(last(6)), stop), log=log, **settings)
        assert len(log.read_text().splitlines()) == 1 + stop
        evaluate = Counted(near(last(6)))
        found = choose(run, evaluate, log=log, **settings)
        assert evaluate.calls == whole.evaluations - stop
        assert found.evaluations == whole.evaluations
        assert found.provenance == whole.provenance
        assert table(found) == table(whole)
        np.testing.assert_array_equal(found.tree["w"], whole.tree["w"])
    evaluate = Counted(near(last(6)))
    choose(run, evaluate, log=log, **settings)
    assert evaluate.calls == 0


def test_a_log_keeps_noise_and_failures(tmp_path: Path):
    """Samples for paired differences, errors, NaN; what raised is tried again."""
    log = tmp_path / "log"
    results = [[0.25, 0.5], RuntimeError("no disk"), math.nan, Score(0.5, 0.25)]

    def evaluate(params: Any) -> Any:
        result = results[evaluate.calls]
        evaluate.calls += 1
        if isinstance(result, RuntimeError):
            raise result
        return result

    evaluate.calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", reconstruction.EvaluationWarning)
        first = choose(line(), evaluate, budget=4, log=log)
        before = evaluate.calls
        raised = [p for p in first.points if "raised" in (p.failure or "")]
        second = choose(line(), Counted(lambda p: 9.0), budget=4, log=log)
    assert len(raised) == 1
    again = {p.value: p for p in second.points}
    assert again.pop(raised[0].value).score == 9.0
    for point in first.points:
        if point is not raised[0]:
            other = again[point.value]
            assert (other.samples, other.error) == (point.samples, point.error)
            assert other.failure == point.failure
    assert before == first.evaluations


def test_a_log_that_was_cut_off(run: Path, tmp_path: Path):
    """At any byte of its last line, or of its first: the rest is used."""
    log = tmp_path / "log"
    choose(run, near(last(3)), over="last", budget=3, log=log)
    content = log.read_bytes()
    first, ends = content.index(b"\n"), content.rindex(b"\n", 0, -1)
    for size, calls in ((0, 3), (5, 3), (first, 3), (ends + 1, 1), (len(content), 0)):
        log.write_bytes(content[:size])
        evaluate = Counted(near(last(3)))
        choose(run, evaluate, over="last", budget=3, log=log)
        assert evaluate.calls == calls
        assert log.read_bytes() == content
    for size in range(ends + 2, len(content), 9):
        log.write_bytes(content[:size])
        reconstruction.choose(run, near(last(3)), over="last", budget=3, log=log)
        assert log.read_bytes() == content


@pytest.mark.long
def test_a_log_of_something_else(run: Path, tmp_path: Path):
    """Another source, other things chosen, another file: refused, and left alone."""
    log = tmp_path / "log"
    choose(line(), best_at(0.1), budget=3, log=log)
    before = log.read_bytes()
    evaluate = Counted(best_at(0.1))
    for source, over in ((line(1.5), "width"), (line()[2:], "width"), (run, "last")):
        with pytest.raises(ValueError, match="the log of another choice, over width"):
            choose(source, evaluate, over=over, log=log)
    assert log.read_bytes() == before
    for content in (b"my notes\n", b"my notes", b'{"a": 1}\n', b"[]\n", b"\xff\x00\n"):
        log.write_bytes(content)
        with pytest.raises(ValueError, match="is a file of something else"):
            choose(line(), evaluate, log=log)
        assert log.read_bytes() == content
    bad = [b"{}", b"[1]", b"nonsense", b'{"over": "width", "value": [1], "score": 1}']
    bad += [b'{"over": "width", "value": 0.1, "score": "1"}', b"[" * 10**5]
    bad += [b'{"over": "width", "value": 0.1, "score": 1, "error": -1}']
    bad += [b'{"over": "width", "value": 0.1, "samples": [1]}']
    for content in bad:
        log.write_bytes(before + content + b"\n")
        with pytest.raises(ValueError, match=r"Line 5 of .* is no evaluation"):
            choose(line(), evaluate, log=log)
    with pytest.raises(ValueError, match="is no file of evaluations"):
        choose(line(), evaluate, log=tmp_path)
    with pytest.raises(FileNotFoundError):
        choose(line(), evaluate, log=tmp_path / "none" / "log")
    assert evaluate.calls == 0


def test_a_larger_budget_goes_on(tmp_path: Path):
    """What was tried is a part of the larger search."""
    log = tmp_path / "log"
    small = choose(line(), best_at(0.07), budget=5, log=log)
    evaluate = Counted(best_at(0.07))
    large = choose(line(), evaluate, budget=15, log=log)
    assert evaluate.calls == large.evaluations - small.evaluations
    assert {p.value for p in small.points} <= {p.value for p in large.points}
    assert large.best.score <= small.best.score
    few = choose(line(), evaluate, budget=15, log=log, between=(0.05, 0.09))
    assert all(0.05 <= point.value <= 0.09 for point in few.points)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 2}, "budget must be a whole number ≥ 3, got 2"),
        ({"over": "widht"}, "over='widht' is none of .* The nearest are 'width'"),
        ({"over": ("width", "width")}, "has a name twice"),
        ({"over": "last"}, "Snapshots are averages already"),
        ({"at_once": 0}, "at_once must be a whole number ≥ 1"),
        ({"between": (0.1, 0.05)}, "low < high"),
        ({"between": (0.1, math.nan)}, "low < high"),
        ({"between": (0.1,)}, "low < high"),
        ({"among": ["uniform"]}, "has no 'schedule'"),
    ],
)
def test_arguments_of_snapshots(settings: Any, said: str):
    evaluate = Counted(best_at(0.1))
    with pytest.raises(ValueError, match=said):
        choose(line(), evaluate, **settings)
    assert evaluate.calls == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"over": "width"}, "has no shadows with a power profile"),
        ({"over": "last", "between": (0, 5)}, "outside the numbers of checkpoints"),
        ({"over": "last", "between": (2, 12)}, "outside the numbers .* from 1 to 11"),
        ({"over": "last", "between": (1.5, 5)}, "whole numbers of checkpoints"),
        ({"over": "alpha", "between": (0, math.inf)}, "outside the numbers"),
        ({"over": ("last", "alpha"), "between": (1, 2)}, "over has 2 of them"),
        ({"over": "schedule", "between": (1, 2)}, "over has 0 of them"),
        ({"over": "schedule", "among": ["sqrt"]}, "no schedule 'sqrt'.*'1-sqrt'"),
        ({"over": "schedule", "among": ["linear@12"]}, "last N .* from 1 to 11"),
        ({"over": "schedule", "among": ["linear@"]}, "last N .* from 1 to 11"),
        ({"over": "schedule", "among": ["ema:1.5"]}, "ema:β keeps the share"),
        ({"over": "last", "tree": "shdow"}, "no tree 'shdow'"),
        ({"over": ("last", "schedule", "alpha")}, "budget=12 is too small"),
    ],
)
def test_arguments_of_runs(run: Path, settings: Any, said: str):
    evaluate = Counted(near(last(3)))
    with pytest.raises(ValueError, match=said):
        choose(run, evaluate, **settings)
    assert evaluate.calls == 0


def test_sources_that_are_none(tmp_path: Path):
    with pytest.raises(TypeError, match="choose takes the folder of a run, or Snap"):
        choose([], best_at(0.1))
    with pytest.raises(TypeError, match="choose takes the folder of a run, or Snap"):
        choose([{"w": np.ones(2)}], best_at(0.1))
    with pytest.raises(TypeError, match="evaluate is a function"):
        choose(line(), 0.5)
    with pytest.raises(FileNotFoundError):
        choose(tmp_path / "none", best_at(0.1), over="last")
    with pytest.raises(FileNotFoundError):
        choose(tmp_path, best_at(0.1), over="last")
    save(tmp_path, 0, at(0))
    for over in ("last", "schedule", "alpha"):
        with pytest.raises(ValueError, match="two steps at least; there is 1, 10"):
            choose(tmp_path, best_at(0.1), over=over)
    widest = Snapshot(9, ema_optax.exponent_from_width(0.2886), {"w": np.ones(1)})
    with pytest.raises(ValueError, match="give no range of widths"):
        choose([widest], best_at(0.1))


def test_text():
    """A table of all points, the best and what is tied to it marked."""
    found = choose(line(), lambda p: round(best_at(0.07)(p), 1), budget=12)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.points)
    assert sum(line.endswith("<- best") for line in lines) == 1
    assert sum(line.endswith("tie") for line in lines) == len(found.ties)


# On a model.


@pytest.mark.once
def test_digits():
    """The best of twenty widths tracked in the run, from two of others, within noise.

    A width that is far off is told apart by the same noise.
    """
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    from flax import nnx

    from ema_optax import digits

    widths, tracked, steps, every = np.geomspace(0.02, 0.24, 20), (0.05, 0.1), 600, 10
    data = digits.load(0)
    _, state = nnx.split(digits.Classifier(rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(state)
    names = {f"{w}": ema_optax.power(w) for w in (*widths, *tracked)}
    optimizer = optax.chain(optax.sgd(0.1, 0.9), ema_optax.ema_params(names))
    rng = np.random.default_rng(1)
    chosen = rng.integers(len(data.train_labels), size=(steps, 32))
    noise = rng.standard_normal((steps, 32, 64), dtype=np.float32)
    images, labels = data.train_images[chosen] + 0.3 * noise, data.train_labels[chosen]

    def losses(params: Any, x: Any, y: Any) -> Any:
        hidden = jax.nn.relu(
            x @ params["hidden"]["kernel"] + params["hidden"]["bias"],
        )
        logits = hidden @ params["logits"]["kernel"] + params["logits"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        gradients = jax.grad(lambda p: losses(p, *batch).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    advance = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0])
    carry, snapshots = (params, optimizer.init(params)), []

    def shadow(width: float) -> Any:
        return ema_optax.shadow_params(carry[1], carry[0], name=f"{width}")

    for i in range(0, steps, every):
        carry = advance(carry, (images[i : i + every], labels[i : i + every]))
        for width in tracked:
            exponent = ema_optax.exponent_from_width(width)
            tree = jax.tree.map(np.asarray, shadow(width))
            snapshots.append(Snapshot(i + every, exponent, tree))
    test = jax.jit(lambda p: losses(p, data.test_images, data.test_labels))
    found = choose(snapshots, test)
    assert found.evaluations <= 12
    direct = [np.asarray(test(shadow(width)), np.float64) for width in widths]
    best, worst = (f(direct, key=np.mean) for f in (min, max))
    mine = np.asarray(test(found.tree), np.float64)
    assert np.mean(mine - best) <= 2 * np.std(mine - best, ddof=1) / len(mine) ** 0.5
    assert np.mean(worst - mine) > 2 * np.std(worst - mine, ddof=1) / len(mine) ** 0.5
