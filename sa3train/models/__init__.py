"""The models: diffusion transformer, SAME autoencoder, conditioners, and loading their checkpoints.

What they compute: docs/model.md. Names and shapes of parameters are those of the released files.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.models.autoencoder import Autoencoder
    from sa3train.models.checkpoint import StableAudio3, load_autoencoder, load_checkpoint
    from sa3train.models.hub import REGISTRY

__all__ = ["REGISTRY", "Autoencoder", "StableAudio3", "load_autoencoder", "load_checkpoint"]
__getattr__ = make_getattr(
    __name__,
    {
        "REGISTRY": "hub",
        "Autoencoder": "autoencoder",
        "StableAudio3": "checkpoint",
        "load_autoencoder": "checkpoint",
        "load_checkpoint": "checkpoint",
    },
)
