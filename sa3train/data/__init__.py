"""From audio files to training batches: sources, audit, encoding, shards, loading."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.data.audit.audit import AuditRules
    from sa3train.data.encode.encode import EncodeResult, encode_dataset
    from sa3train.data.encode.encoder import Encoder
    from sa3train.data.encode.settings import EncodeSettings
    from sa3train.data.loading.datamodule import DataSource, LatentDataModule
    from sa3train.data.loading.loader import Batch
    from sa3train.data.loading.prompts import PromptSettings, Template
    from sa3train.data.shards.reader import LatentStore
    from sa3train.data.sources.listing import list_source

__all__ = [
    "AuditRules",
    "Batch",
    "DataSource",
    "EncodeResult",
    "EncodeSettings",
    "Encoder",
    "LatentDataModule",
    "LatentStore",
    "PromptSettings",
    "Template",
    "encode_dataset",
    "list_source",
]
__getattr__ = make_getattr(
    __name__,
    {
        "AuditRules": "audit.audit",
        "Batch": "loading.loader",
        "DataSource": "loading.datamodule",
        "EncodeResult": "encode.encode",
        "EncodeSettings": "encode.settings",
        "Encoder": "encode.encoder",
        "LatentDataModule": "loading.datamodule",
        "LatentStore": "shards.reader",
        "PromptSettings": "loading.prompts",
        "Template": "loading.prompts",
        "encode_dataset": "encode.encode",
        "list_source": "sources.listing",
    },
)
