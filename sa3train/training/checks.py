"""Settings of different sections held against each other before a run: what cancels out is an error."""

import dataclasses

from sa3train.data.datamodule import LatentDataModule
from sa3train.errors import ConfigError
from sa3train.log import get_logger
from sa3train.models.checkpoint import StableAudio3
from sa3train.training.settings import DemoSettings, LoopSettings, Objective, OptimizerSettings

_logger = get_logger(__name__)


def check_together(
    model: StableAudio3, data: LatentDataModule, objective: Objective, optimizer: OptimizerSettings, loop: LoopSettings
) -> None:
    """Raise `ConfigError` for settings that cancel each other; say aloud what works and is seldom wanted."""
    if data.pack_frames is not None and objective.silence_seconds > 0:
        raise ConfigError(
            f"objective.silence_seconds={objective.silence_seconds} has no effect with data.pack_frames: a packed row "
            f"has no room behind a clip. Set it to 0."
        )
    if loop.average is not None and optimizer.name == "schedule-free":
        raise ConfigError(
            f"trainer.average={loop.average} would take the place of schedule-free's own average, which then has no "
            f"effect. Set trainer.average=null, or use another optimizer."
        )
    few_steps = objective.timesteps == "levels"
    if model.objective == "rf_denoiser" and not few_steps:
        _logger.warning(
            "%s is post-trained: its sampler calls it at a few noise levels only, and this objective trains it at all "
            "of them. Use objective=post-trained, or train on its base%s.",
            model.name,
            f" ({model.sibling})" if model.sibling else "",
        )
    if model.objective == "rectified_flow" and few_steps:
        _logger.warning("%s is a base model, and this objective trains a few noise levels alone.", model.name)


def what_helps(loop: LoopSettings, frames: int, rows: int, packed: bool) -> list[str]:
    """Settings that make a training smaller, the gentlest first. Its largest batch has `rows` rows of `frames`."""
    found = [
        ("trainer.activation_checkpointing=blocks", loop.activation_checkpointing != "blocks"),
        (f"data.batch_size={max(1, rows // 2)} trainer.accumulate={2 * loop.accumulate}", rows > 1),
        (f"data.{'pack' if packed else 'crop'}_frames={frames // 2}", frames > 1),
        ("trainer.quantize=int8 or nf4", loop.quantize == "none"),
    ]
    return [words for words, would_help in found if would_help]


def played_as_trained(demos: DemoSettings | None, objective: Objective) -> DemoSettings | None:
    """The demos in as many steps as the noise levels that are trained, where these are a sampler's and none are set."""
    if demos is None or objective.sampler_steps is None or demos.steps is not None:
        return demos
    return dataclasses.replace(demos, steps=objective.sampler_steps)
