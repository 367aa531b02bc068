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

from sa3train.adapters.layer_filter import Filter
from sa3train.adapters.spec import PEFT_METHODS, AdapterSpec
from sa3train.core.errors import AdapterError

NAME = "default"
RESERVED = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "r", "alpha",
)  # fmt: skip
"""Fields of PEFT's configs that the spec sets, or that make no sense here; `options` may hold the others."""


REFUSALS = (
    TypeError, ValueError, RuntimeError, ImportError, AttributeError, LookupError, ArithmeticError, AssertionError,
)  # fmt: skip
"""What PEFT raises, here and there, for a setting or a tensor that it cannot use."""

LARGEST_OPTION = 2**14
"""Of numbers in `options`, which may come from a file: some of PEFT's are counts of layers or of loops."""

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
    _set_alpha(spec, known, settings, paths)
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
            raise AdapterError(f"{spec.kind} has no option {name[:40]!r}; it has {', '.join(allowed)}.")
        if isinstance(value, int | float) and not abs(value) <= LARGEST_OPTION:
            raise AdapterError(f"the option {name} of {spec.kind} must be at most {LARGEST_OPTION}.")
        settings[name] = value
    try:
        return config_class(**settings)
    except REFUSALS as error:
        raise AdapterError(f"PEFT refuses these settings for {spec.kind}: {error}") from error


def start_method(root: nn.Module, spec: AdapterSpec, paths: Sequence[str]) -> BaseTuner:
    """Let PEFT put `spec` into `root`. Raises `AdapterError` when the method cannot adapt one of the layers."""
    config = method_config(spec, paths)
    with _quietly():
        try:
            return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)](root, config, adapter_name=NAME)
        except REFUSALS as error:
            raise AdapterError(
                f"PEFT's {spec.kind} cannot adapt these layers: {error} Leave such layers out with exclude, or choose "
                f"another kind."
            ) from error


def merged_weight(spec: AdapterSpec, path: str, W: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """The effective weight of a PEFT method at full strength, fp32: PEFT's own merge into a copy of the layer.

    Raises `AdapterError` when the tensors are not those the method needs for a weight of this shape.
    """
    holder = nn.ModuleDict({"layer": _copy_of_layer(W)})
    own_alpha = any(Filter([pattern]).matches(path) for pattern in spec.alpha_pattern)
    alpha = spec.alpha_of(path) if spec.alpha is not None or own_alpha else None
    alone = replace(spec, rank=spec.rank_of(path), alpha=alpha, rank_pattern={}, alpha_pattern={}, dropout=0.0)
    with torch.random.fork_rng(devices=[]), _quietly():
        tuner = start_method(holder, alone, ["layer"])
        try:
            given = {f"layer.{name}": tensor.float().to(W.device) for name, tensor in params.items()}
            missing, unexpected = set_peft_model_state_dict(holder, given, NAME)  # type: ignore[attr-defined]
        except REFUSALS as error:
            raise AdapterError(f"the {spec.kind} tensors of {path} do not fit its weight: {error}") from error
        absent = [name for name in missing if not name.endswith((".base_layer.weight", ".base_layer.bias"))]
        if unexpected or absent:
            raise AdapterError(
                f"{path} lacks {absent or 'nothing'} of {spec.kind}, and has {unexpected or 'nothing'} too much."
            )
        try:
            tuner.merge_and_unload()
        except REFUSALS as error:
            raise AdapterError(f"PEFT cannot merge the {spec.kind} of {path}: {error}") from error
    weight = holder["layer"].weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(W.shape)


def spec_from_config(config: Mapping[str, Any]) -> AdapterSpec:
    """The spec of a PEFT config (adapter_config.json) of another method than LoRA."""
    kind = str(config.get("peft_type", "")).lower()
    if kind not in PEFT_METHODS:
        raise AdapterError(
            f"PEFT's {kind[:40] or 'unnamed method'} is not supported; supported: lora, {', '.join(PEFT_METHODS)}."
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
        rank_pattern=_plain_pattern(config, "rank_pattern"),
        alpha_pattern=_plain_pattern(config, "alpha_pattern"),
        options=options,
    )


def config_json(spec: AdapterSpec, paths: Sequence[str]) -> str:
    """The adapter_config.json that PEFT itself would write."""
    config = method_config(spec, paths).to_dict()
    config["target_modules"] = sorted(paths)
    return json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _plain_pattern(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """PEFT's patterns are expressions: those that name a module come back as its name."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{name} must be a table, not {str(patterns)[:40]!r}.")
    return {re.sub(r"\\(\W)", r"\1", pattern): value for pattern, value in patterns.items()}


def _set_alpha(spec: AdapterSpec, known: set[str], settings: dict[str, Any], paths: Sequence[str]) -> None:
    """PEFT matches its patterns otherwise than the spec does, so each path is given its own alpha."""
    if "alpha" in known:
        settings["alpha"] = spec.rank if spec.alpha is None else spec.alpha
    elif spec.alpha is not None:
        raise AdapterError(f"{spec.kind} has no alpha; leave it out.")
    if spec.alpha_pattern or (spec.rank_pattern and "alpha_pattern" in known):
        name = _field(spec, known, "alpha_pattern", "alpha_pattern")
        settings[name] = {re.escape(path): spec.alpha_of(path) for path in paths}


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
