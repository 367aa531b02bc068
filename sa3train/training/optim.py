"""Optimizers and learning-rate schedules by name.

Every entry is somebody's well-kept implementation; ours is only the table, the checks and the messages.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sa3train.core.config import closest
from sa3train.core.errors import ConfigError

Group = dict[str, Any]
Builder = Callable[[list[Group], float, tuple[float, float], float, Mapping[str, Any]], Optimizer]


def make_optimizer(
    name: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    options: Mapping[str, Any],
    lora_plus: float = 1.0,
) -> Optimizer:
    """The optimizer called `name` over named `parameters`.

    `options` are further arguments of that optimizer, passed as they are. `lora_plus`: B matrices learn at lr × this
    (LoRA+, Hayou et al. 2024). Raises `ConfigError` for an unknown name or option, for a setting without effect, or
    when
    the library that holds the optimizer is not installed.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"unknown optimizer {name!r}; choose one of: {', '.join(OPTIMIZERS)}.")
    named = list(parameters)
    if not named:
        raise ConfigError("there is nothing to train: the adapter has no parameters. Check adapter.include/exclude.")
    return OPTIMIZERS[name](_groups(name, named, lr, lora_plus), lr, betas, weight_decay, options)


def _groups(name: str, named: list[tuple[str, nn.Parameter]], lr: float, lora_plus: float) -> list[Group]:
    fast = [parameter for key, parameter in named if key.endswith(".lora_B")]
    if lora_plus == 1.0:
        return [{"params": [parameter for _, parameter in named]}]
    if not fast or name == "prodigy":
        reason = "Prodigy sets one step size for all" if fast else "this kind of adapter has no B matrices"
        raise ConfigError(f"optimizer.lora_plus={lora_plus} has no effect: {reason}. Set it to 1.")
    slow = [parameter for key, parameter in named if not key.endswith(".lora_B")]
    return [{"params": slow}, {"params": fast, "lr": lr * lora_plus}]


def _adamw(
    groups: list[Group], lr: float, betas: tuple[float, float], weight_decay: float, options: Mapping[str, Any]
) -> Optimizer:
    checked = _checked("adamw", torch.optim.AdamW, options)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, **checked)


def _adamw_8bit(
    groups: list[Group], lr: float, betas: tuple[float, float], weight_decay: float, options: Mapping[str, Any]
) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            'optimizer=adamw-8bit needs bitsandbytes: pip install "sa3train[quant]", or use optimizer=adamw.'
        ) from error
    checked = _checked("adamw-8bit", AdamW8bit, options)
    optimizer: Optimizer = AdamW8bit(groups, lr=lr, betas=betas, weight_decay=weight_decay, **checked)
    return optimizer


def _from_library(class_name: str, name: str) -> Builder:
    """A builder for an optimizer of pytorch-optimizer that takes lr, betas and decay like AdamW."""

    def build(
        groups: list[Group], lr: float, betas: tuple[float, float], weight_decay: float, options: Mapping[str, Any]
    ) -> Optimizer:
        kind = getattr(_library(name), class_name)
        checked = _checked(name, kind, options)
        optimizer: Optimizer = kind(groups, lr=lr, betas=betas, weight_decay=weight_decay, **checked)
        return optimizer

    return build


def _muon(
    groups: list[Group], lr: float, betas: tuple[float, float], weight_decay: float, options: Mapping[str, Any]
) -> Optimizer:
    """Muon for matrices; AdamW (at `adamw_lr`, default 1e-4) for magnitudes, which are vectors."""
    kind = _library("muon").Muon
    checked = _checked("muon", kind, options)
    adamw_lr = checked.pop("adamw_lr", 1e-4)
    split: list[Group] = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim >= 2 and min(p.shape) > 1]
        chosen = {id(p) for p in matrices}
        vectors = [p for p in group["params"] if id(p) not in chosen]
        common = {"weight_decay": weight_decay}
        if matrices:
            split.append({"params": matrices, "lr": group.get("lr", lr), "use_muon": True, **common})
        if vectors:
            split.append({"params": vectors, "lr": adamw_lr, "betas": betas, "use_muon": False, **common})
    optimizer: Optimizer = kind(split, **checked)
    return optimizer


OPTIMIZERS: dict[str, Builder] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,
    "prodigy": _from_library("Prodigy", "prodigy"),
    "schedule-free": _from_library("ScheduleFreeAdamW", "schedule-free"),
    "lion": _from_library("Lion", "lion"),
    "muon": _muon,
}


def _library(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ConfigError(
            f'optimizer={name} needs pytorch-optimizer: pip install "sa3train[optim]", or use optimizer=adamw.'
        ) from error
    return pytorch_optimizer


def _checked(name: str, kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` if `kind` takes them all. A `**kwargs` in its signature would swallow a misspelt one in silence."""
    known = [key for key in inspect.signature(kind).parameters if key not in ("self", "params", "kwargs")]
    for key in options:
        if key not in known:
            close = closest(key, known)
            hint = f"Did you mean '{close}'?" if close else f"It takes: {', '.join(known)}."
            raise ConfigError(f"optimizer {name} has no option 'optimizer.options.{key}'. {hint}")
    return dict(options)


def constant(progress: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def cosine(progress: int, total: int, floor: float = 0.0) -> float:
    """From 1 down to `floor` along half a cosine over `total` steps."""
    share = min(1.0, progress / max(1, total))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def inverse(progress: int, total: int, gamma: float = 1000.0, power: float = 0.5) -> float:
    """(1 + step / gamma) ** -power: slow decay without an end, as the public trainer's InverseLR."""
    return float((1 + progress / gamma) ** -power)


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "cosine": cosine, "inverse": inverse}


def learning_rate_factor(
    name: str, *, warmup_steps: int, total_steps: int, options: Mapping[str, Any]
) -> Callable[[int], float]:
    """step -> factor on the learning rate: a straight rise over `warmup_steps`, then the schedule called `name`.

    Raises `ConfigError` for an unknown name or option, and for a cosine without a known end.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown scheduler {name!r}; choose one of: {', '.join(SCHEDULES)}.")
    known = list(inspect.signature(SCHEDULES[name]).parameters)[2:]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"scheduler {name} has no option 'scheduler.options.{key}'. It takes: {', '.join(known) or 'none'}."
            )
    if warmup_steps < 0 or (name == "cosine" and total_steps <= warmup_steps):
        raise ConfigError(
            f"scheduler.warmup_steps={warmup_steps} must be at least 0 and below trainer.max_steps={total_steps}."
        )
    decay = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(step - warmup_steps, total_steps - warmup_steps, **options)

    return factor


def make_scheduler(optimizer: Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    """A per-step scheduler whose state is only its step count, so that it can be saved without code."""
    return LambdaLR(optimizer, factor)


def averaged_by_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> dict[int, torch.Tensor]:
    """Schedule-free's averaged weights by `id(parameter)`, computed aside; empty for every other optimizer.

    A schedule-free optimizer trains at y and should be judged at x = y + (1 - 1/beta1) * (z - y). Its own `eval()` and
    `train()` move the weights there and back, which is not exact to the bit, so resumed runs would drift.
    """
    wanted = {id(parameter) for parameter in parameters}
    averaged: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        if "train_mode" not in group:
            continue
        for parameter in group["params"]:
            z = optimizer.state.get(parameter, {}).get("z")
            if z is not None and id(parameter) in wanted:
                averaged[id(parameter)] = parameter.detach().lerp(z, 1 - 1 / group["betas"][0])
    return averaged
