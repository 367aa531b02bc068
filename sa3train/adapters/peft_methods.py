"""PEFT's own methods (LoKr, LoHa, OFT, …): configured from a spec, and merged by PEFT itself."""

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

from sa3train.adapters.layer_filter import matches_pattern
from sa3train.adapters.spec import PEFT_METHODS, AdapterSpec
from sa3train.core.errors import AdapterError

ADAPTER_NAME = "default"
RESERVED_FIELDS = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "r", "alpha",
)  # fmt: skip
"""Fields of PEFT's configs that the spec sets or that have no meaning here; `options` may hold the others."""

PEFT_ERRORS = (
    TypeError, ValueError, RuntimeError, ImportError, AttributeError, LookupError, ArithmeticError, AssertionError,
)  # fmt: skip
"""What PEFT raises for a setting or a tensor that it cannot use."""

MAX_OPTION = 2**14
"""Largest number in `options`, which may come from a file: some of PEFT's options count layers or loops."""

IDENTITY_INIT: dict[str, dict[str, Any]] = {"fourierft": {"init_weights": True}, "c3a": {"init_weights": True}}
"""Options with which these methods start as the base model; by default PEFT starts them from random changes."""


def build_peft_config(spec: AdapterSpec, paths: Sequence[str]) -> PeftConfig:
    """Build PEFT's config for one of its own methods.

    Args:
        spec: The adapter's settings; its type is one of `PEFT_METHODS`.
        paths: Module paths of exactly the layers to adapt.

    Returns:
        The config.

    Raises:
        AdapterError: If the method does not have a setting of the spec, or PEFT rejects a value.
    """
    method = spec.adapter_type
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    known = {field.name for field in fields(config_class)}
    settings: dict[str, Any] = {"target_modules": "|".join(re.escape(path) for path in paths)}
    if "r" in known and "oft_block_size" not in spec.options:
        settings["r"] = spec.rank
        if method == "oft":
            settings["oft_block_size"] = 0
    if "alpha" in known:
        settings["alpha"] = spec.rank if spec.alpha is None else spec.alpha
    elif spec.alpha is not None:
        raise AdapterError(f"{method} has no alpha. Remove it.")
    # PEFT matches its patterns differently than the spec does, so each path gets its own rank and alpha.
    if spec.alpha_pattern or (spec.rank_pattern and "alpha_pattern" in known):
        name = _find_field(spec, known, "alpha_pattern", "alpha_pattern")
        settings[name] = {re.escape(path): spec.get_alpha(path) for path in paths}
    if spec.rank_pattern:
        name = _find_field(spec, known, "rank_pattern", "rank_pattern")
        settings[name] = {re.escape(path): spec.get_rank(path) for path in paths}
    if spec.dropout:
        settings[_find_field(spec, known, "dropout", f"{method}_dropout", "module_dropout")] = spec.dropout
    if spec.rslora:
        raise AdapterError(f"rslora has no effect on {method}. Remove it; it is for the SA3 family's types.")
    settings |= {**IDENTITY_INIT.get(method, {}), **_check_options(spec, known)}
    with _translate_errors(f"PEFT rejects these settings for {method}"):
        return config_class(**settings)


def inject_peft_method(root: nn.Module, spec: AdapterSpec, paths: Sequence[str]) -> BaseTuner:
    """Inject one of PEFT's own methods into a model.

    Args:
        root: The model, which is changed in place.
        spec: The adapter's settings.
        paths: Module paths of the layers to adapt.

    Returns:
        PEFT's tuner.

    Raises:
        AdapterError: If the method cannot adapt one of the layers.
    """
    config = build_peft_config(spec, paths)
    failure = f"PEFT's {spec.adapter_type} cannot adapt these layers"
    advice = " Exclude such layers, or choose another adapter_type."
    with warnings.catch_warnings(action="ignore"), _translate_errors(failure, advice):
        return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)](root, config, adapter_name=ADAPTER_NAME)


