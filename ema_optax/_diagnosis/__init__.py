"""Explains why an average is worse than the raw weights, with remedies."""

from ema_optax._diagnosis.diagnosing import diagnose
from ema_optax._diagnosis.findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
