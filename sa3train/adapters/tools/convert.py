"""Convert adapters between formats (native, PEFT folder, ComfyUI), and read pickles by the weights-only reader."""

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.comfy import list_comfy_unsupported, read_comfy, write_comfy
from sa3train.adapters.formats.io import (
    PICKLES,
    is_file_name,
    load_adapter,
    name_source,
    read_settings_beside,
    save_adapter,
)
from sa3train.adapters.formats.naming import NATIVE, NATIVE_KEY, PEFT, identify_format
from sa3train.adapters.formats.native import read_native
from sa3train.adapters.formats.peft import parse_peft_tensors, read_peft_config
from sa3train.adapters.spec import BIAS_CHANGE, KINDS, PEFT_METHODS, get_layer_type
from sa3train.adapters.tools.base_weights import LoadedModel, Weights, get_base_weights, get_weights
from sa3train.adapters.tools.edit import convert_to_diff, expand_bases, has_own_bases, measure_difference, merge
from sa3train.adapters.tools.history import append_history
from sa3train.adapters.tools.low_rank import Truncation
from sa3train.adapters.tools.results import EditResult
from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import AdapterError
from sa3train.core.files import check_target

FORMATS = ("native", "peft", "comfy")
EXACT = {"native": (), "peft": ("lora", "dora-rows", *PEFT_METHODS), "comfy": ("lora", "diff")}
"""Types that a format carries as they are; native carries all."""
WITH_EXPANDED_BASES = {"native": (), "peft": ("lora-xs", "dora-rows-xs"), "comfy": ("lora-xs",)}
"""-xs types that a format carries exactly once their bases are multiplied in, which takes the base model."""


def read_any(path: str | os.PathLike[str], weights: Weights | None = None) -> tuple[Adapter, list[str]]:
    """Read an adapter from any file, pickles included.

    Args:
        path: A file or PEFT folder.
        weights: The base model's weights, see `load_adapter`.

    Returns:
        The adapter, and notes on what the file held besides it.
    """
    source = Path(path)
    if source.suffix.lower() in PICKLES and source.is_file():
        with name_source(source):
            return _read_pickle(source, weights)
    return load_adapter(source, weights), []


