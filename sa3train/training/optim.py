"""Optimizers and learning-rate schedules by name.

The optimizers are torch's, bitsandbytes' and pytorch-optimizer's; ours are only the tables, checks and messages.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sa3train.core.config import check_choice
from sa3train.core.errors import ConfigError
from sa3train.core.text import suggest_name
from sa3train.training.settings import OptimizationSettings, OptimizerSettings, SchedulerSettings

OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", ""),
    "adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", "quant"),
    "prodigy": ("pytorch_optimizer", "Prodigy", "optim"),
    "schedule-free": ("pytorch_optimizer", "ScheduleFreeAdamW", "optim"),
    "lion": ("pytorch_optimizer", "Lion", "optim"),
    "muon": ("pytorch_optimizer", "Muon", "optim"),
}
"""Module and class of each optimizer, and the extra of sa3train that installs it."""

_NO_OPTIONS = ("params", "kwargs", "progress", "total", "lr", "betas", "weight_decay")
"""Parameters of optimizers and schedules that are not options: those that are given or are settings of their own."""
_Group = dict[str, Any]


def check_optimization(settings: OptimizationSettings) -> None:
    """Check optimizer and schedule as far as that needs neither model nor data.

    Args:
        settings: Their settings.

    Raises:
        ConfigError: A name or option is unknown, or the optimizer's library is not installed.
    """
    check_choice("optimizer.name", settings.optimizer.name, OPTIMIZERS)
    _check_options("optimizer", settings.optimizer, _load_class(settings.optimizer.name))
    make_lr_lambda(settings.scheduler, settings.trainer.max_steps)


def make_optimizer(settings: OptimizerSettings, parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """Make an optimizer.

    Args:
        settings: Its name and arguments.
        parameters: What it trains, with names.

    Returns:
        The optimizer.

    Raises:
        ConfigError: The name or an option is unknown, a setting has no effect, or the library is not installed.
    """
    check_choice("optimizer.name", settings.name, OPTIMIZERS)
    named = list(parameters)
    if not named:
        raise ConfigError("there is nothing to train: the adapter has no parameters. Check adapter.include/exclude.")
    groups = _make_groups(settings, named)
    optimizer_class = _load_class(settings.name)
    options = _check_options("optimizer", settings, optimizer_class)
    if settings.name == "muon":
        groups = _split_for_muon(groups, settings, options.pop("adamw_lr", 1e-4))
    else:
        options |= {"lr": settings.lr, "betas": tuple(settings.betas), "weight_decay": settings.weight_decay}
    try:
        if settings.options:
            _try_step(optimizer_class, groups[0], options)
        optimizer: Optimizer = optimizer_class(groups, **options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer {settings.name} refuses optimizer.options={settings.options}: {error}."
        ) from error
    return optimizer


def _try_step(optimizer_class: Any, group: _Group, options: _Group) -> None:
    """Take a step with a stand-in parameter: some libraries read their options only then."""
    stand_in = nn.Parameter(torch.ones(2, 2, device=group["params"][0].device))
    stand_in.grad = torch.ones_like(stand_in)
    optimizer_class([{**group, "params": [stand_in]}], **options).step()
    if not stand_in.isfinite().all():
        raise ValueError("a step gives no finite number")


def _make_groups(settings: OptimizerSettings, named: list[tuple[str, nn.Parameter]]) -> list[_Group]:
    if settings.lora_plus == 1.0:
        return [{"params": [parameter for _, parameter in named]}]
    fast = [parameter for key, parameter in named if key.endswith(".lora_B")]
    if not fast or settings.name == "prodigy":
        reason = "Prodigy uses one step size for all parameters" if fast else "this adapter type has no B matrices"
        raise ConfigError(f"optimizer.lora_plus={settings.lora_plus} has no effect: {reason}. Set it to 1.")
    slow = [parameter for key, parameter in named if not key.endswith(".lora_B")]
    return [{"params": slow}, {"params": fast, "lr": settings.lr * settings.lora_plus}]


def _load_class(name: str) -> Any:
    module, class_name, extra = OPTIMIZERS[name]
    try:
        return getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f'optimizer={name} needs {package}: pip install "sa3train[{extra}]", or use optimizer=adamw.'
        ) from error


def _split_for_muon(groups: list[_Group], settings: OptimizerSettings, adamw_lr: float) -> list[_Group]:
    """Muon for matrices, AdamW at `adamw_lr` for magnitudes, which are vectors."""
    split: list[_Group] = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim >= 2 and min(p.shape) > 1]
        chosen = {id(p) for p in matrices}
        vectors = [p for p in group["params"] if id(p) not in chosen]
        common = {"weight_decay": settings.weight_decay}
        if matrices:
            split.append({"params": matrices, "lr": group.get("lr", settings.lr), "use_muon": True, **common})
        if vectors:
            vector_settings = {"lr": adamw_lr, "betas": tuple(settings.betas), "use_muon": False}
            split.append({"params": vectors, **vector_settings, **common})
    return split


def _check_options(
    section: str, settings: OptimizerSettings | SchedulerSettings, function: Callable[..., Any]
) -> dict[str, Any]:
    """Return the options if the function accepts them all; its `**kwargs` would hide a misspelled one."""
    parameters = inspect.signature(function).parameters
    known = [key for key in parameters if key not in _NO_OPTIONS]
    for key, value in settings.options.items():
        if key not in known:
            hint = suggest_name(key, known, f"Its options: {', '.join(known) or 'none'}.")
            raise ConfigError(f"{section} {settings.name} has no option '{section}.options.{key}'. {hint}")
        default = parameters[key].default
        if isinstance(value, str) != isinstance(default, str) or isinstance(default, bool) > isinstance(value, bool):
            raise ConfigError(f"{section}.options.{key}={value} is of another kind than its default, {default}.")
    return dict(settings.options)


def _constant(progress: int, total: int) -> float:
    return 1.0


def _cosine(progress: int, total: int, floor: float = 0.0) -> float:
    """From 1 down to `floor` along half a cosine."""
    share = min(1.0, progress / max(1, total))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def _inverse(progress: int, total: int, gamma: float = 1000.0, power: float = 0.5) -> float:
    """(1 + step / gamma) ** -power: slow decay without an end, as the released trainer's InverseLR."""
    return float((1 + progress / gamma) ** -power)


