"""Checks of settings against each other, the model and the data, before a run."""

import dataclasses

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.diffusion.objective import interpolate_weights
from sa3train.models.checkpoint import StableAudio3
from sa3train.training.ema import get_warmed_up_decay
from sa3train.training.settings import TrainingSettings
from sa3train.training.step import list_sampled_noise_levels

_logger = get_logger(__name__)

RECIPES_DECAY = 0.97
"""`trainer.ema_decay` of most recipes, which is for runs of any length."""


def check_compatibility(model: StableAudio3, data: LatentDataModule, settings: TrainingSettings) -> None:
    """Check settings that cancel each other; warn about those that work but are rarely intended.

    Args:
        model: The base model.
        data: The data module.
        settings: All settings.

    Raises:
        ConfigError: A setting has no effect beside another.
    """
    loss, ema_decay, steps = settings.loss, settings.trainer.ema_decay, settings.trainer.max_steps
    loss.check_packing(data.settings.pack_frames)
    if ema_decay is not None and ema_decay > max(get_warmed_up_decay(steps), RECIPES_DECAY):
        _logger.warning(
            "trainer.ema_decay=%g is not reached in trainer.max_steps=%d, and counts as %.3g.",
            ema_decay, steps, get_warmed_up_decay(steps),
        )  # fmt: skip
    if max(loss.cfg_dropout, data.settings.prompts.caption_dropout) == 1:
        _logger.warning("loss.cfg_dropout or data.prompts.caption_dropout is 1: every prompt is empty in training.")
    few_steps = loss.timesteps == "levels"
    idle = few_steps and not isinstance(loss.weighting, str)
    if idle and not interpolate_weights(list_sampled_noise_levels(loss), loss.weighting).any():  # type: ignore[arg-type]
        raise ConfigError(
            f"loss.weighting={loss.weighting} is 0 at every noise level that loss.timesteps=levels visits. "
            "Set weights above 0 there."
        )
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
