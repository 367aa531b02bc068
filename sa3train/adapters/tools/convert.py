"""Convert adapters between formats (native, PEFT folder, ComfyUI, sa3.cpp), and read pickles weights-only."""

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
from sa3train.adapters.apply.svd_basis import attach_bases
from sa3train.adapters.formats.comfy import read_comfy
from sa3train.adapters.formats.comfy_write import list_comfy_unsupported, write_comfy
from sa3train.adapters.formats.diffusers import write_diffusers_folder
from sa3train.adapters.formats.io import (
    PICKLES,
    is_file_name,
    load_adapter,
    name_source,
    read_settings_beside,
    save_adapter,
)
from sa3train.adapters.formats.naming import NATIVE, NATIVE_KEY, PEFT, identify_format
from sa3train.adapters.formats.native import read_native, unify_scales
from sa3train.adapters.formats.peft import parse_peft_tensors, read_peft_config
from sa3train.adapters.formats.sa3cpp import (
    GGUF_DTYPES,
    fit_to_sa3cpp,
    import_gguf,
    is_gguf_name,
    write_gguf,
    write_pair,
)
from sa3train.adapters.spec import BIAS_CHANGE, CARRIED_BY, KINDS, PEFT_METHODS, get_layer_type
from sa3train.adapters.tools.base_weights import LoadedModel, Weights, get_base_weights, get_weights
from sa3train.adapters.tools.combine import combine
from sa3train.adapters.tools.comfy_export import can_export, make_for_comfy
from sa3train.adapters.tools.edit import drop_bias_changes, expand_bases, has_own_bases, merge
from sa3train.adapters.tools.history import append_history
from sa3train.adapters.tools.low_rank import Truncation
from sa3train.adapters.tools.measure import measure_written
from sa3train.adapters.tools.results import EditResult
from sa3train.core.dtypes import DTYPES, get_dtype
from sa3train.core.errors import AdapterError, MissingBaseError
from sa3train.core.files import check_target
from sa3train.core.text import format_share

SA3CPP = ("sa3cpp", "gguf")
FORMATS = ("native", "peft", "diffusers", "comfy", *SA3CPP)
FOLDERS = ("peft", "diffusers")
"""Formats that are folders."""


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
    dtype: str | None = None,
    overwrite: bool = False,
    dense: bool = False,
    svd_bases: str | None = None,
) -> EditResult:
    """Convert an adapter to another format.

    What the format cannot carry exactly is exported as full weight deltas (ComfyUI) or approximated by a lora; both
    need the base model. The written file is read again, and its error measured.

    Args:
        source: A file, PEFT folder or pickle.
        target: The file to write, or the folder for PEFT and diffusers.
        to: One of `FORMATS`; None means native for a .safetensors file, gguf for a .gguf file, else PEFT.
        model: The base model. With it, the error is that of the weights' change, else that of the stored tensors.
        truncation: The rank of a lora approximation; None converts exactly.
        dtype: Dtype of the written file; None means fp32 for gguf, else fp16.
        overwrite: Replace what exists at the target, but never a source.
        dense: Write full weight deltas, which any version of ComfyUI plays alike.
        svd_bases: `svd_bases.pt` of the released trainer, whose bases an -xs type was trained with.

    Returns:
        What was written.

    Raises:
        AdapterError: If the format cannot carry the adapter, or a setting has no effect.
    """
    to = to or ("gguf" if is_gguf_name(target) else "native" if is_file_name(target) else "peft")
    dtype = dtype or ("fp32" if to == "gguf" else "fp16")
    _check_target(Path(target), to, dtype, overwrite)
    check_target(target, [source], overwrite)
    original, notes = read_any(source, None if model is None else get_weights(model))
    weights, warnings = get_base_weights([original], model)
    not_carried: list[str] = []
    if svd_bases is not None:
        original = attach_bases(original, svd_bases, weights)
    if dense and (to != "comfy" or truncation is not None):
        raise AdapterError("dense=True writes full weight deltas for ComfyUI. Set to=comfy, and no rank, or remove it.")
    if to == "comfy" and truncation is None:
        adapter = make_for_comfy(original, weights, get_dtype(dtype), dense, notes)
    else:
        adapter = _make_portable(original, to, weights, truncation, notes, warnings, not_carried)
    adapter = replace(adapter, metadata=append_history(adapter, "convert", to=to, of=Path(source).name))
    adapter, left_out = _write(target, to, adapter, dtype, notes, warnings)
    error = measure_written(_remove_layers(original, left_out), adapter, target, weights)
    return EditResult(target, adapter, notes, warnings, not_carried=[*not_carried, *left_out], **error)


