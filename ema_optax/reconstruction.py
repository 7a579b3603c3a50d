"""Chooses the length of an average after training, and merges checkpoints.

snapshots = checkpoint.snapshots(folder)
found = reconstruction.reconstruct(snapshots, width=0.03, params=params)
found.tree, found.profile_error

chosen = reconstruction.choose(folder, evaluate, over="width")
chosen.best, chosen.ties, chosen.tree
"""

from ema_optax._reconstruction.choices import Choice, Point
from ema_optax._reconstruction.choosing import choose
from ema_optax._reconstruction.extrapolation import extrapolated
from ema_optax._reconstruction.merging import merge
from ema_optax._reconstruction.planning import Plan, plan
from ema_optax._reconstruction.projection import (
    coefficients,
    profile_error,
    rounding_variance,
)
from ema_optax._reconstruction.schedules import schedule_coefficients
from ema_optax._reconstruction.scores import EvaluationWarning, Score
from ema_optax._reconstruction.souping import Soup, soup
from ema_optax._reconstruction.sums import Source
from ema_optax._reconstruction.weights import (
    decay_coefficients,
    lr_decay,
    lr_decay_coefficients,
    noise_gain,
    uniform_coefficients,
)
from ema_optax._reconstruction.widths import (
    Reconstruction,
    ReconstructionWarning,
    Snapshot,
    reachable,
    reconstruct,
)

__all__ = [
    "Choice",
    "EvaluationWarning",
    "Plan",
    "Point",
    "Reconstruction",
    "ReconstructionWarning",
    "Score",
    "Snapshot",
    "Soup",
    "Source",
    "choose",
    "coefficients",
    "decay_coefficients",
    "extrapolated",
    "lr_decay",
    "lr_decay_coefficients",
    "merge",
    "noise_gain",
    "plan",
    "profile_error",
    "reachable",
    "reconstruct",
    "rounding_variance",
    "schedule_coefficients",
    "soup",
    "uniform_coefficients",
]
