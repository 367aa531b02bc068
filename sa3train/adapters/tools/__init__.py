"""Tools for adapter files: inspect, compare, convert, merge, extract, resize, scale.

`sa3-adapter` and the studio's adapters page call these functions, which return result objects, and only print or show
what they return.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.adapters.tools.convert import convert_adapter
    from sa3train.adapters.tools.inspect import compare_adapters, inspect_adapter, plot_layers
    from sa3train.adapters.tools.low_rank import Truncation
    from sa3train.adapters.tools.merge_checkpoint import WeightedAdapter, merge_into_checkpoint
    from sa3train.adapters.tools.results import CheckpointResult, EditResult
    from sa3train.adapters.tools.service import extract_adapter, merge_adapters, resize_adapter, scale_adapter

__all__ = [
    "CheckpointResult",
    "EditResult",
    "Truncation",
    "WeightedAdapter",
    "compare_adapters",
    "convert_adapter",
    "extract_adapter",
    "inspect_adapter",
    "merge_adapters",
    "merge_into_checkpoint",
    "plot_layers",
    "resize_adapter",
    "scale_adapter",
]
__getattr__ = make_getattr(
    __name__,
    {
        "CheckpointResult": "results",
        "EditResult": "results",
        "Truncation": "low_rank",
        "WeightedAdapter": "merge_checkpoint",
        "compare_adapters": "inspect",
        "convert_adapter": "convert",
        "extract_adapter": "service",
        "inspect_adapter": "inspect",
        "merge_adapters": "service",
        "merge_into_checkpoint": "merge_checkpoint",
        "plot_layers": "inspect",
        "resize_adapter": "service",
        "scale_adapter": "service",
    },
)
