"""Model libraries and other formats: NNX, Keras, statistics, safetensors, TensorFlow.

    with interop.swapped(model, optimizer):
        evaluate(model)

    params, rest = interop.keras_split(model)
    variables = interop.refresh_batch_stats(apply_fn, variables, batches)
    interop.export_safetensors("run", "model.safetensors", dtype="bfloat16")
    interop.import_tensorflow("old_run/model.ckpt-300000", "imported")

What a library or a format needs is imported when its function is called.
"""

from ema_optax.interop.batch_stats import refresh_batch_stats
from ema_optax.interop.keras_models import (
    KerasAverage,
    keras_average,
    keras_split,
    keras_swapped,
    keras_update,
)
from ema_optax.interop.nnx_modules import (
    nnx_split,
    nnx_update,
    refresh_nnx_batch_stats,
    shadow_copy,
    swapped,
)
from ema_optax.interop.safetensors_files import Exported, export_safetensors
from ema_optax.interop.tensorflow_checkpoints import Imported, import_tensorflow

__all__ = [
    "Exported",
    "Imported",
    "KerasAverage",
    "export_safetensors",
    "import_tensorflow",
    "keras_average",
    "keras_split",
    "keras_swapped",
    "keras_update",
    "nnx_split",
    "nnx_update",
    "refresh_batch_stats",
    "refresh_nnx_batch_stats",
    "shadow_copy",
    "swapped",
]
