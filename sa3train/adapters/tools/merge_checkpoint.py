"""Adapters baked into a whole checkpoint of the released layout."""

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
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.load_report import BaseModel, LoadReport
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.core.errors import AdapterError
from sa3train.core.files import atomic_folder
from sa3train.core.safetensors_file import Entry, Header, read_header

CONFIG = "model_config.json"
WEIGHTS = "model.safetensors"
MERGED = "sa3train_merged"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK = 2**24


@dataclass(frozen=True)
class Ingredient:
    """An adapter to bake in, its strength, and its strength in the conditioner (None: the same)."""

    adapter: Adapter
    strength: float = 1.0
    conditioner_strength: float | None = None


def merge_into_checkpoint(
    folder: Path,
    target: str | os.PathLike[str],
    root: nn.Module,
    ingredients: Sequence[Ingredient],
    base: "BaseModel | None" = None,
    allow_partial: bool = False,
) -> list[LoadReport]:
    """Write to the folder `target` the checkpoint in `folder` with W + Σ sᵢ (Wᵢ' − W) in place of W.

    `root` is that checkpoint's model, loaded in fp32, and is left as it was. All other tensors, the config and the text
    encoder are copied byte for byte; weights keep their dtype in the file. The folder appears whole or not at all.
    Raises `AdapterError` for an adapter that does not fit, or would bake in NaN.
    """
    stack = AdapterStack(root)
    try:
        reports = [
            stack.add(item.adapter, item.strength, item.conditioner_strength, allow_partial=allow_partial, base=base)
            for item in ingredients
        ]
        stack.apply()
        changed = _changed_tensors(root, {path for report in reports for path in report.matched})
        metadata = {MERGED: json.dumps([_record(item) for item in ingredients])}
        with atomic_folder(target, _is_checkpoint) as aside:
            rewrite_tensors(folder / WEIGHTS, aside / WEIGHTS, changed, metadata)
            shutil.copyfile(folder / CONFIG, aside / CONFIG)
            _copy_rest(folder, aside)
    finally:
        stack.clear()
    return reports


def released_name(path: str) -> str:
    """A module path of the adapters as it begins in the released checkpoint's names."""
    return f"model.{path}" if path.startswith("model.") else f"conditioner.{path}"


def rewrite_tensors(source: Path, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Copy the safetensors file `source` with the values of the tensors `changed` and more metadata.

    Names, shapes, dtypes and order stay; memory for the changed tensors alone is used. Raises `AdapterError` when a
    changed tensor is not in the file, or is not finite in the file's dtype.
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
            new.seek(8 + len(text) + _entry(source, header, key, tensor).begin)
            new.write(_bytes_of(source, key, tensor, DTYPES[header.entries[key].dtype]))
        new.flush()
        os.fsync(new.fileno())


def _entry(source: Path, header: Header, key: str, tensor: Tensor) -> Entry:
    entry = header.entries.get(key)
    if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype not in DTYPES:
        raise AdapterError(f"{source} has no tensor {key} of shape {tuple(tensor.shape)}; it is not the model loaded.")
    return entry


def _bytes_of(source: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> bytes:
    value = tensor.detach().cpu().to(dtype).contiguous()
    if not torch.isfinite(value).all():
        raise AdapterError(f"{key} would not be finite in {dtype}, so {source} is not merged. Lower the strength.")
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def _changed_tensors(root: nn.Module, paths: set[str]) -> dict[str, Tensor]:
    layers = adaptable_layers(root)
    found: dict[str, Tensor] = {}
    for path in sorted(paths):
        for name in ("weight", "bias"):
            tensor = getattr(layers[path], name)
            if isinstance(tensor, Tensor):
                found[f"{released_name(path)}.{name}"] = tensor
    return found


def _record(item: Ingredient) -> dict[str, Any]:
    spec = item.adapter.spec
    in_conditioner = item.strength if item.conditioner_strength is None else item.conditioner_strength
    return {
        "source": Path(item.adapter.source).name,
        "fingerprint": item.adapter.fingerprint,
        "kind": spec.kind,
        "rank": spec.rank,
        "strength": item.strength,
        "conditioner_strength": in_conditioner,
        "sa3train_version": __version__,
    }


def _is_checkpoint(folder: Path) -> bool:
    """Whether `folder` was made here: only such a one may be replaced, never a model that was downloaded."""
    weights = folder / WEIGHTS
    return (folder / CONFIG).is_file() and weights.is_file() and MERGED in read_header(weights).metadata


def _copy_rest(folder: Path, aside: Path) -> None:
    """The text encoder, which is the subfolder with a config of its own, and licences."""
    for item in folder.iterdir():
        if item.is_dir() and (item / "config.json").is_file():
            shutil.copytree(item, aside / item.name)
        elif item.is_file() and item.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(item, aside / item.name)
