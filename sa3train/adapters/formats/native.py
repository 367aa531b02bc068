"""Adapter files of the released layout: safetensors, F16, keys `PATH.parametrizations.weight.0.NAME`."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from sa3train.adapters.adapter import DECODER, Adapter
from sa3train.adapters.apply.effective_weight import detect_dora_type
from sa3train.adapters.apply.products import LOHA, LOKR, OFT, check_product, is_product
from sa3train.adapters.formats.naming import NATIVE_KEY, collect_layers
from sa3train.adapters.spec import ADAPTER_TYPES, BASES, BIAS_CHANGE, KINDS, PEFT_METHODS, AdapterSpec, get_layer_type
from sa3train.core.errors import AdapterError
from sa3train.core.safetensors_file import parse_json

MARKER = ".parametrizations.weight.0."
IGNORED = ("baked_vnorm_row", "baked_vnorm_col")
"""Norms of the base weights that some tools store; they follow from the weights and are not used."""


def read_native(source: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """Read an adapter from the tensors and metadata of a file of the released layout.

    What `lora_config` does not say follows from the tensors: the type from the names, the rank from the shapes, and
    alpha equals the rank.

    Args:
        source: The file's name, for messages.
        tensors: Its tensors by key.
        metadata: Its metadata.

    Returns:
        The adapter.

    Raises:
        AdapterError: If names, shapes and metadata do not make an adapter.
    """
    found = {key: match for key in tensors if (match := NATIVE_KEY.match(key))}
    others = [key for key in tensors if key not in found]
    if others:
        raise AdapterError(
            f"{source} mixes adapter tensors with {len(others)} others, such as {others[0]}: it is no adapter."
        )
    layers = collect_layers(
        source, ((match[1], match[3], tensors[key]) for key, match in found.items() if match[3] not in IGNORED)
    )
    return build_adapter(source, layers, metadata)


def build_adapter(source: str, layers: dict[str, dict[str, Tensor]], metadata: Mapping[str, str]) -> Adapter:
    """Build an adapter from its tensors and the metadata of its file.

    Args:
        source: The file's name, for messages.
        layers: Tensors by module path and name.
        metadata: Metadata, of which `lora_config` has the settings.

    Returns:
        The adapter.

    Raises:
        AdapterError: If they do not make an adapter.
    """
    return check_tensors(Adapter(_parse_spec(source, layers, metadata), layers, dict(metadata), source))


def build_native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Build the tensors of a file of the released layout, those in the decoder named from the decoder on.

    Args:
        adapter: The adapter.

    Returns:
        Its tensors by key.
    """
    return {
        f"{path.removeprefix(DECODER)}{MARKER}{name}": tensor
        for path, params in adapter.tensors.items()
        for name, tensor in params.items()
    }


def build_native_metadata(adapter: Adapter) -> dict[str, str]:
    """Build the metadata of a file of the released layout.

    Args:
        adapter: The adapter.

    Returns:
        Its metadata with `lora_config` from its spec; settings of other tools stay in it. By its `target`, other tools
        know adapters on the decoder.
    """
    others = {key: value for key, value in adapter.metadata.items() if key != "lora_config"}
    earlier = _earlier_config(adapter)
    target = {"target": "decoder"} if adapter.part == "decoder" else {}
    return others | {"lora_config": json.dumps(earlier | build_lora_config(adapter.spec) | target)}


def build_lora_config(spec: AdapterSpec) -> dict[str, Any]:
    """Build `lora_config` as the released trainer writes it, plus what only this project has, where it is used.

    Other tools do not know rsLoRA, so `alpha` is the one that gives the same scale as alpha / rank.

    Args:
        spec: The adapter's settings.

    Returns:
        The config as plain values.
    """
    alpha = spec.rank if spec.alpha is None and spec.adapter_type in KINDS else spec.alpha
    config: dict[str, Any] = {
        "rank": spec.rank,
        "alpha": alpha * spec.rank**0.5 if spec.rslora and alpha is not None else alpha,
        "adapter_type": spec.adapter_type,
        "dropout": spec.dropout,
        "include": None if spec.include is None else list(spec.include),
        "exclude": None if spec.exclude is None else list(spec.exclude),
    }
    if spec.rslora:
        config |= {"rslora": True, "alpha_of_rslora": alpha}
    if spec.rank_pattern:
        config["rank_pattern"] = dict(spec.rank_pattern)
    own_alpha = dict(spec.rank_pattern) if spec.alpha is None and spec.adapter_type in KINDS else {}
    if own_alpha or spec.alpha_pattern:
        config["alpha_pattern"] = dict(spec.alpha_pattern) | {
            pattern: alpha for pattern, alpha in own_alpha.items() if pattern not in spec.alpha_pattern
        }
    if spec.options:
        config["options"] = dict(spec.options)
    return config


