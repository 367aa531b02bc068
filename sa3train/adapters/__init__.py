"""Adapters of the LoRA family: read and write files, apply them to a model, train them, and edit them."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.adapters.adapter import Adapter
    from sa3train.adapters.apply.load_report import LoadReport, check_fit
    from sa3train.adapters.apply.stack import AdapterStack
    from sa3train.adapters.formats.io import load_adapter, save_adapter
    from sa3train.adapters.layers.inject import InjectedAdapter, inject
    from sa3train.adapters.spec import AdapterSpec

__all__ = [
    "Adapter",
    "AdapterSpec",
    "AdapterStack",
    "InjectedAdapter",
    "LoadReport",
    "check_fit",
    "inject",
    "load_adapter",
    "save_adapter",
]
__getattr__ = make_getattr(
    __name__,
    {
        "Adapter": "adapter",
        "AdapterSpec": "spec",
        "AdapterStack": "apply.stack",
        "InjectedAdapter": "layers.inject",
        "LoadReport": "apply.load_report",
        "check_fit": "apply.load_report",
        "inject": "layers.inject",
        "load_adapter": "formats.io",
        "save_adapter": "formats.io",
    },
)
