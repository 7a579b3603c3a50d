"""Averages of other libraries, from their formulas, and the decays of ours that match.

Each formula is what a library multiplies its old average by at its t-th call, written
down in float64 from its documentation and source; nothing of ours is in it.
"""

import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "settings.md"
STEPS = 400
B = 0.97  # reached by every warm-up within these steps, so that the caps are seen
N = 50  # where an average starts late
TAU = 60.0


def tensorflow(t, num_updates=None):
    """tf.train.ExponentialMovingAverage(β, num_updates)."""
    return B if num_updates is None else min(B, (1 + num_updates) / (10 + num_updates))


def keras(t):
    """use_ema=True: the momentum counts from the second step on."""
    iterations = t - 1
    return B * (iterations != 0)


def torch_swa(t):
    """AveragedModel without a function: a copy, then w/(n+1) of the newest."""
    n_averaged = t - 1
    return 1 - 1 / (n_averaged + 1)


def torch_ema(t):
    """get_ema_multi_avg_fn(β), inside of an AveragedModel, whose first call copies."""
    return 0.0 if t == 1 else B


def timm(t, use_warmup=False, update_after_step=0, gamma=1.0, power=2 / 3, low=0.0):
    """ModelEmaV3(decay=β).update(model, step=t)."""
    step = max(0, t - update_after_step - 1)
    if step == 0:
        return 0.0
    if not use_warmup:
        return B
    return max(min(1 - (1 + step / gamma) ** -power, B), low)


def diffusers(t, use_ema_warmup=False, update_after_step=0, low=0.0):
    """EMAModel(params, decay=β): two warm-ups, one step behind; the first copies."""
    step = max(0, t - update_after_step - 1)
    if step == 0:
        return 0.0
    value = 1 - (1 + step) ** (-2 / 3) if use_ema_warmup else (1 + step) / (10 + step)
    return max(min(value, B), low)


def ema_pytorch(t, update_after_step=100, update_every=1, beta=B):
    """EMA(model, beta=β): folds at calls 1, 1 + k, …, and keeps all at the others."""
    if (t - 1) % update_every:
        return 1.0
    epoch = max(t - update_after_step - 1, 0)
    return min(1 - (1 + epoch) ** (-2 / 3), beta) if epoch > 0 else 0.0


def ema_pytorch_post_hoc(t, gamma):
    """One average of PostHocEMA: its counter is one ahead of its calls."""
    return 0.0 if t == 1 else (1 - 1 / (t + 1)) ** (1 + gamma)


def kauldron(t, debias=True):
    """ema_params(decay=β): what is called debias is TensorFlow's warm-up."""
    return min(B, (1 + t) / (10 + t)) if debias else B


def haiku(t):
    """EMAParamsTree(β): an average from 0, over 1 − β^t; the decay of that quotient."""
    return B * (1 - B ** (t - 1)) / (1 - B**t)


def yolo(t):
    """ModelEMA(decay=β, tau=τ)."""
    return B * (1 - math.exp(-t / TAU))


# As docs/settings.md has them: what to write instead, and the formula that it meets.
EQUAL = {
    "TensorFlow `ExponentialMovingAverage(β)`": ("constant(β)", tensorflow),
    "… with `num_updates=t`": (
        "warmup(β)",
        lambda t: tensorflow(t, num_updates=t),
    ),
    "Keras `ema_momentum=β`": ("start_after(constant(β), 1)", keras),
    "PyTorch `AveragedModel(model)`": ("uniform()", torch_swa),
    "… with `get_ema_multi_avg_fn(β)`": ("start_after(constant(β), 1)", torch_ema),
    "timm `ModelEmaV3(decay=β)`": ("start_after(constant(β), 1)", timm),
    "… with `use_warmup=True`": (
        "inverse_power(β)",
        lambda t: timm(t, use_warmup=True),
    ),
    "diffusers `EMAModel(decay=β)`": ("start_after(warmup(β), 1)", diffusers),
    "… with `use_ema_warmup=True`": (
        "inverse_power(β)",
        lambda t: diffusers(t, use_ema_warmup=True),
    ),
    "ema-pytorch `EMA(beta=β, update_every=1)`": (
        "start_after(inverse_power(β), 100)",
        ema_pytorch,
    ),
    "… with `update_after_step=0`": (
        "inverse_power(β)",
        lambda t: ema_pytorch(t, update_after_step=0),
    ),
    "kauldron `ema_params(decay=β)`": ("warmup(β)", kauldron),
    "… with `debias=False`": ("constant(β)", lambda t: kauldron(t, debias=False)),
    "Haiku `EMAParamsTree(β)`": ("debiased(β)", haiku),
    "YOLO `ModelEMA(decay=β, tau=τ)`": ("ramp(β, τ)", yolo),
}
# Arguments that the table leaves out.
ALSO_EQUAL = {
    "timm, every argument": (
        "start_after(inverse_power(β, 3.0, 0.75, 0.2), n)",
        lambda t: timm(t, True, N, gamma=3.0, power=0.75, low=0.2),
    ),
    "timm, later": (
        "start_after(constant(β), n + 1)",
        lambda t: timm(t, update_after_step=N),
    ),
    "diffusers, later": (
        "start_after(warmup(β), n + 1)",
        lambda t: diffusers(t, update_after_step=N),
    ),
    "diffusers' warm-up, later": (
        "start_after(inverse_power(β), n)",
        lambda t: diffusers(t, True, update_after_step=N),
    ),
    "diffusers, min_decay": (
        "start_after(inverse_power(β, min_decay=β), n)",
        lambda t: diffusers(t, update_after_step=N, low=B),
    ),
}


