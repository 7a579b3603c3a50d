"""The figures of averages that snapshots give, planned and printed."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ema_optax import reconstruction
from ema_optax._cli import parsing
from ema_optax._decays.power_profiles import exponent_from_width, width_from_exponent
from ema_optax._reconstruction.projection import DOUBTFUL, WRONG, fit
from ema_optax.reconstruction import Snapshot


@dataclasses.dataclass(frozen=True)
class Row:
    """An average of one width.

    Attributes:
        width: Standard deviation of its weights over the run (sigma_rel).
        profile_error: Distance of its weights from the wanted ones.
        noise_gain: Factor on the rounding error of the snapshots.
        directory: The folder to write to; None in a dry run without `--out`.
    """

    width: float
    profile_error: float
    noise_gain: float
    directory: str | None


@dataclasses.dataclass
class Plan:
    """Averages that snapshots give at a step.

    Attributes:
        step: The step that the averages end at.
        snapshots: The snapshots up to that step.
        rows: An average for each width.
        available: All snapshots of the runs, the later ones too.
        whole: Whether the results are whole models.
    """

    step: int
    snapshots: Sequence[Snapshot]
    rows: list[Row]
    available: Sequence[Snapshot]
    whole: bool = False

    @property
    def tracked(self) -> list[float]:
        """The widths of the snapshots."""
        exponents = {snapshot.exponent for snapshot in self.snapshots}
        return sorted(round(width_from_exponent(g), 6) for g in exponents)

    @property
    def dtypes(self) -> list[str]:
        """The names of the dtypes that the snapshots were rounded to."""
        return sorted({jnp.dtype(s.dtype).name for s in self.snapshots})

    def reachable(self) -> tuple[float, float] | None:
        """Finds the narrowest and the widest width without a warning, if any."""
        steps, exponents, ridge = _numbers(self.snapshots)
        return reconstruction.reachable(steps, exponents, self.step, ridge=ridge)

    def check(self) -> None:
        """Raises the ValueError of `reconstruct` for a width that it would refuse."""
        bad = [row.width for row in self.rows if row.profile_error > WRONG]
        if bad:
            reconstruction.reconstruct(self.available, width=bad, step=self.step)


def plan(
    snapshots: Sequence[Snapshot],
    step: int,
    widths: Sequence[float],
    out: str | None,
) -> Plan:
    """Computes the figures that `reconstruct` will give, without reading an array.

    Raises:
        ValueError: If the step is outside what the snapshots give.
    """
    used = [s for s in snapshots if s.step <= step]
    if not used or step > snapshots[-1].step:
        # Raises, and names the steps that the snapshots give.
        reconstruction.reconstruct(snapshots, width=widths, step=step)
    steps, exponents, ridge = _numbers(used)
    wanted = [exponent_from_width(width) for width in widths]
    coefficients, errors = fit(steps, exponents, wanted, step, ridge=ridge)
    folders = [out and f"{out.rstrip('/') or '/'}/width-{width}" for width in widths]
    gains = np.linalg.norm(coefficients, axis=0).tolist()
    rows = list(map(Row, widths, errors.tolist(), gains, folders))
    return Plan(step, used, rows, snapshots)


def show(plan: Plan, *, as_json: bool, reach: bool = False) -> None:
    """Prints the figures as a table or as JSON.

    Args:
        plan: The averages that were written, or could be.
        as_json: Whether to print JSON instead of a table.
        reach: Whether to print the range of widths without a warning too.
    """
    widths = plan.reachable() if reach else None
    steps = sorted({snapshot.step for snapshot in plan.snapshots})
    if as_json:
        figures = {
            "step": plan.step,
            "snapshots": len(plan.snapshots),
            "snapshot_steps": steps,
            "snapshot_dtypes": plan.dtypes,
            "tracked": plan.tracked,
            "whole_model": plan.whole,
            "averages": [dataclasses.asdict(row) for row in plan.rows],
        }
        if reach:
            figures["reachable"] = widths
        parsing.print_json(figures)
        return
    tracked = ", ".join(f"{width:g}" for width in plan.tracked)
    print(
        f"Averages at step {plan.step:,}, from {len(plan.snapshots):,} snapshots\n"
        f"  of width {tracked} in {', '.join(plan.dtypes)}, "
        f"at {len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}"
    )
    if reach:
        subject = (
            "No width has"
            if widths is None
            else "Widths from {:.3g} to {:.3g} have".format(*widths)
        )
        print(f"{subject} a profile error of at most {DOUBTFUL:.0%}.")
    print()
    head = f"{'width':>8}{'profile error':>15}{'noise gain':>12}"
    print(head + "  folder" if plan.rows[0].directory else head)
    for row in plan.rows:
        error = "< 0.01%" if row.profile_error < 5e-5 else f"{row.profile_error:.2%}"
        line = f"{row.width:>8g}{error:>15}{row.noise_gain:>12.2f}"
        if row.directory is not None:
            line += f"  {parsing.printable(row.directory)}/{plan.step}"
        print(line)
    content = (
        "Each is the whole model, with the params of that step."
        if plan.whole
        else "Each has the averaged leaves alone: no RUN has params of that step."
    )
    print(f"\n{content}", flush=True)


def _numbers(
    snapshots: Sequence[Snapshot],
) -> tuple[list[float], list[float], float]:
    """Returns the steps, the exponents and the ridge that `fit` takes."""
    steps = [s.step for s in snapshots]
    ridge = max(reconstruction.rounding_variance(s.dtype) for s in snapshots)
    return steps, [s.exponent for s in snapshots], ridge
