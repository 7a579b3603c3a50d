"""Other formats: checkpoints go out as safetensors and come in from TensorFlow.

    interop.export_safetensors("run", "model.safetensors", dtype="bfloat16")
    interop.import_tensorflow("old_run/model.ckpt-300000", "imported")

What a format needs is imported when its function is called.
"""

from ema_optax.interop.safetensors_files import Exported, export_safetensors
from ema_optax.interop.tensorflow_checkpoints import Imported, import_tensorflow

__all__ = ["Exported", "Imported", "export_safetensors", "import_tensorflow"]
