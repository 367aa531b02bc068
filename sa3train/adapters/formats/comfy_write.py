"""Write adapters for ComfyUI: the DiT's layers, one at a time, so that weight deltas made on the way need no memory."""

import os

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.products import get_product_rank
from sa3train.adapters.formats.naming import DIT
from sa3train.adapters.formats.native import build_native_metadata
from sa3train.adapters.formats.saving import convert_for_saving
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import write_tensor_stream

COMFYUI = "comfyui"
"""Key of the metadata that names the ComfyUI version for whose rules a file is written."""

COMFYUI_VERSION = "0.33.0"
"""The version that `launch/check_comfyui.py` was run with; its rules are those of 0.19.3 too."""

PREFIX = "diffusion_model."
NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "magnitude": "dora_scale"}


def list_comfy_unsupported(adapter: Adapter) -> list[str]:
    """List the layers that ComfyUI cannot patch: those outside the DiT.

    Args:
        adapter: The adapter.

    Returns:
        Their module paths.
    """
    return [path for path in adapter.tensors if not path.startswith(DIT)]


def write_comfy(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> None:
    """Write an adapter for ComfyUI, whole or not at all, without its layers outside the DiT, with its native metadata.

    Args:
        path: The file.
        adapter: A lora, diff or comfy adapter.
        dtype: Dtype to write fp32 tensors in; None keeps fp32. alpha and dora_scale are fp32 always: rounded, they
            would scale whole rows of the weight and not only the change.

    Raises:
        AdapterError: If ComfyUI does not have the type, or nothing of it is in the DiT.
    """
    if adapter.spec.adapter_type not in ("lora", "diff", "comfy"):
        raise AdapterError(
            f"ComfyUI has no {adapter.spec.adapter_type}. Convert it: sa3-adapter convert --to comfy --model NAME"
        )
    unsupported = list_comfy_unsupported(adapter)
    paths = sorted(adapter.tensors.keys() - unsupported)
    if not paths:
        part = "autoencoder's decoder" if adapter.part == "decoder" else "duration embedder"
        raise AdapterError(f"{adapter.source} changes only the {part}, which ComfyUI cannot patch.")
    sources = [source for layer in paths for source in _list_tensors(adapter, layer)]
    tensors = (_read_tensor(adapter, *source[1:], dtype) for source in sources)
    metadata = build_native_metadata(adapter) | {COMFYUI: COMFYUI_VERSION}
    write_tensor_stream(path, [source[0] for source in sources], tensors, metadata)


def _list_tensors(adapter: Adapter, path: str) -> list[tuple[str, str, str]]:
    """List the tensors of a layer: key in the file, module path and name."""
    params, key = adapter.tensors[path], PREFIX + path.removeprefix(DIT)
    has_scale = get_product_rank(params) and adapter.spec.get_scale(path) != 1  # which ComfyUI takes to be 1 otherwise
    names = (*params, "alpha") if has_scale else params
    return [(f"{key}.{NAMES.get(name, name)}", path, name) for name in names]


def _read_tensor(adapter: Adapter, path: str, name: str, dtype: torch.dtype | None) -> Tensor:
    params, spec = adapter.tensors[path], adapter.spec
    if name == "alpha":
        return torch.tensor(spec.get_scale(path) * (get_product_rank(params) or 1), dtype=torch.float32)
    tensor = params[name].float() if name == "magnitude" else params[name]
    return convert_for_saving({f"{path} {name}": tensor}, dtype).popitem()[1]
