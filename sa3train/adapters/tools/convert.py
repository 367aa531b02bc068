"""Adapters from one format to another (native, PEFT folder, ComfyUI), and out of pickles by the weights-only reader."""

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.comfy import left_out_of_comfy, read_comfy, write_comfy
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.formats.native import MARKER, is_native, read_native
from sa3train.adapters.formats.peft import adapter_from_peft, read_config
from sa3train.adapters.spec import PEFT_METHODS, PLAY_ONLY
from sa3train.adapters.tools.edit import Weights, as_difference, differences, merged, unfrozen
from sa3train.adapters.tools.history import extended
from sa3train.adapters.tools.low_rank import Cut, Loss
from sa3train.core.errors import AdapterError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FORMATS = ("native", "peft", "comfy")
EXACT = {
    "native": (),
    "peft": ("lora", "dora-rows", *PEFT_METHODS),
    "comfy": ("lora", "diff"),
}
"""Kinds that a format carries as they are; native carries all."""
BY_FREE_FACTORS = {"native": (), "peft": ("lora-xs", "dora-rows-xs"), "comfy": ("lora-xs",)}
"""-xs kinds that it carries exactly once their bases are multiplied in, which takes the base model."""


@dataclass
class Conversion:
    """What was written, what could not be carried, and the error measured on what was written (None: not measured)."""

    adapter: Adapter
    notes: list[str] = field(default_factory=list)
    loss: Loss | None = None


def read_any(path: str | os.PathLike[str]) -> tuple[Adapter, list[str]]:
    """The adapter at `path`, pickles included, and notes on what was left behind in it."""
    source = Path(path)
    if source.suffix.lower() in PICKLES and source.is_file():
        return _read_pickle(source)
    return load_adapter(source), []


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    weights: Weights | None = None,
    cut: Cut | None = None,
    dtype: torch.dtype | None = torch.float16,
) -> Conversion:
    """Write the adapter at `source` to `target` as "native", "peft" or "comfy".

    What the format cannot carry exactly goes out as differences (ComfyUI) or, with `cut`, as a lora of low rank; both
    need the base model's `weights`. With `weights` the written file is read again and its error measured. Raises
    `AdapterError` when the format cannot carry the adapter, saying what would help.
    """
    _check_target(Path(target), to)
    original, notes = read_any(source)
    adapter = _carried(original, to, weights, cut, notes)
    metadata = extended(adapter, "convert", to=to, of=Path(source).name)
    adapter = replace(adapter, metadata=metadata)
    if to == "comfy":
        left_out = left_out_of_comfy(adapter)
        if left_out:
            notes.append(
                f"LEFT OUT: {len(left_out)} layer(s) of the duration embedder ({', '.join(left_out)}), which ComfyUI "
                f"cannot patch; it will sound a little different there"
            )
        if adapter.spec.include or adapter.spec.exclude or adapter.spec.dropout:
            notes.append("dropout and layer filters are kept in the metadata, which ComfyUI does not read")
        adapter = _without(adapter, left_out)
        write_comfy(target, adapter, dtype)
    else:
        save_adapter(target, adapter, dtype)
    return Conversion(adapter, notes, None if weights is None else _measured(original, target, to, weights))


def _check_target(target: Path, to: str) -> None:
    if to not in FORMATS:
        raise AdapterError(f"unknown format {to!r}; choose one of {', '.join(FORMATS)}.")
    if (to == "peft") == (target.suffix == ".safetensors"):
        wanted = "a folder, without .safetensors" if to == "peft" else "a file that ends in .safetensors"
        raise AdapterError(f"{target} does not suit --to {to}: give {wanted}.")


def _carried(adapter: Adapter, to: str, weights: Weights | None, cut: Cut | None, notes: list[str]) -> Adapter:
    kind = adapter.spec.kind
    exact = kind in EXACT[to] or to == "native"
    if cut is not None:
        if exact and kind not in PLAY_ONLY:
            raise AdapterError(f"{kind} goes into {to} as it is, so a rank would only lose; use: sa3-adapter resize.")
        approximate, loss = merged([adapter], [1.0], cut, weights, tool="approximate")
        notes.append(
            f"{kind} is approximated by lora of rank {_span(approximate)}, error {loss.relative:.3%} of the change"
        )
        notes.extend(f"not carried: {what}" for what in loss.left_out)
        return approximate
    if exact:
        if kind in PLAY_ONLY:
            notes.append(
                f"of the tools that read native files only sa3train plays {kind}; others want --model and --rank"
            )
        return adapter
    if weights is None:
        raise AdapterError(
            f"{to} has no {kind}. With the base model (--model NAME) it can be carried: "
            + ("exactly, its bases multiplied in." if kind in BY_FREE_FACTORS[to] else _ways(to))
        )
    if kind in BY_FREE_FACTORS[to]:
        notes.append(
            f"{kind} goes out as {kind.removesuffix('-xs')}: its frozen bases are multiplied in, exact but for rounding"
        )
        return unfrozen(adapter, weights)
    if to == "comfy":
        whole = as_difference(adapter, weights)
        size = sum(tensor.numel() for params in whole.tensors.values() for tensor in params.values())
        notes.append(
            f"{kind} goes out as whole differences of weights: exact but for rounding, {size / 1e6:.1f} M numbers"
        )
        return whole
    raise AdapterError(f"{to} has no {kind}. It can be carried {_ways(to)}")