def build_spec(adapter_type: str, ranks: Mapping[str, int], **settings: Any) -> AdapterSpec:
    """Build a spec with given ranks: the most common one as `rank`, the others as `rank_pattern`.

    Args:
        adapter_type: The adapter type.
        ranks: Ranks by module path; empty where only biases change.
        **settings: Other settings of the spec.

    Returns:
        The spec.
    """
    commonest = Counter(ranks.values() or [1]).most_common(1)[0][0]
    pattern = dict(ranks) if len(set(ranks.values())) > 1 else {}
    return AdapterSpec(adapter_type, rank=commonest, rank_pattern=pattern, **settings)


def unify_ranks(adapter: Adapter) -> Adapter:
    """Give every layer one rank and one scale, for tools that know one of each.

    Smaller ranks are filled up with zeros and other scales multiplied in, which changes no weight.

    Args:
        adapter: A lora, dora or bora adapter with free factors.

    Returns:
        The same adapter with the largest of its ranks and the most common of its scales.
    """
    spec = adapter.spec
    rank = max(spec.get_rank(path) for path in adapter.tensors)
    scale = Counter(spec.get_scale(path) for path in adapter.tensors).most_common(1)[0][0]
    layers = {}
    for path, params in adapter.tensors.items():
        missing, factor = rank - spec.get_rank(path), spec.get_scale(path) / scale
        A_RI, B_OR = params["lora_A"], params["lora_B"] if factor == 1 else params["lora_B"].float() * factor
        layers[path] = {**params, "lora_A": pad(A_RI, (0, 0, 0, missing)), "lora_B": pad(B_OR, (0, missing))}
    settings = {name: getattr(spec, name) for name in ("dropout", "include", "exclude")}
    unified = AdapterSpec(spec.adapter_type, rank=rank, alpha=scale * rank, **settings)
    return replace(adapter, spec=unified, tensors=layers)


def has_several_scales(adapter_type: str, scales: Iterable[float]) -> bool:
    """Check whether tools that know one alpha would play some layers too loud or too soft.

    Args:
        adapter_type: The adapter's type.
        scales: The scale of each layer.

    Returns:
        Whether it has free or frozen bases and more than one scale.
    """
    return adapter_type in KINDS and len(set(scales)) > 1


def unify_scales(adapter: Adapter) -> Adapter:
    """Give an adapter with free factors and several scales one rank and one scale, see `unify_ranks`.

    Args:
        adapter: Any adapter.

    Returns:
        The adapter, itself where other tools play it as it is, or it is of an -xs type.
    """
    spec, scales = adapter.spec, map(adapter.spec.get_scale, adapter.tensors)
    is_free = not spec.adapter_type.endswith("-xs")
    return unify_ranks(adapter) if is_free and has_several_scales(spec.adapter_type, scales) else adapter


def check_tensors(adapter: Adapter) -> Adapter:
    """Check that every layer holds the tensors of the adapter's type, in shapes that fit together.

    Args:
        adapter: The adapter.

    Returns:
        The adapter.

    Raises:
        AdapterError: If the adapter is empty, incomplete or damaged.
    """
    if not adapter.tensors:
        raise AdapterError(f"{adapter.source} holds no adapter tensors.")
    for path, params in adapter.tensors.items():
        for name, tensor in params.items():
            if not tensor.is_floating_point() or tensor.itemsize < 2 or 0 in tensor.shape:
                raise AdapterError(
                    f"{adapter.source}: {path} {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but adapters "
                    f"hold real numbers. The file is damaged."
                )
        layer_type = get_layer_type(adapter.spec.adapter_type, params)
        if layer_type not in PEFT_METHODS:
            _check_names(adapter, path, layer_type)
            _check_shapes(adapter, path, params)
    return adapter


def _check_names(adapter: Adapter, path: str, layer_type: str) -> None:
    names = set(adapter.tensors[path])
    if layer_type == "comfy" and is_product(names):
        check_product(path, adapter.tensors[path])
        return
    if layer_type == "diff":
        needed: tuple[str, ...] = ("diff",)
        fits = bool(names) and names <= {"diff", BIAS_CHANGE}
    else:
        kind = KINDS["dora-rows" if layer_type == "comfy" else layer_type]
        needed = kind.parameters
        fits = set(needed) <= names <= {*needed, *kind.optional} and len(names & set(BASES)) in (0, len(BASES))
    if not fits:
        raise AdapterError(
            f"{adapter.source} is an incomplete or damaged {layer_type} adapter: {path} has {sorted(names)}, and "
            f"needs {sorted(needed)}."
        )