def merge_weight(spec: AdapterSpec, path: str, W: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """Compute the effective weight of a PEFT method at full strength, by PEFT's own merge into a copy of the layer.

    Args:
        spec: The adapter's settings.
        path: Module path of the layer.
        W: The layer's untouched weight, (out, in) or (out, in, taps).
        params: The adapter's tensors at the layer, by name.

    Returns:
        The weight, fp32, in W's shape.

    Raises:
        AdapterError: If the tensors are not those that the method needs for a weight of this shape.
    """
    method = spec.adapter_type
    holder = nn.ModuleDict({"layer": _copy_layer(W)})
    has_alpha = spec.alpha is not None or any(matches_pattern(pattern, path) for pattern in spec.alpha_pattern)
    alpha = spec.get_alpha(path) if has_alpha else None
    alone = replace(spec, rank=spec.get_rank(path), alpha=alpha, rank_pattern={}, alpha_pattern={}, dropout=0.0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        tuner = inject_peft_method(holder, alone, ["layer"])
        with _translate_errors(f"The {method} tensors of {path} do not fit its weight"):
            given = {f"layer.{name}": tensor.float().to(W.device) for name, tensor in params.items()}
            missing, unexpected = set_peft_model_state_dict(holder, given, ADAPTER_NAME)  # type: ignore[attr-defined]
        absent = [name for name in missing if not name.endswith((".base_layer.weight", ".base_layer.bias"))]
        if unexpected or absent:
            raise AdapterError(
                f"{path} is not a complete {method} layer: missing {absent or 'nothing'}, unexpected "
                f"{unexpected or 'nothing'}."
            )
        with _translate_errors(f"PEFT cannot merge the {method} of {path}"):
            tuner.merge_and_unload()
    weight = holder["layer"].weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(W.shape)


def parse_peft_config(config: Mapping[str, Any]) -> AdapterSpec:
    """Parse PEFT's config (adapter_config.json) of another method than LoRA.

    Args:
        config: The parsed JSON.

    Returns:
        The adapter's settings.

    Raises:
        AdapterError: If the method is not supported or a setting is invalid.
    """
    method = str(config.get("peft_type", "")).lower()
    if method not in PEFT_METHODS:
        raise AdapterError(
            f"PEFT's {method[:40] or 'unnamed method'} is not supported. Supported: lora, {', '.join(PEFT_METHODS)}."
        )
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())])}
    options = {
        name: value
        for name, value in config.items()
        if name in known and name not in RESERVED_FIELDS and not name.endswith("dropout")
    }
    if method == "oft" and config.get("r"):
        options.pop("oft_block_size", None)
    patterns: dict[str, Any] = {  # PEFT's are expressions, which are read as the module names they stand for
        name: {re.sub(r"\\(\W)", r"\1", pattern): value for pattern, value in (config.get(name) or {}).items()}
        for name in ("rank_pattern", "alpha_pattern")
    }
    return AdapterSpec(method, rank=config.get("r") or 16, alpha=config.get("alpha"), options=options, **patterns)


def format_peft_config(spec: AdapterSpec, paths: Sequence[str]) -> str:
    """Format the adapter_config.json that PEFT itself would write.

    Args:
        spec: The adapter's settings.
        paths: Module paths of its layers.

    Returns:
        JSON text.
    """
    config = build_peft_config(spec, paths).to_dict()
    config["target_modules"] = sorted(paths)
    as_json = lambda value: sorted(value) if isinstance(value, set) else str(value)  # noqa: E731
    return json.dumps(config, indent=2, sort_keys=True, default=as_json) + "\n"


def _check_options(spec: AdapterSpec, known: set[str]) -> Mapping[str, Any]:
    allowed = sorted(known - set(RESERVED_FIELDS))
    for name, value in spec.options.items():
        if name not in allowed:
            raise AdapterError(
                f"{spec.adapter_type} has no option {name[:40]!r}. Its options are {', '.join(allowed)}."
            )
        if isinstance(value, int | float) and not abs(value) <= MAX_OPTION:
            raise AdapterError(f"The option {name} of {spec.adapter_type} must be at most {MAX_OPTION}.")
    return spec.options


def _find_field(spec: AdapterSpec, known: set[str], setting: str, *names: str) -> str:
    found = next((name for name in names if name in known), None)
    if found is None:
        raise AdapterError(f"{spec.adapter_type} has no {setting}. Leave it at its default.")
    return found


def _copy_layer(W: Tensor) -> nn.Linear | nn.Conv1d:
    size, options = (W.shape[1], W.shape[0]), dict[str, Any](bias=False, device=W.device)
    layer = nn.Linear(*size, **options) if W.ndim == 2 else nn.Conv1d(*size, W.shape[2], **options)
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


@contextmanager
def _translate_errors(failure: str, advice: str = "") -> Iterator[None]:
    """Raise what PEFT raises as an `AdapterError` that says what failed."""
    try:
        yield
    except PEFT_ERRORS as error:
        raise AdapterError(f"{failure}: {error}{advice}") from error
