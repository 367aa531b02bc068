"""From latent shards to training batches: sampling, prompts, batching."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.data.loading.datamodule import DataSource, LatentDataModule
    from sa3train.data.loading.embedding_cache import EmbeddingCache
    from sa3train.data.loading.loader import Batch, LatentLoader
    from sa3train.data.loading.prompts import PromptBuilder, PromptSettings, Template
    from sa3train.data.loading.sampler import BatchSampler

__all__ = [
    "Batch",
    "BatchSampler",
    "DataSource",
    "EmbeddingCache",
    "LatentDataModule",
    "LatentLoader",
    "PromptBuilder",
    "PromptSettings",
    "Template",
]
__getattr__ = make_getattr(
    __name__,
    {
        "Batch": "loader",
        "BatchSampler": "sampler",
        "DataSource": "datamodule",
        "EmbeddingCache": "embedding_cache",
        "LatentDataModule": "datamodule",
        "LatentLoader": "loader",
        "PromptBuilder": "prompts",
        "PromptSettings": "prompts",
        "Template": "prompts",
    },
)
