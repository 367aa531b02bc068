"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`.

PEFT has two types of the family: lora, and dora-rows as its DoRA. Its other methods (LoKr, LoHa, OFT, …) are carried as
they are. A 1-D convolution's factors are (rank, in, taps) and (out, rank, 1) there.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.naming import (
    PEFT_PREFIX,
    collect_layers,
    get_module_path,
    identify_format,
    split_names,
)
from sa3train.adapters.formats.native import build_native_metadata, build_spec, check_tensors
from sa3train.adapters.formats.peft_initial import get_initialization, subtract_initial
from sa3train.adapters.formats.run_dir import ADAPTER_FILE
from sa3train.adapters.formats.saving import convert_for_saving
from sa3train.adapters.spec import BIAS_CHANGE, PEFT_METHODS, AdapterSpec
from sa3train.core.errors import AdapterError
from sa3train.core.files import replace_folder, write_text
from sa3train.core.safetensors_file import (
    parse_json,
    read_header,
    read_json_object,
    read_tensors,
    write_tensors,
)
from sa3train.core.user_files import read_file
from sa3train.data.sources.own_folders import identify_own_folder

CONFIG = "adapter_config.json"
DIFFUSERS_SETTINGS = "lora_adapter_metadata"
WEIGHTS = "adapter_model.safetensors"
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
CONVOLUTIONS = ("preprocess_conv", "postprocess_conv")
"""The DiT's two Conv1d layers, of one tap each in every released model; all other adapted layers are Linear."""
MAX_CONFIG = 2**22
UNSUPPORTED = (
    "kasa_config", "arrow_config", "use_bdlora", "use_qalora", "monteclora_config", "alora_invocation_tokens",
    "layer_replication", "target_parameters", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""Settings of PEFT's LoraConfig with which the weight is not the base and a product of two factors."""


def read_peft_folder(folder: Path, weights: str = WEIGHTS, base: Mapping[str, Tensor] | None = None) -> Adapter:
    """Read a PEFT folder.

    Args:
        folder: The folder.
        weights: Name of the file with the tensors.
        base: The base model's weights by module path, see `load_adapter`.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a file is missing or damaged, or a setting is not supported.
    """
    file = folder / weights
    if not file.is_file():
        advice, pickled = f"A PEFT folder holds {CONFIG} and {WEIGHTS}.", folder / "adapter_model.bin"
        if pickled.is_file():
            advice = f"It holds a pickle. Convert it: sa3-adapter convert {pickled} NEW.safetensors"
        elif found := [str(path) for form in ("*.safetensors", f"*/{ADAPTER_FILE}") for path in folder.glob(form)]:
            advice = f"Give one of the files in it: {', '.join(sorted(found)[:5])}{', …' if found[5:] else ''}."
        elif own := identify_own_folder(str(folder), [path.name for path in folder.iterdir()], read_file):
            advice = f"It holds {own}. Give the folder of a run, or an adapter file."
        raise AdapterError(f"{folder} is no PEFT adapter: {weights} is missing. {advice}")
    header = read_header(file)
    metadata = {key: value for key, value in header.metadata.items() if key != "format"}
    source = folder if weights == WEIGHTS else file
    identify_format(str(source), header.dtypes)
    return parse_peft_tensors(str(source), read_tensors(file, header), read_peft_config(folder), metadata, base)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read the adapter_config.json of a PEFT folder.

    Args:
        folder: The folder.

    Returns:
        The parsed JSON.

    Raises:
        AdapterError: If it is missing or invalid.
    """
    advice = "It holds the scale of PEFT's tensors; put it beside them."
    return read_json_object(folder / CONFIG, MAX_CONFIG, advice)


def parse_diffusers_config(source: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parse the PEFT settings that diffusers keeps in the metadata of a file, whose tensors have PEFT's endings.

    Args:
        source: The file's name, for messages.
        metadata: Its metadata.

    Returns:
        The content of an adapter_config.json; empty where the file has none.

    Raises:
        AdapterError: If it is not valid.
    """
    text = metadata.get(DIFFUSERS_SETTINGS)
    content = parse_json(text, f"{DIFFUSERS_SETTINGS} of {source}") if text else {}
    if not isinstance(content, dict):
        raise AdapterError(f"{DIFFUSERS_SETTINGS} of {source} is not a JSON object.")
    return {name.rpartition(".")[2]: value for name, value in content.items()} | (
        {"peft_type": "LORA"} if content else {}
    )


def parse_peft_tensors(
    source: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    base: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Parse PEFT's tensors and config.

    Args:
        source: The file's name, for messages.
        tensors: Tensors by their keys in PEFT's files.
        config: The parsed adapter_config.json.
        metadata: Metadata of the tensors' file.
        base: The base model's weights by module path, see `load_adapter`.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a tensor or setting is not supported.
    """
    for table in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(table) or {}, dict):
            raise AdapterError(f"{source}: {table} must be a mapping.")
    name = config.get("base_model_name_or_path")
    metadata = {"base_model": name, **metadata} if isinstance(name, str) else dict(metadata)
    if str(config.get("peft_type", "")).lower() != "lora":
        return _parse_method(source, tensors, config, metadata)
    names = {stored: name for name, stored in NAMES.items()}
    names |= {"lora_magnitude_vector": "magnitude", "lora_B.bias": BIAS_CHANGE}
    found = split_names(source, tensors, names, "{} is not supported, only weights of lora_A, lora_B and DoRA.".format)
    flat = ((layer, name, x.reshape(-1) if name == "magnitude" else x) for layer, name, x in found)
    layers = collect_layers(source, ((layer, name, x.flatten(1) if x.ndim > 2 else x) for layer, name, x in flat))
    names_in_peft = {get_module_path(source, layer): layer.removeprefix(PEFT_PREFIX) for layer, _, _ in found}
    spec = _build_lora_spec(source, layers, names_in_peft, config, metadata)
    for path, params in layers.items():
        if BIAS_CHANGE in params:  # PEFT scales the bias of lora_B as it scales its weight
            params[BIAS_CHANGE] = params[BIAS_CHANGE].float() * spec.get_scale(path)
    adapter = check_tensors(Adapter(spec, layers, metadata, source))
    return subtract_initial(adapter, get_initialization(config), base)


def write_peft_folder(path: str | os.PathLike[str], adapter: Adapter, dtype: torch.dtype | None = None) -> None:
    """Write an adapter as a PEFT folder, whole or not at all.

    The native metadata is stored in the tensors' file, so that nothing of it is lost on the way back.

    Args:
        path: The folder.
        adapter: The adapter. `AdapterError` is raised if PEFT does not have its type.
        dtype: Dtype to write fp32 tensors in; None keeps fp32.
    """
    with replace_folder(path, lambda folder: {item.name for item in folder.iterdir()} <= {CONFIG, WEIGHTS}) as staging:
        write_peft_files(staging, adapter, {layer: layer for layer in adapter.tensors}, dtype)


def write_peft_files(
    folder: Path, adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None, exact: bool = False
) -> None:
    """Write the two files of a PEFT folder with some layers of an adapter.

    Args:
        folder: The folder.
        adapter: The adapter.
        names: Names of the layers in the model that PEFT puts it on, by module path.
        dtype: Dtype to write fp32 tensors in; None keeps fp32.
        exact: Whether to name the layers by an expression, for a model where one name may end as another does.

    Raises:
        AdapterError: If PEFT does not have the adapter's type.
    """
    spec, paths = adapter.spec, sorted(names)
    if spec.adapter_type in PEFT_METHODS:
        from sa3train.adapters.peft_methods import format_peft_config

        config = format_peft_config(spec, paths)
        named = {
            f"{PEFT_PREFIX}{path}.{name}": tensor for path in paths for name, tensor in adapter.tensors[path].items()
        }
    elif spec.adapter_type in ("lora", "dora-rows"):
        config = json.dumps(_build_config(adapter, names, exact), indent=2) + "\n"
        named = {
            f"{PEFT_PREFIX}{names[path]}.{NAMES[name]}": _reshape(path, name, tensor)
            for path in paths
            for name, tensor in adapter.tensors[path].items()
            if name in NAMES or _refuse_tensor(adapter, path, name)
        }
    else:
        raise AdapterError(
            f"PEFT has no {spec.adapter_type}: of the family it has lora and dora-rows. Approximate it: "
            f"sa3-adapter convert {adapter.source or 'FILE'} FOLDER --model NAME --rank R"
        )
    stored = convert_for_saving(named, dtype)
    write_tensors(folder / WEIGHTS, stored, build_native_metadata(adapter) | {"format": "pt"})
    write_text(folder / CONFIG, config)


def _build_config(adapter: Adapter, names: Mapping[str, str], exact: bool) -> dict[str, Any]:
    """Build PEFT's LoraConfig, with the rank and alpha of each layer that differs from the rest."""
    spec, targets = adapter.spec, sorted(names.values())
    alpha = spec.rank if spec.alpha is None else spec.alpha
    patterns = {path: f"{'^' if exact else ''}{re.escape(name)}" for path, name in sorted(names.items())}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.metadata.get("base_model"),
        "r": spec.rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.adapter_type == "dora-rows",
        "target_modules": "|".join(map(re.escape, targets)) if exact else targets,
        "rank_pattern": {
            key: spec.get_rank(path) for path, key in patterns.items() if spec.get_rank(path) != spec.rank
        },
        "alpha_pattern": {key: spec.get_alpha(path) for path, key in patterns.items() if spec.get_alpha(path) != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _reshape(path: str, name: str, tensor: Tensor) -> Tensor:
    if not path.endswith(CONVOLUTIONS):
        return tensor
    return tensor.reshape(1, -1, 1) if name == "magnitude" else tensor[:, :, None]


def _refuse_tensor(adapter: Adapter, path: str, name: str) -> bool:
    what = "a change of its bias" if name == BIAS_CHANGE else f"a tensor named {name}"
    raise AdapterError(
        f"PEFT's format cannot hold {what} ({path} of {adapter.source}). Write a .safetensors file (--to native), or "
        f"approximate the weights alone with rank=R."
    )


def _build_lora_spec(
    source: str,
    layers: Mapping[str, Mapping[str, Tensor]],
    names_in_peft: Mapping[str, str],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> AdapterSpec:
    """Ranks come from the tensors, scales from the config, patterns from the native metadata or `target_modules`."""
    for name in UNSUPPORTED:
        if config.get(name):
            raise AdapterError(f"{source} is trained with PEFT's {name}, which is not supported. Merge it there.")
    bias, moved = config.get("bias", "none"), config.get("fan_in_fan_out")
    if bias not in ("none", None) or moved:
        raise AdapterError(
            f"{source} trains biases or transposed weights (bias={str(bias)[:40]!r}), which is not supported."
        )
    incomplete = [
        path
        for path, params in layers.items()
        if not {"lora_A", "lora_B"} <= params.keys() or any(params[name].ndim != 2 for name in ("lora_A", "lora_B"))
    ]
    if incomplete or not layers:
        raise AdapterError(f"{source} is damaged: {incomplete[0] if incomplete else 'no layer'} has no complete LoRA.")
    dora = any("magnitude" in params for params in layers.values())
    if bool(config.get("use_dora")) != dora:
        raise AdapterError(
            f"{source}: use_dora is {str(config.get('use_dora'))[:40]!r} in {CONFIG}, which its tensors "
            f"contradict. PEFT 0.21.2 drops the magnitudes where it converts a PiSSA or OLoRA: convert the folder from "
            f"before that: sa3-adapter convert FOLDER NEW.safetensors --model NAME"
        )
    ranks = {path: int(params["lora_A"].shape[0]) for path, params in layers.items()}
    alphas = _parse_alphas(source, names_in_peft, config)
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    include, exclude = _parse_patterns(list(layers), config, metadata)
    return build_spec(
        "dora-rows" if dora else "lora",
        ranks,
        alpha=alpha,
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        dropout=config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
        include=include,
        exclude=exclude,
    )


def _parse_alphas(source: str, names_in_peft: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, float]:
    """Parse the alpha of each layer by module path. PEFT's patterns are expressions; only plain names are accepted."""
    plain = {}
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        name = re.sub(r"\\([.\-])", r"\1", str(pattern)).removesuffix("$")
        if not re.fullmatch(r"\^?[\w.\-]+", name):
            raise AdapterError(
                f"{source}: alpha_pattern {str(pattern)[:60]!r} is an expression. Name the modules instead."
            )
        anchor, bare = name[:1] == "^", name.removeprefix("^").removeprefix(PEFT_PREFIX)
        plain[f"^{bare}" if anchor else f".{bare}"] = alpha
    default = config.get("lora_alpha", 8)

    def alpha_of(layer: str) -> float:
        found = (alpha for name, alpha in plain.items() if name == f"^{layer}" or f".{layer}".endswith(name))
        alpha = next(found, default)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise AdapterError(f"{source}: alpha must be a number, not {str(alpha)[:40]!r}.")
        return alpha

    return {path: alpha_of(layer) for path, layer in names_in_peft.items()}


def _parse_patterns(
    paths: list[str], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[list[str] | None, list[str] | None]:
    text = metadata.get("lora_config")
    native = parse_json(text, "lora_config") if text else None
    if isinstance(native, dict):
        return native.get("include") or None, native.get("exclude") or None
    targets = config.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        return [target.removeprefix(PEFT_PREFIX) for target in targets], None
    return paths, None


def _parse_method(
    source: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> Adapter:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import PeftType

    from sa3train.adapters.peft_methods import parse_peft_config

    spec = parse_peft_config(config)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(spec.adapter_type.upper())]
    named = []
    for key, tensor in tensors.items():
        path, marker, rest = key.rpartition(f".{prefix}")
        if not marker:
            raise AdapterError(f"{source}: {key} is not a tensor of {spec.adapter_type}.")
        named.append((path, prefix + rest, tensor))
    return check_tensors(Adapter(spec, collect_layers(source, named), metadata, source))
