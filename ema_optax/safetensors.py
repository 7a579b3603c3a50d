"""Safetensors: exports a tree of a checkpoint, and opens files as sources to merge.

ema_optax.safetensors.export("run", "model.safetensors", dtype="bfloat16")
sources = [ema_optax.safetensors.stored(file) for file in files]
"""

from ema_optax._interop.export_plan import Tensor
from ema_optax._interop.safetensors_files import Exported, export
from ema_optax._interop.safetensors_sources import TensorTree, stored

__all__ = ["Exported", "Tensor", "TensorTree", "export", "stored"]