def _check_shapes(adapter: Adapter, path: str, params: Mapping[str, Tensor]) -> None:
    rank = adapter.spec.get_rank(path)
    for name, tensor in params.items():
        if name in ("diff", OFT, *LOHA, *LOKR):
            continue
        is_vector = name == BIAS_CHANGE or (name.startswith("magnitude") and adapter.spec.adapter_type != "comfy")
        dimensions = 1 if is_vector else tensor.ndim if name == "magnitude" and tensor.ndim > 2 else 2
        ranks = {"lora_A": (0,), "lora_B": (1,), "M_xs": (0, 1), "U": (1,), "V": (1,)}.get(name, ())
        if tensor.ndim != dimensions or any(tensor.shape[axis] != rank for axis in ranks):
            raise AdapterError(
                f"{adapter.source}: {path} {name} has shape {tuple(tensor.shape)}, which does not fit rank {rank}. "
                f"The file is damaged, or its metadata belongs to another adapter."
            )


def _earlier_config(adapter: Adapter) -> dict[str, Any]:
    """Return settings of `lora_config` that belong to other tools."""
    text = adapter.metadata.get("lora_config")
    earlier = parse_json(text, "lora_config") if text else {}
    ours = {"rank", "alpha", "adapter_type", "dropout", "include", "exclude", "rslora", "alpha_of_rslora"}
    ours |= {"rank_pattern", "alpha_pattern", "options"}
    return {key: value for key, value in earlier.items() if key not in ours} if isinstance(earlier, dict) else {}


def _parse_spec(source: str, layers: dict[str, dict[str, Tensor]], metadata: Mapping[str, str]) -> AdapterSpec:
    text = metadata.get("lora_config")
    if text is None:
        return _infer_spec(source, layers, None)
    config = parse_json(text, f"the lora_config of {source}")
    if not isinstance(config, dict):
        raise AdapterError(f"The lora_config of {source} is not a JSON object.")
    adapter_type = config.get("adapter_type")
    if adapter_type is not None and adapter_type not in (*ADAPTER_TYPES, "dora"):
        raise AdapterError(
            f"{source} has the unknown adapter_type {str(adapter_type)[:60]!r}. Known: {', '.join(KINDS)}."
        )
    if adapter_type in (None, "dora") or config.get("rank") is None:
        inferred = _infer_spec(source, layers, adapter_type)
        adapter_type = inferred.adapter_type
        if config.get("rank") is None:
            config = {"rank_pattern": inferred.rank_pattern} | config | {"rank": inferred.rank}
    rslora = config.get("rslora") is True
    try:
        return AdapterSpec(
            adapter_type,
            rank=config["rank"],
            alpha=config.get("alpha_of_rslora" if rslora else "alpha"),
            dropout=config.get("dropout") or 0.0,
            include=config.get("include") or None,
            exclude=config.get("exclude") or None,
            rslora=rslora,
            rank_pattern=_get_mapping(config, "rank_pattern"),
            alpha_pattern=_get_mapping(config, "alpha_pattern"),
            options=_get_mapping(config, "options"),
        )
    except AdapterError as error:
        raise AdapterError(f"The lora_config of {source} is invalid: {error}") from error


def _get_mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} must be a mapping, not {str(value)[:60]!r}.")
    return value


def _infer_spec(source: str, layers: dict[str, dict[str, Tensor]], adapter_type: Any) -> AdapterSpec:
    """Infer the type, if it is None or "dora", and the ranks from the tensors."""
    names = set().union(*layers.values()) - {BIAS_CHANGE, *BASES} if layers else set()
    if adapter_type == "dora" or (adapter_type is None and {"lora_A", "lora_B", "magnitude"} == names):
        adapter_type = _resolve_dora(source, layers)
    elif adapter_type is None and {"M_xs", "magnitude"} == names:
        raise AdapterError(f"{source} has no metadata to tell dora-rows-xs from dora-cols-xs. Add its lora_config.")
    elif adapter_type is None:
        adapter_type = next((kind.name for kind in KINDS.values() if set(kind.parameters) == names), "lora")
    ranks = {
        path: params[name].shape[0]
        for path, params in layers.items()
        for name in ("M_xs", "lora_A")
        if name in params and params[name].ndim
    }
    if adapter_type in KINDS and (not ranks or 0 in ranks.values()):
        raise AdapterError(f"{source} holds no adapter tensors; found {sorted(names)[:8]}.")
    return build_spec(adapter_type, ranks or {"": 16})


def _resolve_dora(source: str, layers: dict[str, dict[str, Tensor]]) -> str:
    """Detect rows or columns by the magnitudes' shapes, and flatten these in place."""
    magnitudes = [params["magnitude"] for params in layers.values() if "magnitude" in params]
    types = {detect_dora_type(magnitude) for magnitude in magnitudes}
    if len(types) > 1:
        raise AdapterError(f"{source} mixes magnitudes by row and by column, so it cannot be read as one adapter.")
    for params in layers.values():
        if "magnitude" in params:
            params["magnitude"] = params["magnitude"].reshape(-1)
    return types.pop() if types else "dora-rows"
