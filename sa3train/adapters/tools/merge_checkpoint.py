"""Merge adapters into a checkpoint, in the released layout or that of diffusers."""

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa3train import __version__
from sa3train.adapters.adapter import Adapter, get_checkpoint_name
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.tools.base_weights import LoadedModel, find_layers
from sa3train.adapters.tools.history import describe_source
from sa3train.adapters.tools.results import CheckpointResult
from sa3train.core.dtypes import SAFETENSORS_DTYPES, get_dtype
from sa3train.core.errors import AdapterError
from sa3train.core.files import replace_folder, write_json
from sa3train.core.safetensors_file import SafetensorsHeader, TensorInfo, read_header, write_tensors
from sa3train.models.diffusers_layout import (
    CLASSES,
    TRANSFORMER,
    explain_missing_autoencoder,
    read_config,
    write_pipeline,
    write_text_encoder,
)
from sa3train.models.diffusers_layout import WEIGHTS as PIPELINE_WEIGHTS
from sa3train.models.hub import CheckpointFiles
from sa3train.models.nano import TEXT_FOLDER
from sa3train.models.parse import complete_config

CONFIG = "model_config.json"
WEIGHTS = "model.safetensors"
MERGED = "sa3train_merged"
_CHUNK = 2**24


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter to merge.

    Attributes:
        adapter: The adapter.
        strength: Its strength.
        conditioner_strength: Its strength in the conditioner; None means `strength`.
    """

    adapter: Adapter
    strength: float = 1.0
    conditioner_strength: float | None = None

    def describe(self) -> dict[str, Any]:
        """Describe it for the metadata of the checkpoint.

        Returns:
            Source, type, rank, strengths, fingerprint and our version.
        """
        strength = self.strength if self.conditioner_strength is None else self.conditioner_strength
        record = describe_source(self.adapter, self.strength)
        return {**record, "conditioner_strength": strength, "sa3train_version": __version__}


def merge_into_checkpoint(
    model: LoadedModel,
    target: str | Path,
    adapters: Sequence[WeightedAdapter],
    allow_partial: bool = False,
    to: str | None = None,
) -> CheckpointResult:
    """Write a copy of a checkpoint with W + Σ sᵢ (Wᵢ' − W) in place of W.

    All other tensors and the text encoder are copied as they are, the config with every key; weights keep their dtype.
    The folder is written whole or not at all. Raises `AdapterError` for an adapter that does not fit or would make a
    weight NaN.

    Args:
        model: The checkpoint, loaded in fp32; its weights are the same afterwards.
        target: The folder to write. An existing one is replaced only if it was written by this function.
        adapters: The adapters.
        allow_partial: Accept adapters of which only some layers fit.
        to: Layout to write, "released" or "diffusers"; None means that of the model.

    Returns:
        What was written.
    """
    files = CheckpointFiles(model.name, model.path)
    to = to or ("diffusers" if files.is_pipeline else "released")
    not_carried: list[str] = []
    parts = sorted({"dit", *(item.adapter.part for item in adapters)}, reverse=True)
    layers = {path: layer for part in parts for path, layer in find_layers(model, part).items()}
    decoder = model.get_adapter_root("decoder") if "decoder" in parts else None
    stack = AdapterStack(model.get_adapter_root(), decoder=decoder)
    try:
        for item in adapters:
            stack.add(item.adapter, item.strength, item.conditioner_strength, allow_partial=allow_partial, base=model)
        reports = stack.reports
        stack.apply()
        changed = _list_changed_tensors(layers, {path for report in reports for path in report.matched})
        metadata = {MERGED: json.dumps([item.describe() for item in adapters])}
        with replace_folder(target, _is_ours) as staging:
            config = complete_config(read_config(files.config), str(files.config))
            if to == "diffusers":
                not_carried = _write_pipeline(model, staging, changed, config, metadata)
            elif files.is_pipeline:
                _write_released(model, staging, changed, config, metadata)
            else:
                rewrite_tensors(files.weights, staging / WEIGHTS, changed, metadata)
                write_json(staging / CONFIG, config)
                _copy_rest(model.path, staging)
    finally:
        stack.clear()
    return CheckpointResult(target, model.name, reports, not_carried)


def _write_pipeline(
    model: LoadedModel,
    folder: Path,
    changed: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> list[str]:
    """Write a model in the layout of diffusers; returns what that cannot hold."""
    write_pipeline(folder, model.weights, _cast_changed(model, changed), model.config, config, metadata)
    encoder = model.conditioner.text_encoder
    write_text_encoder(folder, encoder.source.folder(), encoder.source.tokenizer_folder(), encoder.max_length)
    _copy_licenses(model.path, folder)
    reason = explain_missing_autoencoder(model.config)
    load = f'{CLASSES[TRANSFORMER]}.from_pretrained(FOLDER, subfolder="{TRANSFORMER}")'
    return [] if reason is None else [f"the autoencoder: {reason}. Load what was written with diffusers' {load}"]


def _write_released(
    model: LoadedModel,
    folder: Path,
    changed: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write a model that was loaded from the layout of diffusers in the released one."""
    tensors = dict(model.weights.iterate(model.weights.tensors)) | _cast_changed(model, changed)
    write_tensors(folder / WEIGHTS, tensors, metadata)
    prompt = next(entry for entry in config["model"]["conditioning"]["configs"] if entry["id"] == "prompt")
    prompt["config"] |= {"model_path": TEXT_FOLDER, "repo_id": None, "subfolder": None}
    write_json(folder / CONFIG, config)
    source = model.conditioner.text_encoder.source
    for each in (source.folder(), source.tokenizer_folder()):
        shutil.copytree(each, folder / TEXT_FOLDER, dirs_exist_ok=True)
    _copy_licenses(model.path, folder)


def _cast_changed(model: LoadedModel, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast changed weights to the dtypes of the model's files."""
    dtypes = ((name, stored.dtype) for name, stored in model.weights.iterate(changed))
    return {name: _cast(model.path, name, changed[name], dtype) for name, dtype in dtypes}


def rewrite_tensors(source: Path, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other values of some tensors and more metadata.

    Names, shapes, dtypes and order stay, and only the changed tensors need memory. Raises `AdapterError` if a changed
    tensor is not in the file, or is not finite in the file's dtype.

    Args:
        source: The file to copy.
        target: The file to write.
        changed: New values by key of the file.
        metadata: Metadata to add.
    """
    header = read_header(source)
    listing: dict[str, Any] = {"__metadata__": header.metadata | dict(metadata)}
    for key, entry in header.entries.items():
        listing[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
    text = json.dumps(listing, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as old, target.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        old.seek(8 + length)
        new.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(old, new, _CHUNK)
        for key, tensor in changed.items():
            new.seek(8 + len(text) + _find_tensor(source, header, key, tensor).begin)
            new.write(_convert_to_bytes(source, key, tensor, get_dtype(header.entries[key].dtype)))
        new.flush()
        os.fsync(new.fileno())


def _find_tensor(source: Path, header: SafetensorsHeader, key: str, tensor: Tensor) -> TensorInfo:
    entry = header.entries.get(key)
    if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype not in SAFETENSORS_DTYPES:
        raise AdapterError(
            f"{source} has no tensor {key} of shape {tuple(tensor.shape)}; it is not the model that is loaded."
        )
    return entry


def _convert_to_bytes(source: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> bytes:
    return _cast(source, key, tensor, dtype).reshape(-1).view(torch.uint8).numpy().tobytes()


def _cast(source: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    value = tensor.detach().cpu().to(dtype).contiguous()
    if not torch.isfinite(value).all():
        raise AdapterError(f"{key} would not be finite in {dtype}, so {source} is not merged. Lower the strength.")
    return value


def _list_changed_tensors(layers: Mapping[str, nn.Module], paths: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(paths):
        for name in ("weight", "bias"):
            tensor = getattr(layers[path], name)
            if isinstance(tensor, Tensor):
                found[f"{get_checkpoint_name(path)}.{name}"] = tensor
    return found


def _is_ours(folder: Path) -> bool:
    """Whether the folder was written by this module: never replace a model that was downloaded."""
    found = (file for file in (folder / WEIGHTS, folder / TRANSFORMER / PIPELINE_WEIGHTS) if file.is_file())
    return (folder / CONFIG).is_file() and any(MERGED in read_header(file).metadata for file in found)


def _copy_rest(folder: Path, staging: Path) -> None:
    """Copy the text encoder, which is the subfolder with a config of its own, and licenses."""
    for item in folder.iterdir():
        if item.is_dir() and (item / "config.json").is_file():
            shutil.copytree(item, staging / item.name)
    _copy_licenses(folder, staging)


def _copy_licenses(folder: Path, staging: Path) -> None:
    for item in folder.iterdir():
        if item.is_file() and item.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(item, staging / item.name)
