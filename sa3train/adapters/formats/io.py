"""Load and save adapter files, whatever tool wrote them."""

import os
from pathlib import Path

import torch

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.comfy import read_comfy
from sa3train.adapters.formats.native import build_native_metadata, build_native_tensors, is_native, read_native
from sa3train.adapters.formats.peft import read_peft_folder, write_peft_folder
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import convert_for_saving, read_header, read_tensors, write_tensors


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Load an adapter from a file, whatever tool wrote it.

    Nothing is executed, and nothing is read before the file's header has been checked.

    Args:
        path: A .safetensors file of the released layout, of PEFT or of ComfyUI, or a PEFT folder.

    Returns:
        The adapter.

    Raises:
        AdapterError: If the file is damaged, a pickle, or holds no adapter.
    """
    source = Path(path)
    if source.is_dir():
        return read_peft_folder(source)
    if not source.is_file():
        raise AdapterError(f"There is no adapter at {source}. Give a .safetensors file or a PEFT folder.")
    header = read_header(source)
    keys = list(header.entries)
    if is_native(keys):
        return read_native(str(source), read_tensors(source, header), header.metadata)
    if any(key.startswith("base_model.model.") for key in keys):
        return read_peft_folder(source.parent, source.name)
    if any(key.startswith(("diffusion_model.", "lora_unet_")) for key in keys):
        return read_comfy(str(source), read_tensors(source, header), header.metadata)
    hint = "It looks like a whole checkpoint." if any(key.startswith("model.model.") for key in keys) else ""
    raise AdapterError(
        f"{source} is a safetensors file but no adapter: none of its {len(keys)} tensors has an adapter's name "
        f"(first: {', '.join(keys[:3]) or 'none'}). {hint}".rstrip()
    )


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> None:
    """Save an adapter, whole or not at all. Raises `AdapterError` for what the format cannot carry.

    Args:
        path: A file of the released layout when it ends in .safetensors, else a PEFT folder.
        adapter: The adapter.
        dtype: Dtype to write fp32 tensors in (released files are F16); None keeps fp32. Others keep their own.
    """
    if Path(path).suffix == ".safetensors":
        write_tensors(path, convert_for_saving(build_native_tensors(adapter), dtype), build_native_metadata(adapter))
    else:
        write_peft_folder(path, adapter, dtype)
