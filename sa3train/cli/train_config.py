"""Schema of `conf/train.yaml`: one dataclass per group, every key typed, documented and given its default."""

import dataclasses
from typing import Any, Literal

from sa3train.core.config import check_settings, setting
from sa3train.core.errors import ConfigError
from sa3train.data.loading.settings import DataSettings
from sa3train.training.settings import LoggingSettings, TrainingSettings


@dataclasses.dataclass(frozen=True)
class PathSettings:
    """Folders for what is written."""

    runs: str = setting("runs", help="Folder that run folders are created in.")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    name: str = setting("medium-base", help="Model name, or a folder in the released layout (model=PATH).")
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", help="Of the frozen weights. auto: bf16 on a GPU that has it, else fp32."
    )


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The adapter to train; `sa3train.adapters.spec.AdapterSpec` checks the values."""

    adapter_type: str = setting("dora-rows", help="Adapter method, such as lora, dora-rows, bora, lora-xs or lokr.")
    rank: int = setting(16, help="Rank of the low-rank update.", min=1)
    alpha: float | None = setting(None, help="Scale is alpha / rank; null: alpha = rank, a scale of 1.")
    dropout: float = setting(0.0, help="Dropout on the adapter's input.", min=0, below=1)
    include: list[str] | None = setting(
        None, help='Layers by substring of their path, such as ["layers[0-11]", "to_qkv"]; null: all.'
    )
    exclude: list[str] | None = setting(None, help="Substrings of layer paths to leave out.")
    rslora: bool = setting(False, help="Scale by alpha / √rank instead of alpha / rank (rsLoRA).")
    rank_pattern: dict[str, int] = setting(
        {}, help='Rank by substring of the layer path, such as {"cross_attn": 8}.', min=1
    )
    alpha_pattern: dict[str, float] = setting({}, help="Alpha by substring of the layer path.")
    options: dict[str, Any] = setting({}, help="Further arguments of PEFT's own methods (lokr, loha, oft, …).")
    start_from: str | None = setting(None, help="Adapter file of the same type to continue from.")

    def __post_init__(self) -> None:
        check_settings(self, "adapter")
        if self.start_from == "":
            raise ConfigError("recipe=continue needs an adapter to continue from: set adapter.start_from=FILE.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingSettings):
    """The whole configuration of `sa3-train`."""

    name: str
    run_dir: str
    resume: str | None
    allow_resume_changes: list[str]
    paths: PathSettings
    data: DataSettings
    model: ModelSettings
    adapter: AdapterSettings
    logger: LoggingSettings
