"""Adapters from and to files, whatever tool wrote them."""

import os
from pathlib import Path

import torch

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.native import is_native, native_metadata, native_tensors, read_native
from sa3train.core.errors import AdapterError
from sa3train.core.files import write_tensors
from sa3train.core.safetensors_file import read_header, read_tensors, storable


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter at `path`: a released-layout or ComfyUI .safetensors file, or a PEFT folder.

    Nothing is executed and nothing is read before the file's header has been checked. Raises `AdapterError` for a
    damaged file, a pickle, or a file that holds no adapter, saying what to do.
    """
    source = Path(path)
    if source.is_dir():
        from sa3train.adapters.formats.peft import read_peft_folder

        return read_peft_folder(source)
    if not source.is_file():
        raise AdapterError(f"there is no adapter at {source}. Give a .safetensors file or a PEFT folder.")
    header = read_header(source)
    keys = list(header.entries)
    if is_native(keys):
        return read_native(str(source), read_tensors(source, header), header.metadata)
    if any(key.startswith("base_model.model.") for key in keys):
        from sa3train.adapters.formats.peft import read_peft_folder

        return read_peft_folder(source.parent, source.name)
    if any(key.startswith(("diffusion_model.", "lora_unet_")) for key in keys):
        from sa3train.adapters.formats.comfy import read_comfy

        return read_comfy(str(source), read_tensors(source, header), header.metadata)
    hint = "It looks like a whole checkpoint." if any(key.startswith("model.model.") for key in keys) else ""
    raise AdapterError(
        f"{source} is a safetensors file but no adapter: none of its {len(keys)} tensors has an adapter's name "
        f"(first: {', '.join(keys[:3]) or 'none'}). {hint}".rstrip()
    )


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> None:
    """Write `adapter` to `path`, whole or not at all: a released-layout file when it ends in .safetensors, else a PEFT
    folder.

    fp32 tensors are written in `dtype` (released files are F16; None keeps fp32); others keep their own. Raises
    `AdapterError` for a value that is not finite or that `dtype` cannot hold, and for a kind that the format cannot
    carry.
    """
    if Path(path).suffix == ".safetensors":
        write_tensors(path, storable(native_tensors(adapter), dtype), native_metadata(adapter))
    else:
        from sa3train.adapters.formats.peft import write_peft_folder

        write_peft_folder(path, adapter, dtype)
