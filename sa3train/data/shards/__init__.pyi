from .index import build_index as build_index
from .index import list_shards as list_shards
from .index import summarize_data as summarize_data
from .reader import LatentStore as LatentStore
from .writer import ShardWriter as ShardWriter