def _write(
    target: str | Path, to: str, adapter: Adapter, dtype: str, notes: list[str], warnings: list[str]
) -> tuple[Adapter, list[str]]:
    """Write an adapter that the format can carry; adds to `notes` and `warnings`, and lists layers it leaves out."""
    left_out: list[str] = []
    if to == "comfy":
        left_out = list_comfy_unsupported(adapter)
        if left_out:
            warnings.append(
                f"not carried over: {len(left_out)} layer(s) of the duration embedder ({', '.join(left_out)}), "
                f"which ComfyUI cannot patch; it will sound slightly different there"
            )
        if adapter.spec.include or adapter.spec.exclude or adapter.spec.dropout:
            notes.append("dropout, include and exclude are kept in the metadata, which ComfyUI does not read")
        write_comfy(target, adapter, get_dtype(dtype))
        adapter = _remove_layers(adapter, left_out)
    elif to in SA3CPP:
        adapter, left_out = fit_to_sa3cpp(adapter)
        if left_out:
            warnings.append(f"not carried over: {', '.join(left_out)}, which sa3.cpp cannot adapt")
        if to == "gguf" and dtype != "fp32":
            warnings.append(
                f"sa3.cpp does not play every type of adapter in {dtype} (docs/interchange.md); fp32 it does"
            )
        (write_gguf if to == "gguf" else write_pair)(target, adapter, dtype)
    elif to == "diffusers":
        write_diffusers_folder(target, adapter, get_dtype(dtype))
    else:
        save_adapter(target, adapter, get_dtype(dtype))
    if to in ("comfy", *SA3CPP):
        notes.append(f"the file has {Path(target).stat().st_size / 1e6:.1f} MB")
    return adapter, left_out


def _check_target(target: Path, to: str, dtype: str, overwrite: bool) -> None:
    if to not in FORMATS:
        raise AdapterError(f"Unknown format {to!r}. Choose one of {', '.join(FORMATS)}.")
    allowed = {"gguf": tuple(GGUF_DTYPES), "sa3cpp": ("fp16", "fp32")}.get(to, tuple(DTYPES))
    if dtype not in allowed:
        raise AdapterError(f"--to {to} cannot be written in {dtype}. Choose one of {', '.join(allowed)}.")
    if to == "sa3cpp":
        check_target(target.with_suffix(".json"), [], overwrite)
    if to == "gguf":
        import_gguf()
        if not is_gguf_name(target):
            raise AdapterError(f"{target} does not suit to=gguf. Give a file that ends in .gguf.")
    elif (to in FOLDERS) == is_file_name(target):
        wanted = "a folder" if to in FOLDERS else "a file that ends in .safetensors"
        raise AdapterError(f"{target} does not suit to={to}. Give {wanted}.")


def _make_portable(
    adapter: Adapter,
    to: str,
    weights: Weights | None,
    truncation: Truncation | None,
    notes: list[str],
    warnings: list[str],
    not_carried: list[str],
) -> Adapter:
    """Make the adapter that the format can carry; adds to `notes`, `warnings` and `not_carried`."""
    is_comfy = adapter.spec.adapter_type == "comfy" and to != "comfy" and truncation is None
    if is_comfy and weights is not None and (combined := combine([adapter], [1.0], weights, tool="convert")):
        adapter = combined[0]
        notes.append(f"ComfyUI's DoRA becomes {adapter.spec.adapter_type}, exact up to rounding")
    name = adapter.spec.adapter_type
    types = {get_layer_type(name, params) for params in adapter.tensors.values()}
    has_bias = any(BIAS_CHANGE in params for params in adapter.tensors.values())
    if has_bias or types != {name}:
        name += " with changes of biases" if has_bias else " with full weight deltas"
    carrier = "sa3cpp" if to in SA3CPP else to
    exact = to == "native" or (not has_bias and all(carrier in CARRIED_BY[kind] for kind in types))
    exact = can_export(adapter) if to == "comfy" else exact
    if truncation is not None:
        if exact and name in (*KINDS, *PEFT_METHODS):
            raise AdapterError(f"{to} carries {name} exactly. Remove the rank; to truncate it use: sa3-adapter resize.")
        approximate, error = merge([adapter], [1.0], truncation, weights, tool="approximate")
        if to in (*FOLDERS, *SA3CPP):
            approximate, error.not_carried = drop_bias_changes(approximate)
        rank = approximate.spec.format_rank(approximate.tensors)
        notes.append(
            f"{name} is approximated by a lora of rank {rank}, error {format_share(error.relative)} of the change"
        )
        warnings.extend(error.warnings)
        not_carried.extend(error.not_carried)
        return approximate
    if exact:
        if to == "native" and name not in (*KINDS, *PEFT_METHODS):
            notes.append(
                f"among tools that read native files only sa3train supports {name}; others need model=NAME and rank=R"
            )
        unified = unify_scales(adapter) if to == "native" else adapter
        if unified is not adapter:
            notes.append("other tools know one rank and one alpha: smaller ranks are filled up, scales multiplied in")
        return unified
    as_lora = "approximated by a lora of rank=R (or explained_variance=SHARE), with its error reported."
    free = name.removesuffix("-xs")
    is_expandable = free != name and carrier in CARRIED_BY.get(free, ())
    if weights is None and not (is_expandable and has_own_bases(adapter)):
        how = "exactly, by multiplying its bases in." if is_expandable else as_lora
        raise MissingBaseError(f"{to} has no {name}. With its base model (model=NAME) it can be converted: {how}")
    if is_expandable:
        notes.append(f"{name} is exported as {free}: its frozen bases are multiplied in, exact up to rounding")
        return expand_bases(adapter, weights)
    raise AdapterError(f"{to} has no {name}. It can be {as_lora}")


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
