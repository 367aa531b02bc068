"""Released adapter files: safetensors, F16, `lora_config` metadata, keys `PATH.parametrizations.weight.0.NAME`."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import legacy_dora_kind
from sa3train.adapters.spec import KINDS, PEFT_METHODS, PLAY_ONLY, AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import parse_json

MARKER = ".parametrizations.weight.0."
IGNORED = ("baked_vnorm_row", "baked_vnorm_col")
"""Norms of the training base that some tools store; they can be had from the weights and are not used."""


def is_native(keys: list[str]) -> bool:
    """Whether a file with these keys has the released layout."""
    return any(MARKER in key for key in keys)


def read_native(source: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """An adapter from the tensors and metadata of a released-layout file.

    Without metadata: kind from the names, rank from the shapes, alpha = rank. Raises `AdapterError` when names, shapes
    and metadata do not make an adapter.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        path, marker, name = key.partition(MARKER)
        if not marker:
            strangers.append(key)
        elif name not in IGNORED:
            layers.setdefault(path, {})[name] = tensor
    if strangers:
        raise AdapterError(
            f"{source} mixes adapter tensors with {len(strangers)} others, such as {strangers[0]}: it is no adapter."
        )
    spec = _spec(source, layers, metadata)
    return checked(Adapter(spec, layers, dict(metadata), source))


def native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by their keys in a released-layout file."""
    return {
        f"{path}{MARKER}{name}": tensor for path, params in adapter.tensors.items() for name, tensor in params.items()
    }


def native_metadata(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata with `lora_config` written anew from its spec; everything else is kept."""
    kept = {key: value for key, value in adapter.metadata.items() if key != "lora_config"}
    earlier = _earlier_config(adapter)
    return kept | {"lora_config": json.dumps(earlier | config_of(adapter.spec))}


def config_of(spec: AdapterSpec) -> dict[str, Any]:
    """`lora_config` as the released trainer writes it, plus what only this project has, where it is used.

    Other players know no rsLoRA, so `alpha` is written as the alpha that gives the same scale with alpha / rank.
    """
    alpha = spec.rank if spec.alpha is None and spec.kind in KINDS else spec.alpha
    config: dict[str, Any] = {
        "rank": spec.rank,
        "alpha": alpha * spec.rank**0.5 if spec.rslora and alpha is not None else alpha,
        "adapter_type": spec.kind,
        "dropout": spec.dropout,
        "include": None if spec.include is None else list(spec.include),
        "exclude": None if spec.exclude is None else list(spec.exclude),
    }
    if spec.rslora:
        config |= {"rslora": True, "alpha_of_rslora": alpha}
    if spec.rank_pattern:
        config["rank_pattern"] = dict(spec.rank_pattern)
    own_alpha = dict(spec.rank_pattern) if spec.alpha is None and spec.kind in KINDS else {}
    if own_alpha or spec.alpha_pattern:
        config["alpha_pattern"] = dict(spec.alpha_pattern) | {
            pattern: alpha for pattern, alpha in own_alpha.items() if pattern not in spec.alpha_pattern
        }
    if spec.options:
        config["options"] = dict(spec.options)
    return config


def spec_of_ranks(kind: str, ranks: Mapping[str, int], **settings: Any) -> AdapterSpec:
    """A spec whose ranks are those given by module path: the commonest as the rank, the rest as a pattern."""
    commonest = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {} if set(ranks.values()) == {commonest} else dict(ranks)
    return AdapterSpec(kind, rank=commonest, rank_pattern=pattern, **settings)


def checked(adapter: Adapter) -> Adapter:
    """The adapter, once every layer holds the tensors of its kind in shapes that fit together."""
    if not adapter.tensors:
        raise AdapterError(f"{adapter.source} holds no adapter tensors.")
    kind = KINDS.get(adapter.spec.kind)
    for path, params in adapter.tensors.items():
        for name, tensor in params.items():
            if not tensor.is_floating_point():
                raise AdapterError(f"{adapter.source}: {path} {name} is {tensor.dtype}; adapters hold real numbers.")
        if kind is None:
            continue
        absent = [name for name in kind.parameters if name not in params]
        unknown = [name for name in params if name not in kind.parameters]
        if absent or unknown:
            raise AdapterError(
                f"{adapter.source} is an incomplete or damaged {kind.name} adapter: {path} has {sorted(params)}, and "
                f"needs {sorted(kind.parameters)}."
            )
        _check_shapes(adapter, path, params)
    return adapter


