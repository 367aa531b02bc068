"""Write, index and read latent shards (tar files with an index)."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.data.shards.index import build_index, list_shards, summarize_data
    from sa3train.data.shards.reader import LatentStore
    from sa3train.data.shards.writer import ShardWriter

__all__ = ["LatentStore", "ShardWriter", "build_index", "list_shards", "summarize_data"]
__getattr__ = make_getattr(
    __name__,
    {
        "LatentStore": "reader",
        "ShardWriter": "writer",
        "build_index": "index",
        "list_shards": "index",
        "summarize_data": "index",
    },
)
