"""Merge adapters into a checkpoint, in the released layout, that of diffusers, or a DiT pack of the MLX builds."""

import json
import shutil
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
from sa3train.adapters.tools.low_rank import ErrorByLayer
from sa3train.adapters.tools.results import CheckpointResult
from sa3train.core.errors import AdapterError
from sa3train.core.files import replace_folder, write_json
from sa3train.core.safetensors_file import read_header, write_tensor_stream
from sa3train.models.checkpoint import read_model_config
from sa3train.models.diffusers_layout import (
    CLASSES,
    TRANSFORMER,
    explain_missing_autoencoder,
    write_pipeline,
    write_text_encoder,
)
from sa3train.models.diffusers_layout import WEIGHTS as PIPELINE_WEIGHTS
from sa3train.models.hub import CheckpointFiles
from sa3train.models.mlx_layout import write_dit_pack
from sa3train.models.nano import TEXT_FOLDER
from sa3train.models.parse import complete_config
from sa3train.models.weight_files import WeightFiles

_PACK_NOTE = "the autoencoder and the text encoder, which lie in packs of their own beside it"
CONFIG = "model_config.json"
WEIGHTS = "model.safetensors"
MERGED = "sa3train_merged"


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
        target: The folder to write, or the pack. An existing folder is replaced only if it was written by this
            function.
        adapters: The adapters.
        allow_partial: Accept adapters of which only some layers fit.
        to: Layout to write, "released", "diffusers", or "mlx" for a pack of the DiT and the conditioner in fp16; None
            means that of the model, which for packs is "released".

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
        reports, strengths = stack.reports, [item.strength for item in adapters]
        stack.apply()
        changed = _list_changed_tensors(layers, {path for report in reports for path in report.matched})
        rounding = _measure_rounding(model.weights, changed, torch.float16 if to == "mlx" else None)
        metadata = {MERGED: json.dumps([item.describe() for item in adapters])}
        if to == "mlx":
            _check_pack(target, [name for name in changed if name.startswith("pretransform.")])
            write_dit_pack(Path(target), model.weights, changed, json.dumps(metadata))
            return CheckpointResult(target, model.name, reports, strengths, rounding, [_PACK_NOTE])
        with replace_folder(target, _is_ours) as staging:
            config = complete_config(read_model_config(files), str(files.config))
            if to == "diffusers":
                not_carried = _write_pipeline(model, staging, changed, config, metadata)
            elif files.is_pipeline or files.pack is not None:
                _write_released(model, staging, changed, config, metadata)
            else:
                metadata = read_header(files.weights).metadata | metadata
                rewrite_tensors(model.weights, staging / WEIGHTS, changed, metadata)
                write_json(staging / CONFIG, config)
                _copy_rest(model.path, staging)
    finally:
        stack.clear()
    return CheckpointResult(target, model.name, reports, strengths, rounding, not_carried)


def _measure_rounding(weights: WeightFiles, changed: Mapping[str, Tensor], dtype: torch.dtype | None) -> ErrorByLayer:
    """Measure how far changes are from what `dtype` holds; None means the dtypes of the model's files."""
    found = ErrorByLayer()
    for name, stored in weights.iterate(changed):
        value = changed[name].cpu().double()
        error = float((value.to(dtype or stored.dtype).double() - value).square().sum())
        found.layers[name] = (error, float((value - stored.double()).square().sum()))
    return found


def _check_pack(target: str | Path, of_autoencoder: Sequence[str]) -> None:
    if Path(target).suffix != ".npz":
        raise AdapterError(f"{target} is no name of a pack. Choose one such as dit_sm-music_f16.npz.")
    if of_autoencoder:
        raise AdapterError("A pack holds the DiT and the conditioner. Leave adapters on the autoencoder's decoder out.")


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
    _copy_licenses(_get_folder(model), folder)
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
    rewrite_tensors(model.weights, folder / WEIGHTS, changed, metadata)
    prompt = next(entry for entry in config["model"]["conditioning"]["configs"] if entry["id"] == "prompt")
    prompt["config"] |= {"model_path": TEXT_FOLDER, "repo_id": None, "subfolder": None}
    write_json(folder / CONFIG, config)
    source = model.conditioner.text_encoder.source
    for each in (source.folder(), source.tokenizer_folder()):
        shutil.copytree(each, folder / TEXT_FOLDER, dirs_exist_ok=True)
    _copy_licenses(_get_folder(model), folder)


def _cast_changed(model: LoadedModel, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast changed weights to the dtypes of the model's files."""
    dtypes = ((name, stored.dtype) for name, stored in model.weights.iterate(changed))
    return {name: _cast(model.path, name, changed[name], dtype) for name, dtype in dtypes}


def rewrite_tensors(
    weights: WeightFiles, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the tensors of a model, some with other values, one at a time. Names, shapes, dtypes and order stay.

    Args:
        weights: The model's tensors.
        target: The safetensors file to write.
        changed: New values by name.
        metadata: Its metadata.

    Raises:
        AdapterError: If a value is not finite in the dtype of its tensor.
    """
    tensors = (
        _cast(weights.path, name, changed[name], stored.dtype) if name in changed else stored
        for name, stored in weights.iterate(weights.tensors)
    )
    write_tensor_stream(target, weights.tensors, tensors, metadata)


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


def _get_folder(model: LoadedModel) -> Path:
    return CheckpointFiles(model.name, model.path).folder


def _copy_licenses(folder: Path, staging: Path) -> None:
    for item in folder.iterdir():
        if item.is_file() and item.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(item, staging / item.name)
