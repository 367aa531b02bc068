"""Checks of settings against each other, the model and the data, before a run."""

import dataclasses

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.models.checkpoint import StableAudio3
from sa3train.training.settings import TrainingSettings

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
    if data.settings.pack_frames is not None and loss.silence_seconds > 0:
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