def decay_of(text):
    """Returns the decay that the table calls so."""
    names = {name: getattr(ema_optax, name) for name in ema_optax.__all__}
    return eval(text, names | {"β": B, "τ": TAU, "n": N})


@pytest.mark.parametrize("theirs", EQUAL | ALSO_EQUAL)
def test_a_setting_of_another_library_and_ours_are_one_decay(theirs):
    """β for β over 400 updates: a count that is one off fails at the first of them."""
    text, formula = (EQUAL | ALSO_EQUAL)[theirs]
    expected = np.array([formula(t) for t in range(1, STEPS + 1)])
    found = decay_of(text)(np.arange(1, STEPS + 1))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert expected[-1] == pytest.approx(B) or theirs.startswith(("PyTorch", "YOLO"))


def test_a_table_of_wrong_rows_would_fail():
    """The tempting translations are off by far more than the tolerance."""
    steps = np.arange(1, STEPS + 1)
    for tempting, formula in [
        ("warmup(β)", diffusers),
        ("constant(β)", keras),
        ("constant(β)", torch_ema),
        ("debiased(β)", kauldron),
        ("inverse_power(β)", ema_pytorch),
    ]:
        apart = decay_of(tempting)(steps) - np.array([formula(t) for t in steps])
        assert np.abs(apart).max() > 0.05, tempting


# Rows of the page whose library computes what another one does.
BY_HAND = "TensorFlow `ExponentialMovingAverage(β)`"
ALIKE = {
    "Lightning `EMAWeightAveraging(decay=β)`": "… with `get_ema_multi_avg_fn(β)`",
    "Optax by hand, openpi": BY_HAND,
    "Flax `nnx.EMA(decay=β)`": BY_HAND,
    "Levanter `EmaModelAveragingConfig(beta=β)`": BY_HAND,
    "axlearn `decay_bias_correction(β)`": "Haiku `EMAParamsTree(β)`",
}


