"""Optimizers by name.

The optimizers are torch's, bitsandbytes' and pytorch-optimizer's; ours are only the tables, checks and messages.
"""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sa3train.core.config import check_choice
from sa3train.core.errors import ConfigError
from sa3train.training.schedules import check_options, make_lr_lambda
from sa3train.training.settings import OptimizationSettings, OptimizerSettings

OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", ""),
    "adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", "quant"),
    "prodigy": ("pytorch_optimizer", "Prodigy", "optim"),
    "schedule-free": ("pytorch_optimizer", "ScheduleFreeAdamW", "optim"),
    "lion": ("pytorch_optimizer", "Lion", "optim"),
    "muon": ("pytorch_optimizer", "Muon", "optim"),
}
"""Module and class of each optimizer, and the extra of sa3train that installs it."""

GROUP_SETTINGS = ("lr", "betas", "weight_decay")
"""What the optimizer's groups hold of its settings that may change when a run is resumed."""
_Group = dict[str, Any]


def check_optimization(settings: OptimizationSettings) -> None:
    """Check optimizer and schedule as far as that needs neither model nor data.

    Args:
        settings: Their settings.

    Raises:
        ConfigError: A name or option is unknown, or the optimizer's library is not installed.
    """
    check_choice("optimizer.name", settings.optimizer.name, OPTIMIZERS)
    check_options("optimizer", settings.optimizer, _load_class(settings.optimizer.name))
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
    options = check_options("optimizer", settings, optimizer_class)
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


def get_group_settings(optimizer: Optimizer) -> list[_Group]:
    """Get the settings of a new optimizer's groups.

    Args:
        optimizer: The optimizer, before it has a schedule or a state.

    Returns:
        Its settings, by group.
    """
    return [{key: group[key] for key in GROUP_SETTINGS if key in group} for group in optimizer.param_groups]


def restore_group_settings(scheduler: LambdaLR, settings: list[_Group]) -> None:
    """Put the settings of this start in place of those that a checkpoint held, and the rate by the schedule of now.

    Args:
        scheduler: The schedule and its optimizer, with the state of the checkpoint.
        settings: What `get_group_settings` returned.
    """
    scheduler.base_lrs = [own["lr"] for own in settings]
    groups = zip(scheduler.optimizer.param_groups, settings, scheduler.lr_lambdas, strict=True)
    for group, own, compute_factor in groups:
        rate = own["lr"] * compute_factor(scheduler.last_epoch)
        group.update(own, initial_lr=own["lr"], lr=rate)


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
