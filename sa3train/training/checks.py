"""Checks of settings against each other, the model and the data, before a run; and suggestions that save memory."""

import dataclasses

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import SAMPLE_RATE, SAMPLES_PER_FRAME, LatentDataModule
from sa3train.models.checkpoint import StableAudio3
from sa3train.training.settings import TrainerSettings, TrainingSettings

_logger = get_logger(__name__)


def check_compatibility(model: StableAudio3, data: LatentDataModule, settings: TrainingSettings) -> None:
    """Check settings that cancel each other; warn about those that work but are rarely intended.

    Args:
        model: The base model.
        data: The data module.
        settings: All settings.

    Raises:
        ConfigError: A setting has no effect beside another.
    """
    loss, ema_decay = settings.loss, settings.trainer.ema_decay
    if data.pack_frames is not None and loss.silence_seconds > 0:
        raise ConfigError(
            f"loss.silence_seconds={loss.silence_seconds} has no effect with data.pack_frames: a packed row "
            f"has no room behind a clip. Set it to 0."
        )
    if ema_decay is not None and settings.optimizer.name == "schedule-free":
        raise ConfigError(
            f"trainer.ema_decay={ema_decay} replaces schedule-free's own average, which then has no effect. "
            f"Set trainer.ema_decay=null, or use another optimizer."
        )
    few_steps = loss.timesteps == "levels"
    if model.objective == "rf_denoiser" and not few_steps:
        _logger.warning(
            "%s is post-trained: its sampler calls it at a few noise levels only, and loss=base trains all of them. "
            "Use loss=post-trained, or train on its base%s.",
            model.name,
            f" ({model.sibling})" if model.sibling else "",
        )
    if model.objective == "rectified_flow" and few_steps:
        _logger.warning("%s is a base model, and loss.timesteps=levels trains a few noise levels only.", model.name)


def suggest_memory_savings(data: LatentDataModule, settings: TrainerSettings, is_recomputing: bool) -> list[str]:
    """Suggest settings that save memory.

    Args:
        data: The data module.
        settings: The trainer's settings.
        is_recomputing: Whether blocks are recomputed already.

    Returns:
        Settings as on the command line, the least costly first.
    """
    rows, longest = data.batch_size, data.longest_crop
    fewer = max((part for part in range(1, rows) if rows % part == 0), default=rows)
    seconds = longest * SAMPLES_PER_FRAME / SAMPLE_RATE / 2
    half = longest // 2 if data.crop_setting == "crop_frames" else f"{seconds:.1f}"
    suggestions = [
        ("trainer.activation_checkpointing=blocks", not is_recomputing),
        (f"data.batch_size={fewer} trainer.accumulate={settings.accumulate * rows // fewer}", fewer < rows),
        (f"data.pack_frames={longest}", data.pack_frames is not None and data.pack_frames > longest),
        (f"data.{data.crop_setting}={half}", longest > 1),
        ("trainer.quantize=int8 or nf4", settings.quantize == "none"),
    ]
    return [suggestion for suggestion, would_help in suggestions if would_help]


def match_demo_steps(settings: TrainingSettings) -> TrainingSettings:
    """Match the demos' sampler steps with the noise levels that are trained.

    Args:
        settings: All settings.

    Returns:
        The settings, with `callbacks.demos.steps` from `loss.sampler_steps` unless it is set.
    """
    steps, callbacks = settings.loss.sampler_steps, settings.callbacks
    if steps is None or callbacks.demos.steps is not None:
        return settings
    demos = dataclasses.replace(callbacks.demos, steps=steps)
    return dataclasses.replace(settings, callbacks=dataclasses.replace(callbacks, demos=demos))
