"""Adapters from and to files, whatever tool wrote them."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.header import FLOATS, Header, read_header
from sa3train.adapters.native import is_native, native_metadata, native_tensors, read_native
from sa3train.errors import AdapterError
from sa3train.files import write_tensors
from sa3train.log import get_logger

logger = get_logger(__name__)


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter at `path`: a released-layout or ComfyUI .safetensors file, or a PEFT folder.

    Nothing is executed and nothing is read before the file's header has been checked. Raises `AdapterError` for a
    damaged file, a pickle, or a file that holds no adapter, saying what to do.
    """
    source = Path(path)
    if source.is_dir():
        from sa3train.adapters.peft_format import read_peft_folder

        return read_peft_folder(source)
    if not source.is_file():
        raise AdapterError(f"there is no adapter at {source}. Give a .safetensors file or a PEFT folder.")
    header = read_header(source)
    keys = list(header.entries)
    if is_native(keys):
        return read_native(str(source), read_tensors(source, header), header.metadata)
    if any(key.startswith("base_model.model.") for key in keys):
        from sa3train.adapters.peft_format import read_peft_folder

        return read_peft_folder(source.parent, source.name)
    if any(key.startswith(("diffusion_model.", "lora_unet_")) for key in keys):
        from sa3train.adapters.comfy_format import read_comfy

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
        from sa3train.adapters.peft_format import write_peft_folder

        write_peft_folder(path, adapter, dtype)


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of a file whose header has been checked. Only real numbers are accepted."""
    for key, entry in header.entries.items():
        if entry.dtype not in FLOATS:
            raise AdapterError(f"{path}: {key} is {entry.dtype}; an adapter holds real numbers (F16, BF16 or F32).")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in header.entries}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"cannot read {path}: {error}. The file is damaged; download or save it again.") from error


def storable(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU copies, fp32 and fp64 in `dtype`; a tensor too large for it stays fp32 and is named in the log."""
    stored = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu()
        if not torch.isfinite(value).all():
            raise AdapterError(f"{key} holds NaN or infinity, so the adapter is not written. The training diverged.")
        if dtype is not None and value.dtype in (torch.float32, torch.float64):
            cast = value.to(dtype)
            if torch.isfinite(cast).all():
                value = cast
            else:
                logger.warning("%s has values too large for %s and is kept in fp32", key, dtype)
        stored[key] = value.contiguous().clone()
    return stored