def convert_adapter(
    source: str | os.PathLike[str],
    target: str | Path,
    to: str | None = None,
    model: LoadedModel | None = None,
    truncation: Truncation | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> EditResult:
    """Convert an adapter to another format. Raises `AdapterError` if the format cannot carry it.

    What the format cannot carry exactly is exported as full weight deltas (ComfyUI) or approximated by a lora; both
    need the base model.

    Args:
        source: A file, PEFT folder or pickle.
        target: The file to write, or the folder for PEFT.
        to: "native", "peft" or "comfy"; None means native for a .safetensors file, else PEFT.
        model: The base model. With it, the written file is read again and its error measured.
        truncation: The rank of a lora approximation; None converts exactly.
        dtype: Dtype of the written file.
        overwrite: Replace what exists at the target, but never a source.

    Returns:
        What was written.
    """
    to = to or ("native" if is_file_name(target) else "peft")
    _check_target(Path(target), to)
    check_target(target, [source], overwrite)
    original, notes = read_any(source, None if model is None else get_weights(model))
    weights, warnings = get_base_weights([original], model)
    adapter = _make_portable(original, to, weights, truncation, notes, warnings)
    adapter = replace(adapter, metadata=append_history(adapter, "convert", to=to, of=Path(source).name))
    if to == "comfy":
        unsupported = list_comfy_unsupported(adapter)
        if unsupported:
            warnings.append(
                f"not carried over: {len(unsupported)} layer(s) of the duration embedder ({', '.join(unsupported)}), "
                f"which ComfyUI cannot patch; it will sound slightly different there"
            )
        if adapter.spec.include or adapter.spec.exclude or adapter.spec.dropout:
            notes.append("dropout, include and exclude are kept in the metadata, which ComfyUI does not read")
        adapter = _remove_layers(adapter, unsupported)
        original = _remove_layers(original, list_comfy_unsupported(original))
        write_comfy(target, adapter, get_dtype(dtype))
    else:
        save_adapter(target, adapter, get_dtype(dtype))
    error = None if weights is None else measure_difference(original, load_adapter(target), weights)
    return EditResult(target, adapter, notes, warnings, error, "measured error of the written file")


def _check_target(target: Path, to: str) -> None:
    if to not in FORMATS:
        raise AdapterError(f"Unknown format {to!r}. Choose one of {', '.join(FORMATS)}.")
    if (to == "peft") == is_file_name(target):
        wanted = "a folder" if to == "peft" else "a file that ends in .safetensors"
        raise AdapterError(f"{target} does not suit --to {to}. Give {wanted}.")


def _make_portable(
    adapter: Adapter,
    to: str,
    weights: Weights | None,
    truncation: Truncation | None,
    notes: list[str],
    warnings: list[str],
) -> Adapter:
    """Make the adapter that the format can carry; adds to `notes` and `warnings`."""
    name = adapter.spec.adapter_type
    types = {get_layer_type(name, params) for params in adapter.tensors.values()}
    has_bias = any(BIAS_CHANGE in params for params in adapter.tensors.values())
    if has_bias or types != {name}:
        name += " with changes of biases" if has_bias else " with full weight deltas"
    exact = to == "native" or (types <= set(EXACT[to]) and not (has_bias and to == "peft"))
    if truncation is not None:
        if exact and name in (*KINDS, *PEFT_METHODS):
            raise AdapterError(f"{to} carries {name} exactly. Remove the rank; to truncate it use: sa3-adapter resize.")
        approximate, error = merge([adapter], [1.0], truncation, weights, tool="approximate")
        rank = approximate.spec.format_rank(approximate.tensors)
        notes.append(f"{name} is approximated by a lora of rank {rank}, error {error.relative:.3%} of the change")
        warnings.extend(f"not carried over: {what}" for what in error.not_carried)
        return approximate
    if exact:
        if to == "native" and name not in (*KINDS, *PEFT_METHODS):
            notes.append(
                f"among tools that read native files only sa3train supports {name}; for others set --model and --rank"
            )
        return adapter
    as_lora = "approximated by a lora of --rank R (or --explained-variance SHARE), with its error reported."
    ways = f"exported as full weight deltas, or {as_lora}" if to == "comfy" else as_lora
    if weights is None and not (name in WITH_EXPANDED_BASES[to] and has_own_bases(adapter)):
        how = "exactly, by multiplying its bases in." if name in WITH_EXPANDED_BASES[to] else ways
        raise AdapterError(f"{to} has no {name}. With its base model (--model NAME) it can be converted: {how}")
    if name in WITH_EXPANDED_BASES[to]:
        free = name.removesuffix("-xs")
        notes.append(f"{name} is exported as {free}: its frozen bases are multiplied in, exact up to rounding")
        return expand_bases(adapter, weights)
    if to == "comfy" and weights is not None:
        deltas = convert_to_diff(adapter, weights)
        size = sum(tensor.numel() for params in deltas.tensors.values() for tensor in params.values())
        notes.append(f"{name} is exported as full weight deltas: exact up to rounding, {size / 1e6:.1f} M values")
        return deltas
    raise AdapterError(f"{to} has no {name}. It can be {ways}")


def _remove_layers(adapter: Adapter, paths: list[str]) -> Adapter:
    return replace(adapter, tensors={path: params for path, params in adapter.tensors.items() if path not in paths})


def _read_pickle(source: Path, weights: Weights | None) -> tuple[Adapter, list[str]]:
    """Read an adapter from a pickle. Only tensors and plain containers are ever built; anything else is refused."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{source} is refused: torch's weights-only reader cannot read it ({reason[:200]}). It is damaged, or "
            f"holds more than tensors, which may be code. Ask its author for a .safetensors file."
        ) from error
    tensors, settings = _find_state(source, content)
    form = identify_format(str(source), tensors)
    if form == NATIVE:
        return _parse_native_state(source, tensors, settings)
    notes = ["read from a pickle with the weights-only reader"]
    if form == PEFT:
        return parse_peft_tensors(str(source), tensors, read_peft_config(source.parent), {}, weights), notes
    return read_comfy(str(source), tensors, {}), notes


def _find_state(source: Path, content: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Find the dict with most tensors, at the top or one level down, and the settings beside it."""
    candidates = [content, *content.values()] if isinstance(content, dict) else []
    states = [
        {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
        for found in candidates
        if isinstance(found, dict)
    ]
    best = max(states, key=len, default={})
    if not best:
        raise AdapterError(f"{source} holds no dict of tensors, so there is no adapter in it.")
    holders = [content, content.get("hyper_parameters"), content.get("metadata")]
    found = (holder["lora_config"] for holder in holders if isinstance(holder, dict) and "lora_config" in holder)
    settings: Any = next(found, {})
    if isinstance(settings, str):
        return best, {"lora_config": settings}
    try:
        return best, {"lora_config": json.dumps(settings)} if settings else {}
    except (TypeError, ValueError) as error:
        raise AdapterError(f"The lora_config of {source} is not plain data: {error}.") from error


def _parse_native_state(
    source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[Adapter, list[str]]:
    """Parse native keys below whatever wrapper the trainer saved them with; other tensors are dropped."""
    found = {key: tensor.contiguous() for key, tensor in tensors.items() if NATIVE_KEY.match(key)}
    dropped = len(tensors) - len(found)
    metadata = {**metadata, **read_settings_beside(source, metadata)}
    notes = ["read from a pickle with the weights-only reader"]
    if dropped:
        notes.append(f"{dropped} tensors of the file do not belong to the adapter and were dropped")
    if not metadata:
        notes.append("it has no lora_config: alpha is assumed to equal the rank, and include and exclude are unknown")
    return read_native(str(source), found, metadata), notes
