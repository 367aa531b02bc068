"""Schema of train.yaml: one dataclass a group, every key typed, no defaults (they stand in conf/)."""

import dataclasses
from typing import Any, Literal

from sa3train.core.errors import ConfigError
from sa3train.data.loading.prompts import PromptSettings
from sa3train.training.settings import (
    DemoSettings,
    JudgeSettings,
    LoopSettings,
    Objective,
    OptimizerSettings,
    SaveSettings,
    ScheduleSettings,
    TrackSettings,
)


@dataclasses.dataclass(frozen=True)
class PathSettings:
    """Where things go."""

    runs: str


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which clips, how they are cut, and what the model is told about them."""

    dir: str
    repeats: int
    weight: float | None
    more: list[dict[str, Any]]
    prior_share: float
    batch_size: int
    crop_seconds: float | None
    crop_frames: int | None
    crop: Literal["random", "start", "beat"]
    seconds: Literal["crop", "file"]
    tail_seconds: float
    pack_frames: int | None
    pool: int
    heldout_clips: int
    num_workers: int
    verify: Literal["size", "hash", "none"]
    allow_damaged: bool
    prompts: PromptSettings


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    name: str
    dtype: Literal["auto", "fp32", "bf16"]


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The adapter to train; see `sa3train.adapters.spec.AdapterSpec`."""

    kind: str
    rank: int
    alpha: float | None
    dropout: float
    include: list[str] | None
    exclude: list[str] | None
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    options: dict[str, Any]
    start_from: str | None

    def __post_init__(self) -> None:
        if self.start_from == "":
            raise ConfigError("recipe=continue goes on from an adapter: give adapter.start_from=FILE.")


@dataclasses.dataclass(frozen=True)
class CallbackSettings:
    """What happens beside the training itself."""

    save: SaveSettings
    judge: JudgeSettings
    demos: DemoSettings
    report: bool


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything `sa3-train` can be told."""

    name: str
    seed: int
    run_dir: str
    resume: str | None
    resume_changes: list[str]
    paths: PathSettings
    data: DataSettings
    model: ModelSettings
    adapter: AdapterSettings
    objective: Objective
    optimizer: OptimizerSettings
    scheduler: ScheduleSettings
    trainer: LoopSettings
    callbacks: CallbackSettings
    logger: TrackSettings
