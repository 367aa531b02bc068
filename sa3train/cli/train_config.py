"""Schema of `conf/train.yaml`: one dataclass per group, every key typed, documented and given its default."""

import dataclasses
from typing import Any, Literal

from sa3train.adapters.spec import MAX_RANK, MAX_VALUE, AdapterSpec
from sa3train.core.config import check_settings, describe_unknown_keys, is_known, setting
from sa3train.core.errors import ConfigError
from sa3train.core.user_files import find_name_problem
from sa3train.data.loading.settings import DataSettings
from sa3train.models.hub import choose_weights
from sa3train.training.decoder.settings import DecoderSettings
from sa3train.training.settings import LoggingSettings, TrainingSettings


@dataclasses.dataclass(frozen=True)
class PathSettings:
    """Folders for what is written."""

    runs: str = setting("runs", help="Folder that run folders are created in.", text="path")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    name: str = setting("medium-base", help="Model name, or a folder in the released layout (model=PATH).", text="path")
    weights: Literal["released", "mlx"] = setting(
        "released", help="Files of a named model: released, or the open fp16 packs of the MLX builds, without account."
    )
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", help="Of the frozen weights. auto: bf16 on a GPU that has it, else fp32."
    )

    @property
    def source(self) -> str:
        """The name that stands for these files. `CheckpointError` is raised where there are no packs."""
        return choose_weights(self.name, self.weights)


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The adapter to train."""

    adapter_type: str = setting("dora-rows", help="Adapter method, such as lora, dora-rows, bora, lora-xs or lokr.")
    rank: int = setting(16, help="Rank of the low-rank update.", min=1, max=MAX_RANK)
    alpha: float | None = setting(
        None, help="Scale is alpha / rank; null: alpha = rank, a scale of 1.", min=-MAX_VALUE, max=MAX_VALUE
    )
    dropout: float = setting(0.0, help="Dropout on the adapter's input.", min=0, below=1)
    include: list[str] | None = setting(
        None,
        help='Layers by substring of their path, such as ["layers[0-11]", "to_qkv"]; null: all.',
        text="filled",
        items=(1, 1000),
    )
    exclude: list[str] | None = setting(
        None, help="Substrings of layer paths to leave out.", text="filled", items=(0, 1000)
    )
    rslora: bool = setting(False, help="Scale by alpha / √rank instead of alpha / rank (rsLoRA).")
    rank_pattern: dict[str, int] = setting(
        {}, help='Rank by substring of the layer path, such as {"cross_attn": 8}.', min=1, max=MAX_RANK
    )
    alpha_pattern: dict[str, float] = setting(
        {}, help="Alpha by substring of the layer path.", min=-MAX_VALUE, max=MAX_VALUE
    )
    options: dict[str, Any] = setting({}, help="Further arguments of PEFT's own methods (lokr, loha, oft, …).")
    start_from: str | None = setting(None, help="Adapter file of the same type to continue from.", text="path")

    def __post_init__(self) -> None:
        check_settings(self, "adapter")
        self.make_spec()

    def make_spec(self) -> AdapterSpec:
        """Make the specification of the adapter to train.

        Returns:
            The specification.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["start_from"]
        return AdapterSpec(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run of `sa3-train` is named and written by, besides what is learned."""

    name: str = setting(help="Name of the run.", text="path", characters=200)
    run_dir: str = setting(help="Run folder.", text="path")
    resume: str | None = setting(help="Run folder to resume.", text="path")
    allow_resume_changes: list[str] = setting(
        help="Settings that may differ from the run that is resumed.", text="filled"
    )
    paths: PathSettings
    model: ModelSettings
    adapter: AdapterSettings
    logger: LoggingSettings

    def check_run(self) -> None:
        """Check name and allowed changes.

        Raises:
            ConfigError: The name is none for a folder, or a change is of an unknown setting.
        """
        if self.resume is None and (problem := find_name_problem(f"{self.name}-stamp")):
            raise ConfigError(f"name={self.name} names no folder: {problem}. To choose the run folder: run_dir=FOLDER.")
        for key in self.allow_resume_changes:
            if key != "all" and not key.startswith("identity.") and "*" not in key and not is_known(type(self), key):
                raise ConfigError(f"allow_resume_changes: {describe_unknown_keys(type(self), [key])}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunSettings, TrainingSettings):
    """The whole configuration of `sa3-train`."""

    data: DataSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_run()
        self.loss.check_packing(self.data.pack_frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderTrainConfig(RunSettings, DecoderSettings):
    """The whole configuration of `sa3-train recipe=decoder`."""

    source: str = setting(help="Folder of audio, or what else sa3-encode takes as source.", text="path")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_run()
