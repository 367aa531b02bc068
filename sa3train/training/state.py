"""A whole training state in one safetensors file: tensors as tensors, everything else as JSON in the header.

No pickle is written or read. The file appears whole or not at all, and carries a checksum of its tensors.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sa3train.errors import SA3Error
from sa3train.files import write_bytes

FORMAT = "sa3train-state-1"
MARK = "__kind__"


class StateError(SA3Error):
    """A saved training state that is damaged or of another kind."""


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dictionaries, lists, tuples, numbers, text and tensors into named tensors and a JSON skeleton.

    Raises `TypeError` naming the place of anything else: it would need code to restore.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, "", tensors)


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The inverse of `pack`, key types and tuples included."""
    if isinstance(skeleton, list):
        return [unpack(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    kind = skeleton.get(MARK)
    if kind is None:
        return {key: unpack(tensors, value) for key, value in skeleton.items()}
    value = skeleton["value"]
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unpack(tensors, item) for item in value)
    if kind == "float":
        return float(value)
    return {unpack(tensors, key): unpack(tensors, item) for key, item in value}


def save_state(path: str | Path, tree: Any) -> None:
    """Write `tree` to `path` atomically (see `pack` for what it may hold)."""
    tensors, skeleton = pack(tree)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "state": json.dumps(skeleton), "sha256": _digest(stored)}
    write_bytes(path, save(stored, metadata=header))


def load_state(path: str | Path) -> Any:
    """Read what `save_state` wrote, on the CPU.

    Raises `StateError` when the file is missing, cut short, altered, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot read the training state {path}: {error}.") from error
    if header.get("format") != FORMAT:
        raise StateError(f"{path} is not a training state of sa3train ({FORMAT}).")
    if header.get("sha256") != _digest(tensors):
        raise StateError(f"the training state {path} is damaged: its checksum does not match.")
    return unpack(tensors, json.loads(header["state"]))


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {MARK: "tensor", "value": place}
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, torch.SymInt)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {MARK: "float", "value": str(value)}
    if isinstance(value, list):
        return [_pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        packed = [_pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return {MARK: "tuple", "value": packed}
    if isinstance(value, Mapping):
        pairs = [(key, _pack(item, f"{place}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) for key in value) and MARK not in value:
            return dict(pairs)
        return {MARK: "dict", "value": [[_pack(key, f"{place}/key", tensors), item] for key, item in pairs]}
    raise TypeError(f"a training state cannot hold {type(value).__name__} (at {place or 'its root'})")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