def _ways(to: str) -> str:
    as_lora = "as a lora of --rank R (or --energy SHARE), whose error is stated."
    return f"as whole differences, or {as_lora}" if to == "comfy" else as_lora


def _measured(original: Adapter, target: str | os.PathLike[str], to: str, weights: Weights) -> Loss:
    """The error of what was written against the original, over the layers that the format can carry."""
    if to == "comfy":
        original = _without(original, left_out_of_comfy(original))
    return differences(original, load_adapter(target), weights)


def _without(adapter: Adapter, paths: list[str]) -> Adapter:
    return adapter.with_tensors({path: params for path, params in adapter.tensors.items() if path not in paths})


def _span(adapter: Adapter) -> str:
    ranks = [adapter.spec.rank_of(path) for path in adapter.tensors]
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _read_pickle(source: Path) -> tuple[Adapter, list[str]]:
    """An adapter out of a pickle. Only tensors and plain containers are ever built; anything else is refused."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{source} is refused: torch's weights-only reader cannot read it ({reason[:200]}). It is damaged, or "
            f"holds more than tensors, which may be code; ask its author for a .safetensors file."
        ) from error
    tensors, settings = _state_of(source, content)
    keys = list(tensors)
    if is_native(keys):
        return _native_from_state(source, tensors, settings)
    notes = ["read from a pickle with the weights-only reader"]
    if any(key.startswith("base_model.model.") for key in keys):
        return adapter_from_peft(str(source), tensors, read_config(source.parent), {}), notes
    if any(key.startswith(("diffusion_model.", "lora_unet_")) for key in keys):
        return read_comfy(str(source), tensors, {}), notes
    raise AdapterError(
        f"{source} holds no adapter: none of its {len(keys)} tensors has an adapter's name ({keys[:2]})."
    )


def _state_of(source: Path, content: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The dict with most tensors, on top or one level down, and the settings beside it."""
    candidates = [content, *content.values()] if isinstance(content, dict) else []
    states = [
        {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
        for found in candidates
        if isinstance(found, dict)
    ]
    best = max(states, key=len, default={})
    if not best:
        raise AdapterError(f"{source} holds no table of tensors, so there is no adapter in it.")
    places = [content, content.get("hyper_parameters"), content.get("metadata")]
    found = (place["lora_config"] for place in places if isinstance(place, dict) and "lora_config" in place)
    settings: Any = next(found, {})
    if isinstance(settings, str):
        return best, {"lora_config": settings}
    try:
        return best, {"lora_config": json.dumps(settings)} if settings else {}
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the lora_config of {source} is no plain table: {error}.") from error


def _native_from_state(
    source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[Adapter, list[str]]:
    """Native keys, under whatever wrapper the trainer kept them; what is not the adapter's is left behind."""
    kept, left = {}, 0
    for key, tensor in tensors.items():
        path, marker, name = key.partition(MARKER)
        if marker and name not in ("U", "V"):
            kept[f"{_unwrapped(path)}{MARKER}{name}"] = tensor.contiguous()
        else:
            left += 1
    notes = ["read from a pickle with the weights-only reader"]
    if left:
        notes.append(f"{left} tensors of the file are not the adapter's and were left behind")
    if not metadata:
        notes.append("it has no lora_config: alpha is taken to equal the rank, and filters are unknown")
    adapter = read_native(str(source), kept, metadata)
    return replace(adapter, source=str(source)), notes


def _unwrapped(path: str) -> str:
    found = re.search(r"(?:^|\.)(conditioners\..*)$", path)
    if found:
        return found.group(1)
    return "model." + re.sub(r"^(?:.*?\.)?(?:model\.)+|^", "", path, count=1)
