"""PEFT's own methods (LoKr, LoHa, OFT, …): configured from a spec, and played by PEFT's own merge."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, set_peft_model_state_dict
from torch import Tensor, nn

from sa3train.adapters.spec import PEFT_METHODS, AdapterSpec
from sa3train.errors import AdapterError

NAME = "default"
RESERVED = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "r", "alpha",
)  # fmt: skip
"""Fields of PEFT's configs that the spec sets, or that make no sense here; `options` may hold the others."""


START_AT_THE_BASE: dict[str, dict[str, Any]] = {"fourierft": {"init_weights": True}, "c3a": {"init_weights": True}}
"""PEFT starts these from random changes unless told otherwise; an adapter must start as the base."""


def method_config(spec: AdapterSpec, paths: Sequence[str]) -> PeftConfig:
    """PEFT's config for `spec` on exactly the modules `paths`. Raises `AdapterError` for a setting the method lacks."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(spec.kind.upper())]
    known = {field.name for field in fields(config_class)}
    settings: dict[str, Any] = {"target_modules": "|".join(re.escape(path) for path in paths)}
    if "r" in known and "oft_block_size" not in spec.options:
        settings["r"] = spec.rank
        if spec.kind == "oft":
            settings["oft_block_size"] = 0
    _set_alpha(spec, known, settings)
    if spec.dropout:
        settings[_field(spec, known, "dropout", f"{spec.kind}_dropout", "module_dropout")] = spec.dropout
    if spec.rank_pattern:
        name = _field(spec, known, "rank_pattern", "rank_pattern")
        settings[name] = {re.escape(path): spec.rank_of(path) for path in paths}
    if spec.rslora:
        raise AdapterError(f"rslora has no meaning for {spec.kind}; it is for the kinds of the SA3 family.")
    allowed = sorted(known - set(RESERVED))
    settings |= START_AT_THE_BASE.get(spec.kind, {})
    for name, value in spec.options.items():
        if name not in allowed:
            raise AdapterError(f"{spec.kind} has no option {name!r}; it has {', '.join(allowed)}.")
        settings[name] = value
    try:
        return config_class(**settings)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"PEFT refuses these settings for {spec.kind}: {error}") from error


def start_method(root: nn.Module, spec: AdapterSpec, paths: Sequence[str]) -> BaseTuner:
    """Let PEFT put `spec` into `root`. Raises `AdapterError` when the method cannot adapt one of the layers."""
    config = method_config(spec, paths)
    with _quietly():
        try:
            return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](root, config, adapter_name=NAME)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, ImportError) as error:
            raise AdapterError(
                f"PEFT's {spec.kind} cannot adapt these layers: {error} Leave such layers out with exclude, or choose "
                f"another kind."
            ) from error


def merged_weight(spec: AdapterSpec, path: str, W: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """The effective weight of a PEFT method at full strength, fp32: PEFT's own merge into a copy of the layer.

    Raises `AdapterError` when the tensors are not those the method needs for a weight of this shape.
    """
    holder = nn.ModuleDict({"layer": _copy_of_layer(W)})
    alpha = spec.alpha_of(path) if spec.alpha is not None or path in spec.alpha_pattern else None
    alone = replace(spec, rank=spec.rank_of(path), alpha=alpha, rank_pattern={}, alpha_pattern={}, dropout=0.0)
    with torch.random.fork_rng(devices=[]), _quietly():
        tuner = start_method(holder, alone, ["layer"])
        try:
            given = {f"layer.{name}": tensor.float().to(W.device) for name, tensor in params.items()}
            result = set_peft_model_state_dict(holder, given, NAME)
        except RuntimeError as error:
            raise AdapterError(f"the {spec.kind} tensors of {path} do not fit its weight: {error}") from error
        absent = [name for name in result.missing_keys if not name.endswith((".base_layer.weight", ".base_layer.bias"))]
        if result.unexpected_keys or absent:
            raise AdapterError(
                f"{path} lacks {absent or 'nothing'} of {spec.kind} and has {result.unexpected_keys or 'nothing'} too much."
            )
        tuner.merge_and_unload()
    weight: Tensor = holder["layer"].weight
    return weight.detach().reshape(W.shape)


def spec_from_config(config: Mapping[str, Any]) -> AdapterSpec:
    """The spec of a PEFT config (adapter_config.json) of another method than LoRA."""
    kind = str(config.get("peft_type", "")).lower()
    if kind not in PEFT_METHODS:
        raise AdapterError(
            f"PEFT's {kind or 'unnamed method'} is not supported; supported: lora, {', '.join(PEFT_METHODS)}."
        )
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())])}
    options = {name: value for name, value in config.items() if name in known and name not in RESERVED}
    options = {name: value for name, value in options.items() if not name.endswith("dropout")}
    rank = config.get("r") or 16
    if kind == "oft" and config.get("r"):
        options.pop("oft_block_size", None)
    return AdapterSpec(
        kind,
        rank=rank,
        alpha=config.get("alpha"),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        options=options,
    )


def config_json(spec: AdapterSpec, paths: Sequence[str]) -> str:
    """The adapter_config.json that PEFT itself would write."""
    config = method_config(spec, paths).to_dict()
    config["target_modules"] = sorted(paths)
    return json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _set_alpha(spec: AdapterSpec, known: set[str], settings: dict[str, Any]) -> None:
    if "alpha" in known:
        settings["alpha"] = spec.rank if spec.alpha is None else spec.alpha
    elif spec.alpha is not None:
        raise AdapterError(f"{spec.kind} has no alpha; leave it out.")
    if spec.alpha_pattern:
        settings[_field(spec, known, "alpha_pattern", "alpha_pattern")] = dict(spec.alpha_pattern)


def _field(spec: AdapterSpec, known: set[str], setting: str, *names: str) -> str:
    found = next((name for name in names if name in known), None)
    if found is None:
        raise AdapterError(f"{spec.kind} has no {setting}; leave it at its default.")
    return found


def _copy_of_layer(W: Tensor) -> nn.Linear | nn.Conv1d:
    layer = (
        nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device)
        if W.ndim == 2
        else nn.Conv1d(W.shape[1], W.shape[0], W.shape[2], bias=False, device=W.device)
    )
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
