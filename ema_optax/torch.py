"""PyTorch: params and average of a training checkpoint or a safetensors file.

ema_optax.torch.import_checkpoint("last.ckpt", "imported", layout="lightning")
"""

from ema_optax._interop.torch_import import (
    ImportedLeaf,
    ImportedTorch,
    import_checkpoint,
)

__all__ = ["ImportedLeaf", "ImportedTorch", "import_checkpoint"]
