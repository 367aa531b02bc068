"""Learning-rate schedules by name. Nothing heavy is imported, so that a resume is checked at once."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from sa3train.core.config import check_choice
from sa3train.core.errors import ConfigError
from sa3train.core.text import suggest_name
from sa3train.training.settings import OptimizerSettings, SchedulerSettings

_NO_OPTIONS = ("params", "kwargs", "progress", "total", "lr", "betas", "weight_decay")
"""Parameters of optimizers and schedules that are not options: those that are given or are settings of their own."""


def check_options(
    section: str, settings: OptimizerSettings | SchedulerSettings, function: Callable[..., Any]
) -> dict[str, Any]:
    """Check that a function accepts the options of an optimizer or a schedule; `**kwargs` would hide a misspelled one.

    Args:
        section: Name of the section, for messages.
        settings: The section.
        function: The optimizer's class or the schedule.

    Returns:
        The options.

    Raises:
        ConfigError: It has no such option, or one of another kind.
    """
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
    options = check_options("scheduler", settings, decay)
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
