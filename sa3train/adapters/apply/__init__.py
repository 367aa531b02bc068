"""Apply adapters to a loaded model: check that they fit, compute effective weights, stack several of them."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.adapters.apply.effective_weight import compute_effective_weight
    from sa3train.adapters.apply.load_report import LoadReport, check_fit
    from sa3train.adapters.apply.stack import AdapterStack

__all__ = ["AdapterStack", "LoadReport", "check_fit", "compute_effective_weight"]
__getattr__ = make_getattr(
    __name__,
    {
        "AdapterStack": "stack",
        "LoadReport": "load_report",
        "check_fit": "load_report",
        "compute_effective_weight": "effective_weight",
    },
)