def _check_shapes(adapter: Adapter, path: str, params: Mapping[str, Tensor]) -> None:
    rank = adapter.spec.rank_of(path)
    for name, tensor in params.items():
        dimensions = 1 if name.startswith("magnitude") else 2
        ranks = {"lora_A": (0,), "lora_B": (1,), "M_xs": (0, 1)}.get(name, ())
        if tensor.ndim != dimensions or any(tensor.shape[axis] != rank for axis in ranks) or 0 in tensor.shape:
            raise AdapterError(
                f"{adapter.source}: {path} {name} has shape {tuple(tensor.shape)}, which does not fit rank {rank}. "
                f"The file is damaged, or its metadata belongs to another adapter."
            )


def _earlier_config(adapter: Adapter) -> dict[str, Any]:
    """What other tools wrote into `lora_config` and this project has no use for."""
    text = adapter.metadata.get("lora_config")
    earlier = parse_json(text, "lora_config") if text else {}
    ours = {"rank", "alpha", "adapter_type", "dropout", "include", "exclude", "rslora", "alpha_of_rslora"}
    ours |= {"rank_pattern", "alpha_pattern", "options"}
    return {key: value for key, value in earlier.items() if key not in ours} if isinstance(earlier, dict) else {}


def _spec(source: str, layers: dict[str, dict[str, Tensor]], metadata: Mapping[str, str]) -> AdapterSpec:
    text = metadata.get("lora_config")
    if text is None:
        return _spec_from_tensors(source, layers)
    config = parse_json(text, f"the lora_config of {source}")
    if not isinstance(config, dict):
        raise AdapterError(f"the lora_config of {source} is not a table of settings.")
    kind = config.get("adapter_type", "lora")
    if kind == "dora":
        kind = _resolve_dora(source, layers)
    if kind not in (*KINDS, *PEFT_METHODS, *PLAY_ONLY):
        raise AdapterError(f"{source} is of the unknown kind {str(kind)[:60]!r}; known: {', '.join(KINDS)}.")
    rslora = config.get("rslora") is True
    try:
        return AdapterSpec(
            kind,
            rank=config.get("rank", 16),
            alpha=config.get("alpha_of_rslora" if rslora else "alpha"),
            dropout=config.get("dropout") or 0.0,
            include=config.get("include") or None,
            exclude=config.get("exclude") or None,
            rslora=rslora,
            rank_pattern=_table(config, "rank_pattern"),
            alpha_pattern=_table(config, "alpha_pattern"),
            options=_table(config, "options"),
        )
    except AdapterError as error:
        raise AdapterError(f"the lora_config of {source} is wrong: {error}") from error


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} must be a table, not {str(value)[:60]!r}.")
    return value


def _spec_from_tensors(source: str, layers: dict[str, dict[str, Tensor]]) -> AdapterSpec:
    names = set().union(*layers.values()) if layers else set()
    if {"lora_A", "lora_B", "magnitude"} == names:
        kind = _resolve_dora(source, layers)
    elif {"M_xs", "magnitude"} == names:
        raise AdapterError(f"{source} has no metadata to tell dora-rows-xs from dora-cols-xs; add its lora_config.")
    else:
        kind = next((kind.name for kind in KINDS.values() if set(kind.parameters) == names), "lora")
    low_rank = "M_xs" if KINDS[kind].xs else "lora_A"
    ranks = {path: int(params[low_rank].shape[0]) for path, params in layers.items() if low_rank in params}
    if not ranks or 0 in ranks.values():
        raise AdapterError(f"{source} holds no adapter tensors; found {sorted(names)[:8]}.")
    return spec_of_ranks(kind, ranks)


def _resolve_dora(source: str, layers: dict[str, dict[str, Tensor]]) -> str:
    """Rows or columns, by the magnitudes' shapes, which are flattened in place."""
    magnitudes = [params["magnitude"] for params in layers.values() if "magnitude" in params]
    kinds = {legacy_dora_kind(magnitude) for magnitude in magnitudes}
    if len(kinds) > 1:
        raise AdapterError(f"{source} mixes magnitudes by row and by column; it cannot be read as one adapter.")
    for params in layers.values():
        if "magnitude" in params:
            params["magnitude"] = params["magnitude"].reshape(-1)
    return kinds.pop() if kinds else "dora-rows"
