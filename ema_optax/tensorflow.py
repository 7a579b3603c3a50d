"""TensorFlow: params and average of a TF1 or TF2 checkpoint.

ema_optax.tensorflow.import_checkpoint("old_run/model.ckpt-300000", "imported")
"""

from ema_optax._interop.tensorflow_checkpoints import Imported, import_checkpoint

__all__ = ["Imported", "import_checkpoint"]