SCHEDULES: dict[str, Callable[..., float]] = {"constant": _constant, "cosine": _cosine, "inverse": _inverse}
"""Factor on the learning rate from the steps since the warm-up and their total, with the options of each schedule."""


def make_lr_lambda(settings: SchedulerSettings, total_steps: int) -> Callable[[int], float]:
    """Make the factor on the learning rate: a linear rise over the warm-up, then the schedule.

    torch's and transformers' schedulers have no warm-up before an arbitrary schedule, and this one's only state is the
    step, so that it can be saved without code.

    Args:
        settings: Name, warm-up and options.
        total_steps: Optimizer steps of the run.

    Returns:
        A function of the step for `torch.optim.lr_scheduler.LambdaLR`.

    Raises:
        ConfigError: The name or an option is unknown or out of range.
    """
    check_choice("scheduler.name", settings.name, SCHEDULES)
    decay, warmup_steps = SCHEDULES[settings.name], settings.warmup_steps
    options = _check_options("scheduler", settings, decay)
    try:
        factors = [decay(step, total_steps - warmup_steps, **options) for step in (0, 1, total_steps)]
    except ArithmeticError:
        factors = [math.nan]
    if not all(0 <= factor <= 1 for factor in factors):
        raise ConfigError(
            f"scheduler.options={options} must keep the learning rate from 0 to optimizer.lr: floor from 0 to 1, gamma "
            "above 0, power of at least 0."
        )

    def compute_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(step - warmup_steps, total_steps - warmup_steps, **options)

    return compute_factor


def keeps_rates(scheduler: Mapping[str, Any], before: int, after: int, steps: int) -> bool:
    """Check whether the first steps of a run have the same learning rates when its length changes.

    Args:
        scheduler: Settings of the schedule, by name.
        before: Optimizer steps of the run.
        after: Optimizer steps of the changed run.
        steps: How many of them are done.

    Returns:
        Whether they have.
    """
    old, new = (make_lr_lambda(SchedulerSettings(**scheduler), total) for total in (before, after))
    return all(old(step) == new(step) for step in (0, steps // 2, steps))


def compute_schedule_free_average(optimizer: Optimizer) -> dict[int, torch.Tensor]:
    """Compute schedule-free's averaged weights without touching the live ones.

    A schedule-free optimizer trains at y and is evaluated at x = y + (1 - 1/beta1) * (z - y) (Defazio et al. 2024).
    Its own `eval()` and `train()` move the weights there and back, which is not bit-exact, so resumed runs would drift.

    Args:
        optimizer: Any optimizer.

    Returns:
        The averages by `id(parameter)`; empty for every other optimizer.
    """
    return {
        id(parameter): parameter.detach().lerp(optimizer.state[parameter]["z"], 1 - 1 / group["betas"][0])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "train_mode" in group and "z" in optimizer.state.get(parameter, {})
    }
