"""Read and write adapter files: native safetensors, PEFT folders, ComfyUI."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.adapters.formats.comfy import write_comfy
    from sa3train.adapters.formats.io import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter", "write_comfy"]
__getattr__ = make_getattr(__name__, {"load_adapter": "io", "save_adapter": "io", "write_comfy": "comfy"})
