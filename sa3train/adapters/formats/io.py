"""Load and save adapter files, whatever tool wrote them."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.comfy import read_comfy
from sa3train.adapters.formats.diffusers import is_diffusers_folder, read_diffusers_folder
from sa3train.adapters.formats.naming import NATIVE, PEFT, identify_format
from sa3train.adapters.formats.native import build_native_metadata, build_native_tensors, read_native
from sa3train.adapters.formats.peft import (
    parse_diffusers_config,
    parse_peft_tensors,
    read_peft_folder,
    write_peft_folder,
)
from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.adapters.formats.sa3cpp import is_gguf, read_gguf
from sa3train.adapters.formats.saving import convert_for_saving
from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import (
    read_header,
    read_json_object,
    read_tensors,
    write_tensors,
)

logger = get_logger(__name__)

ADAPTER_ENTRY = "adapter"
"""Key of the adapter in a checkpoint."""

CHECKPOINT_FORMAT = "sa3train-state-"
"""Start of the format that a checkpoint names in its header; its version follows."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
OTHER_FILES = (*PICKLES, ".gguf", ".npz", ".onnx", ".json", ".zip", ".safetensor", ".png")
"""Suffixes of files that hold no adapter, or none that is written."""

MAX_SETTINGS = 2**20
"""Largest JSON file beside an adapter, in bytes."""


def load_adapter(path: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None) -> Adapter:
    """Load an adapter from a file, whatever tool wrote it.

    Nothing is executed, and nothing is read before the file's header has been checked.

    Args:
        path: A .safetensors file of the released layout, of PEFT or of ComfyUI, a GGUF file of sa3.cpp, a PEFT folder,
            a run folder (its newest or chosen adapter), or one of its checkpoints: RUN_FOLDER@STEP or the file.
        weights: The base model's weights by module path. Only PEFT adapters need them that started by taking a part
            out of the base (PiSSA, OLoRA).

    Returns:
        The adapter.

    Raises:
        AdapterError: If the file is damaged, a pickle, or holds no adapter.
    """
    source = locate_adapter(os.fspath(path))
    with name_source(source):
        return _load(source, weights)


@contextlib.contextmanager
def name_source(source: Path) -> Iterator[None]:
    """Put the name of the file before an error that does not say where it is.

    Args:
        source: The file or folder.

    Yields:
        Nothing.

    Raises:
        AdapterError: The error, with the name.
    """
    try:
        yield
    except AdapterError as error:
        if str(source) in str(error):
            raise
        raise AdapterError(f"{source}: {error}") from error


def _load(source: Path, weights: Mapping[str, Tensor] | None) -> Adapter:
    if source.is_dir():
        return (read_diffusers_folder if is_diffusers_folder(source) else read_peft_folder)(source, base=weights)
    if not source.is_file():
        raise AdapterError(f"{source} is no file. Give a .safetensors file, a PEFT folder or a run folder.")
    if is_gguf(source):
        return read_gguf(source)
    if (trained := read_checkpoint_adapter(source)) is not None:
        return trained
    header = read_header(source)
    form = identify_format(str(source), header.dtypes)
    if form == PEFT:
        return read_peft_folder(source.parent, source.name, weights)
    tensors = read_tensors(source, header)
    if form == NATIVE:
        return read_native(str(source), tensors, header.metadata | read_settings_beside(source, header.metadata))
    if config := parse_diffusers_config(str(source), header.metadata):
        return parse_peft_tensors(str(source), tensors, config, header.metadata, weights)
    return read_comfy(str(source), tensors, header.metadata)


def read_settings_beside(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Read the settings of an adapter from a JSON file beside it, as some tools write them.

    Args:
        file: The adapter's file.
        metadata: Its own metadata, which wins over a file beside it.

    Returns:
        `lora_config` for the metadata; empty where the file has its own, or none lies beside it.

    Raises:
        AdapterError: If the JSON file cannot be read.
    """
    if "lora_config" in metadata:
        return {}
    for beside in (file.with_suffix(".json"), file.with_name(f"{file.name}.json")):
        if not beside.is_file():
            continue
        advice = "It may hold the adapter's alpha. Repair it, or move it away: alpha is then taken to equal the rank."
        content = read_json_object(beside, MAX_SETTINGS, advice)
        config = content.get("lora_config", content)
        if isinstance(config, dict) and config.keys() & {"alpha", "rank", "adapter_type"}:
            logger.info("%s: alpha, rank and type are those of %s", file, beside)
            return {"lora_config": json.dumps(config)}
        logger.warning("%s: %s names no alpha, rank or adapter_type; alpha is assumed to equal the rank", file, beside)
    return {}


def save_adapter(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = torch.float16) -> None:
    """Save an adapter, whole or not at all. Raises `AdapterError` for what the format cannot carry.

    Args:
        path: A file of the released layout when it ends in .safetensors, else a PEFT folder.
        adapter: The adapter.
        dtype: Dtype to write fp32 tensors in (released files are F16); None keeps fp32. Others keep their own.
    """
    if is_file_name(path):
        write_tensors(path, convert_for_saving(build_native_tensors(adapter), dtype), build_native_metadata(adapter))
    else:
        write_peft_folder(path, adapter, dtype)


def is_file_name(path: str | os.PathLike[str]) -> bool:
    """Check whether an adapter is written to a path as a file of the released layout.

    Args:
        path: The target.

    Returns:
        True for a name that ends in .safetensors, False for a PEFT folder.

    Raises:
        AdapterError: If the name is that of another kind of file.
    """
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_FILES:
        raise AdapterError(
            f"{path} does not suit an adapter. Give a file that ends in .safetensors, or a folder; .gguf, of sa3.cpp, "
            "is written without --to."
        )
    return suffix == ".safetensors"


def pack_adapter(adapter: Adapter, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Pack an adapter for a checkpoint.

    Args:
        adapter: The adapter.
        dtype: Dtype of its fp32 tensors.

    Returns:
        Metadata and tensors of the released layout.
    """
    tensors = convert_for_saving(build_native_tensors(adapter), dtype)
    return {"metadata": build_native_metadata(adapter), "tensors": tensors}


def read_checkpoint_adapter(path: Path) -> Adapter | None:
    """Read the adapter in a checkpoint.

    Args:
        path: A file.

    Returns:
        The adapter after that step; None if the file is not a checkpoint.

    Raises:
        AdapterError: If the state holds no adapter.
    """
    prefix = f"/{ADAPTER_ENTRY}/tensors/"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if not header.get("format", "").startswith(CHECKPOINT_FORMAT):
                return None
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, RuntimeError):
        return None  # no safetensors file, or a damaged one, which is described by whoever reads it next
    if not tensors:
        raise AdapterError(f"{path} is a checkpoint without an adapter. Give the adapter file of its run.")
    return read_native(str(path), tensors, json.loads(header["state"])[ADAPTER_ENTRY]["metadata"])