@pytest.mark.skipif(not PAGE.exists(), reason="the pages travel with the source")
def test_the_page_has_these_rows():
    """Each decay that stands there is one of those tested, and none is missing.

    The names of libraries are links to sections of the page.
    """
    table = PAGE.read_text().split("| elsewhere |")[1].split("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        row = re.sub(r"\[(.*?)\]\(#.*?\)", r"\1", row)
        theirs, ours, options = (cell.strip() for cell in row.strip("|").split("|"))
        found[theirs] = ours.strip("`")
        if options:
            option, ours = options.split(": ")
            found[f"… with {option}"] = ours.strip("`")
    overwrite = found.pop("… with `ema_overwrite_frequency=N`")
    assert overwrite == "overwrite_every=N"  # tested below
    assert found.pop("`optax.ema`") == "none: it averages updates"
    assert found.pop("… with `WeightAveraging`") == "as `AveragedModel"  # stripped
    assert (
        found.pop("torchtitan `half_life_fraction=f`") == "fraction(f)"
    )  # 2^(−1/(f·t))
    tested = {theirs: text for theirs, (text, _) in EQUAL.items()}
    alike = {row: tested[equal] for row, equal in ALIKE.items()}
    assert found == tested | alike


@pytest.mark.long
def test_keras_overwrites_its_variables_with_the_average():
    """ema_overwrite_frequency=N is overwrite_every=N: weights and average are the same.

    Each step adds a number to whatever the variables hold.
    """
    pushes = np.random.default_rng(0).normal(size=STEPS)
    theirs_w = average = 5.0
    ours = ema_optax.ema_params(
        decay_of("start_after(constant(β), 1)"), overwrite_every=N
    )
    params = jnp.float32(5)
    state = ours.init(params)
    for t, push in enumerate(pushes, start=1):
        theirs_w += push
        average = keras(t) * average + (1 - keras(t)) * theirs_w
        if t % N == 0:
            theirs_w = average
        updates, state = ours.update(jnp.float32(push), state, params)
        params = optax.apply_updates(params, updates)
        found = [params, ema_optax.shadow_params(state, params)]
        # Sums of 400 float32 numbers; one overwrite missed is off by about 1.
        np.testing.assert_allclose(found, [theirs_w, average], atol=2e-5)


def mean_age(betas):
    """Returns the mean age after decays β_1 … β_T: what is kept is one update older."""
    age = 0.0
    for beta in betas:
        age = beta * (age + 1)
    return age


def test_ema_pytorch_folds_ten_updates_at_the_decay_of_one():
    """Its defaults average ten times as long as their β says; ours can come near.

    It folds at calls 1, 11, …, ours at updates 10, 20, …: hence near, not equal.
    """
    steps, beta = 20_000, 0.999
    theirs = mean_age([ema_pytorch(t, 100, 10, beta) for t in range(1, steps + 1)])
    inner = ema_optax.inverse_power(beta)
    slower = ema_optax.start_after(ema_optax.scale_to_batch(inner, 0.1), 100)
    near = ema_optax.profile(slower, steps, every=10).mean_age
    same_beta = ema_optax.start_after(inner, 100)
    literal = ema_optax.profile(same_beta, steps, every=10).mean_age
    assert near == pytest.approx(theirs, rel=0.02)
    assert theirs > 7 * literal


def test_ema_pytorchs_post_hoc_average_is_one_update_ahead():
    """At its t-th call it has the decay that a power function has at t + 1."""
    decay = ema_optax.power(0.1)
    gamma = ema_optax.exponent_from_width(0.1)
    for t in range(2, STEPS):
        theirs = ema_pytorch_post_hoc(t, gamma)
        assert decay(t + 1) == pytest.approx(theirs, rel=1e-12)


# What docs/decays.md says about choosing.


def test_a_length_in_samples_or_epochs():
    """Half-lives in updates are those in samples over the batch size."""
    assert round(500_000 / 256) == 1953
    decay = ema_optax.half_life(500_000 / 256)
    assert round(decay(1), 6) == 0.999645
    assert decay(1) ** (500_000 / 256) == pytest.approx(0.5, rel=1e-12)
    # Half an epoch of 1.28 million images at batches of 1,024.
    assert round(0.5 * 1_280_000 / 1024) == 625


def test_a_batch_four_times_as_large():
    """β⁴ keeps after one update what β kept after four."""
    scaled = ema_optax.scale_to_batch(ema_optax.constant(0.9999), 4)
    assert round(scaled(1), 6) == 0.9996
    assert scaled(1) == pytest.approx(0.9999**4, rel=1e-12)
    # A half-life in samples is scaled by being one.
    again = ema_optax.half_life(500_000 / (4 * 256))
    first = ema_optax.scale_to_batch(ema_optax.half_life(500_000 / 256), 4)
    assert first(1) == pytest.approx(again(1), rel=1e-12)


@pytest.mark.parametrize(
    ("steps", "beta"), [(10_000, 0.99), (100_000, 0.999), (1_000_000, 0.9999)]
)
def test_one_percent_of_the_run(steps: int, beta: float):
    """A window of 1/(1−β) updates is a hundredth of these runs."""
    assert 1 / (1 - beta) == pytest.approx(steps / 100)
    run = ema_optax.profile(ema_optax.constant(beta), min(steps, 100_000))
    assert run.mean_age == pytest.approx(steps / 100, rel=0.011)
    assert run.initial_weight < 5e-5


@pytest.mark.parametrize(
    ("width", "age"), [(0.05, 0.053), (0.10, 0.112), (0.15, 0.180), (0.20, 0.261)]
)
def test_power_widths_as_mean_ages(width: float, age: float):
    """The mean age is 1/(γ+2) of the run, whatever its length."""
    exponent = ema_optax.exponent_from_width(width)
    assert round(1 / (exponent + 2), 3) == age
    for steps in (2_000, 20_000):
        run = ema_optax.profile(ema_optax.power(width), steps)
        # A sum for the integral: off by half an update.
        assert run.mean_age / steps == pytest.approx(age, abs=6e-4 + 1 / steps)
