"""Model libraries and other formats: NNX, Keras, statistics, PyTorch, TensorFlow.

    with interop.swapped(model, optimizer):
        evaluate(model)

    params, rest = interop.keras_split(model)
    variables = interop.refresh_batch_stats(apply_fn, variables, batches)
    interop.export_safetensors("run", "model.safetensors", dtype="bfloat16")
    interop.import_torch("last.ckpt", "imported", layout="lightning")
    interop.import_tensorflow("old_run/model.ckpt-300000", "imported")

What a library or a format needs is imported when its function is called.
"""

from ema_optax._interop.batch_stats import refresh_batch_stats
from ema_optax._interop.export_plan import Tensor
from ema_optax._interop.keras_models import (
    KerasAverage,
    keras_average,
    keras_split,
    keras_swapped,
    keras_update,
)
from ema_optax._interop.moves import Move
from ema_optax._interop.nnx_modules import (
    nnx_split,
    nnx_update,
    refresh_nnx_batch_stats,
    shadow_copy,
    swapped,
)
from ema_optax._interop.rules import Rule, Rules, read_rules
from ema_optax._interop.safetensors_files import Exported, export_safetensors
from ema_optax._interop.safetensors_sources import TensorTree, stored_safetensors
from ema_optax._interop.tensorflow_checkpoints import Imported, import_tensorflow
from ema_optax._interop.torch_import import ImportedLeaf, ImportedTorch, import_torch

__all__ = [
    "Exported",
    "Imported",
    "ImportedLeaf",
    "ImportedTorch",
    "KerasAverage",
    "Move",
    "Rule",
    "Rules",
    "Tensor",
    "TensorTree",
    "export_safetensors",
    "import_tensorflow",
    "import_torch",
    "keras_average",
    "keras_split",
    "keras_swapped",
    "keras_update",
    "nnx_split",
    "nnx_update",
    "read_rules",
    "refresh_batch_stats",
    "refresh_nnx_batch_stats",
    "shadow_copy",
    "stored_safetensors",
    "swapped",
]
