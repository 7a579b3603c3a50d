"""Rules between two formats' names and axes; and the old names of partner modules.

    rules = [interop.Rule("**.weight", "**/kernel", "o i -> i o")]

Each partner has a module of its own. This version keeps the old names of these here:

    swapped, shadow_copy          ema_optax.nnx.swapped, .shadow_copy
    nnx_split, nnx_update         ema_optax.nnx.split, .update
    refresh_nnx_batch_stats       ema_optax.nnx.refresh_batch_stats
    refresh_batch_stats           ema_optax.linen.refresh_batch_stats
    keras_split, keras_update     ema_optax.keras.split, .update
    keras_average, keras_swapped  ema_optax.keras.average, .swapped
    KerasAverage                  ema_optax.keras.KerasAverage
    export_safetensors            ema_optax.safetensors.export
    stored_safetensors            ema_optax.safetensors.stored
    Exported, Tensor, TensorTree  ema_optax.safetensors.Exported, .Tensor, .TensorTree
    import_torch                  ema_optax.torch.import_checkpoint
    ImportedTorch, ImportedLeaf   ema_optax.torch.ImportedTorch, .ImportedLeaf
    import_tensorflow             ema_optax.tensorflow.import_checkpoint
    Imported                      ema_optax.tensorflow.Imported
"""

from ema_optax._interop.batch_stats import refresh_batch_stats
from ema_optax._interop.export_plan import Tensor
from ema_optax._interop.keras_models import KerasAverage
from ema_optax._interop.keras_models import average as keras_average
from ema_optax._interop.keras_models import split as keras_split
from ema_optax._interop.keras_models import swapped as keras_swapped
from ema_optax._interop.keras_models import update as keras_update
from ema_optax._interop.moves import Move
from ema_optax._interop.nnx_modules import (
    refresh_batch_stats as refresh_nnx_batch_stats,
)
from ema_optax._interop.nnx_modules import shadow_copy, swapped
from ema_optax._interop.nnx_modules import split as nnx_split
from ema_optax._interop.nnx_modules import update as nnx_update
from ema_optax._interop.rules import Rule, Rules, read_rules
from ema_optax._interop.safetensors_files import Exported
from ema_optax._interop.safetensors_files import export as export_safetensors
from ema_optax._interop.safetensors_sources import TensorTree
from ema_optax._interop.safetensors_sources import stored as stored_safetensors
from ema_optax._interop.tensorflow_checkpoints import Imported
from ema_optax._interop.tensorflow_checkpoints import (
    import_checkpoint as import_tensorflow,
)
from ema_optax._interop.torch_import import ImportedLeaf, ImportedTorch
from ema_optax._interop.torch_import import import_checkpoint as import_torch

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
