"""Settings of different sections held against each other before a run: what cancels out is an error."""

import dataclasses

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger
from sa3train.data.loading.datamodule import SAMPLE_RATE, LatentDataModule
from sa3train.data.loading.sampler import SAMPLES_PER_FRAME
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


def what_helps(data: LatentDataModule, loop: LoopSettings, recomputing: bool) -> list[str]:
    """Settings that make a training smaller, the gentlest first; `recomputing`: whether blocks are recomputed."""
    rows, longest = data.batch_size, data.longest_crop
    fewer = max((part for part in range(1, rows) if rows % part == 0), default=rows)
    seconds = longest * SAMPLES_PER_FRAME / SAMPLE_RATE / 2
    half = longest // 2 if data.cut_by == "crop_frames" else f"{seconds:.1f}"
    found = [
        ("trainer.activation_checkpointing=blocks", not recomputing),
        (f"data.batch_size={fewer} trainer.accumulate={loop.accumulate * rows // fewer}", fewer < rows),
        (f"data.pack_frames={longest}", data.pack_frames is not None and data.pack_frames > longest),
        (f"data.{data.cut_by}={half}", longest > 1),
        ("trainer.quantize=int8 or nf4", loop.quantize == "none"),
    ]
    return [words for words, would_help in found if would_help]


def played_as_trained(demos: DemoSettings | None, objective: Objective) -> DemoSettings | None:
    """The demos in as many steps as the noise levels that are trained, where these are a sampler's and none are set."""
    if demos is None or objective.sampler_steps is None or demos.steps is not None:
        return demos
    return dataclasses.replace(demos, steps=objective.sampler_steps)
