"""Encode clips into latent shards, restartable and in several processes."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.data.encode.encode import EncodeResult, encode_dataset
    from sa3train.data.encode.encoder import Encoder
    from sa3train.data.encode.settings import EncodeSettings
    from sa3train.data.encode.workers import Workers

__all__ = ["EncodeResult", "EncodeSettings", "Encoder", "Workers", "encode_dataset"]
__getattr__ = make_getattr(
    __name__,
    {
        "EncodeResult": "encode",
        "EncodeSettings": "settings",
        "Encoder": "encoder",
        "Workers": "workers",
        "encode_dataset": "encode",
    },
)
