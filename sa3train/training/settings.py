"""Settings of a training run, one dataclass per section: value, meaning, unit and range of each are declared here.

The YAML groups of `conf/` have the same names and keys; a test holds each group's `base.yaml` equal to its dataclass.
Nothing heavy is imported, so that command lines can use this module.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sa3train.core.config import DEVICES, MAX_COUNT, MAX_SEED, check_choice, check_settings, setting
from sa3train.core.errors import ConfigError, ConflictError

Precision = Literal["auto", "fp32", "bf16-mixed"]
INPAINTING_MASKS = ("segments", "full", "continuation", "spans")
WEIGHTINGS = ("none", "min_snr", "cosmap")


@dataclass(frozen=True)
class LossSettings:
    """What is learned from a batch (docs/model.md, section 6).

    With timesteps=trunc_logit_normal, which is loss=released, these are the values of the released models' training.
    """

    timesteps: Literal["low_discrepancy", "uniform", "trunc_logit_normal", "log_snr", "log_snr_uniform", "levels"] = (
        setting(
            "low_discrepancy",
            help="Distribution of the noise level t. low_discrepancy: uniform, evenly over successive clips (packed "
            "rows repeat some). levels: those that a sampler of sampler_steps steps visits.",
        )
    )
    sampler_steps: int | None = setting(None, help="Sampler steps of timesteps=levels.", min=1, max=1000)
    shift: Literal["full", "full.sine", "flux", "logsnr", "none"] = setting(
        "full", help="Warp of t by the effective length of the clip."
    )
    coupling: bool = setting(True, help="Pair the clips of a batch with noise so that their paths cross less.")
    silence_seconds: float = setting(
        4.0, help="Mean extension of a clip's end into silence; 0 disables it.", unit="seconds", min=0, max=600
    )
    inpainting: dict[str, float] = setting(
        {"segments": 0.1, "full": 0.8, "continuation": 0.1},
        help="Share of each inpainting mask: segments, full (generate everything), continuation, spans.",
        min=0,
        max=1e6,
        items=(1, len(INPAINTING_MASKS)),
    )
    cfg_dropout: float = setting(
        0.1, help="Probability of training a clip with a zero cross-attention condition, for guidance.", min=0, max=1
    )
    function: Literal["mse", "huber"] = setting("mse", help="Loss function on the velocity error.")
    huber_delta: float = setting(1.0, help="Error at which the Huber loss turns linear.", above=0, max=1e6)
    weighting: str | list[float] = setting(
        "none",
        help="none, min_snr, cosmap, or a list of weights at evenly spaced t from 0 to 1.",
        min=0,
        max=1e6,
        items=(2, 1000),
    )
    context_weight: float = setting(1.0, help="Weight of the loss over context frames of inpainting.", min=0, max=1e6)

    def __post_init__(self) -> None:
        check_settings(self, "loss")
        for mask in self.inpainting:
            check_choice("loss.inpainting", mask, INPAINTING_MASKS)
        if not sum(self.inpainting.values()) > 0:
            raise ConfigError("loss.inpainting has no share above 0. Set at least one, such as {full: 1.0}.")
        if isinstance(self.weighting, str):
            check_choice("loss.weighting", self.weighting, WEIGHTINGS)
        elif not sum(self.weighting) > 0:
            raise ConfigError("loss.weighting is 0 everywhere, so that nothing is learned. Set a weight above 0.")
        if self.function != "huber" and self.huber_delta != 1.0:
            raise ConflictError(
                "loss.huber_delta has no effect without loss.function=huber.",
                {"loss.huber_delta": 1.0, "loss.function": ...},
            )
        if (self.timesteps == "levels") != (self.sampler_steps is not None):
            raise ConflictError(
                "loss.timesteps=levels and loss.sampler_steps need each other. Set both, or neither.",
                {"loss.sampler_steps": None, "loss.timesteps": ...},
            )
        if self.sampler_steps is not None and self.shift != "none":
            raise ConflictError(
                "loss.shift has no effect on loss.timesteps=levels. Set loss.shift=none.",
                {"loss.shift": "none", "loss.timesteps": ...},
            )

    def check_packing(self, pack_frames: int | None) -> None:
        """Check that packed rows, which have no room behind a clip, are not to be extended into silence.

        Args:
            pack_frames: `data.pack_frames`.

        Raises:
            ConflictError: They are.
        """
        if pack_frames is not None and self.silence_seconds > 0:
            raise ConflictError(
                f"loss.silence_seconds={self.silence_seconds} has no effect with data.pack_frames: a packed row "
                "has no room behind a clip. Set it to 0.",
                {"loss.silence_seconds": 0.0, "data.pack_frames": None},
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and its arguments."""

    name: str = setting("adamw", help="Optimizer: adamw, adamw-8bit, prodigy, schedule-free, lion or muon.")
    lr: float = setting(
        1e-4,
        help="Peak learning rate. On nano and nano-base ten times a recipe's (adamw; 0.001 at most), unless it is set.",
        min=1e-12,
        max=100,
    )
    betas: list[float] = setting(
        [0.9, 0.95], help="Decay rates of the first and second moments.", min=0, below=1, items=(2, 2)
    )
    weight_decay: float = setting(0.01, help="Decoupled weight decay.", min=0, max=1000)
    lora_plus: float = setting(1.0, help="Factor on the learning rate of the B matrices (LoRA+).", above=0, max=1e4)
    options: dict[str, Any] = setting({}, help="Further arguments of this optimizer.", min=0, max=1e9)

    def __post_init__(self) -> None:
        check_settings(self, "optimizer")


@dataclass(frozen=True)
class SchedulerSettings:
    """Learning-rate schedule: a linear warm-up, then the curve called `name`."""

    name: str = setting("constant", help="Schedule after the warm-up: constant, cosine or inverse.")
    warmup_steps: int = setting(0, help="Optimizer steps of linear warm-up.", min=0, max=MAX_COUNT)
    options: dict[str, float] = setting(
        {}, help="Arguments of the schedule: cosine floor; inverse gamma and power.", min=0, max=1e9
    )

    def __post_init__(self) -> None:
        check_settings(self, "scheduler")


@dataclass(frozen=True)
class TrainerSettings:
    """The training loop and the devices it runs on."""

    max_steps: int = setting(2000, help="Optimizer steps.", min=1, max=MAX_COUNT)
    accumulate: int = setting(1, help="Micro-batches per optimizer step.", min=1, max=100_000)
    gradient_clip: float = setting(1.0, help="Maximum gradient norm; 0 disables clipping.", min=0, max=1e6)
    ema_decay: float | None = setting(
        None, help="Decay of the adapter's EMA, such as 0.97; null: off.", above=0, below=1
    )
    log_every: int = setting(10, help="Optimizer steps per line of metrics.", min=1, max=MAX_COUNT)
    precision: Precision = setting(
        "auto", help="auto: bf16-mixed on a GPU that gains from it or a bf16 base, else fp32."
    )
    quantize: Literal["none", "int8", "fp8", "nf4"] = setting("none", help="Quantization of the frozen base.")
    accelerator: str = setting(
        "auto",
        help=f"auto (the best that works), gpu (the same, but no CPU), {DEVICES}.",
        text="filled",
    )
    devices: int | Literal["auto"] = setting(
        "auto", help="Ranks per node; auto: all GPUs of CUDA, or one rank.", min=1, max=1024
    )
    num_nodes: int = setting(1, help="Nodes that train together.", min=1, max=10_000)
    strategy: Literal["auto", "ddp", "fsdp"] = setting(
        "auto", help="fsdp shards the frozen base. auto: ddp with several ranks."
    )
    activation_checkpointing: Literal["none", "blocks", "auto"] = setting(
        "auto", help="Recompute blocks in the backward pass. auto: if memory demands it."
    )
    compile: bool = setting(False, help="Run torch.compile on each transformer block.")
    threads: int | None = setting(
        None, help="CPU threads of torch, at most one per core; null: torch's default.", min=1, max=1024
    )

    def __post_init__(self) -> None:
        check_settings(self, "trainer")


@dataclass(frozen=True)
class CheckpointSettings:
    """How often a checkpoint and the adapter are saved."""

    every: int = setting(500, help="Optimizer steps between checkpoints.", min=1, max=MAX_COUNT)
    keep_last: int = setting(2, help="Checkpoints kept; older ones are deleted.", min=1, max=MAX_COUNT)

    def __post_init__(self) -> None:
        check_settings(self, "callbacks.checkpoint")


@dataclass(frozen=True)
class ValidationSchedule:
    """When to validate and on how many clips, whatever is measured, and what follows from it."""

    enabled: bool = setting(True, help="Whether to validate.")
    every: int = setting(250, help="Optimizer steps between validations.", min=1, max=MAX_COUNT)
    clips: int = setting(16, help="Maximum held-out clips, and as many training clips.", min=1, max=MAX_COUNT)
    select_best: bool = setting(False, help="Export the adapter of the lowest validation loss instead of the last.")
    patience: int | None = setting(
        None, help="Stop after so many validations without a new best; null: never.", min=1, max=MAX_COUNT
    )
    seed: int = setting(0, help="Seed of the fixed noise.", min=0, max=MAX_SEED)
    strengths: list[float] = setting(
        [0.5, 0.75, 1.25],
        help="Strengths besides 1 at which held-out clips are measured after the last step, without compile or fsdp.",
        min=-100,
        max=100,
        items=(0, 100),
    )

    def __post_init__(self) -> None:
        check_settings(self, "callbacks.validation")
        if not self.enabled and (self.select_best or self.patience):
            section = "callbacks.validation"
            raise ConflictError(
                f"{section}: select_best and patience have no effect with enabled=false.",
                {f"{section}.select_best": False, f"{section}.patience": None, f"{section}.enabled": ...},
            )


@dataclass(frozen=True)
class ValidationSettings(ValidationSchedule):
    """Loss on fixed clips with fixed noise and noise levels, for the base and for the adapter."""

    batch_size: int = setting(20, help="(clip, noise level) pairs per forward pass.", min=1, max=65_536)


@dataclass(frozen=True)
class DemoSettings:
    """Audio generated from fixed seeds at step 0 and at intervals, by the base and by the adapter."""

    enabled: bool = setting(True, help="Whether to generate demos.")
    every: int = setting(500, help="Optimizer steps between demos.", min=1, max=MAX_COUNT)
    prompts: list[str] = setting([], help="Prompts to generate from.", items=(0, 1000))
    heldout_prompts: int = setting(2, help="Captions of held-out clips to add to the prompts.", min=0, max=1000)
    duration: float = setting(10.0, help="Length of each demo.", unit="seconds", above=0, max=3600)
    strengths: list[float] = setting(
        [0.5, 1.0], help="Adapter strengths; the base (0) is always played once.", min=-100, max=100, items=(1, 100)
    )
    also_post_trained: bool = setting(
        True, help="Also play on the sibling (post-trained or base model) if it is downloaded."
    )
    inpaint: bool = setting(True, help="Also inpaint the middle of a held-out clip.")
    steps: int | None = setting(None, help="Sampler steps on the trained model; null: its default.", min=1, max=1000)
    cfg_scale: float | None = setting(
        None, help="Guidance scale on the trained model; null: its default.", min=-1000, max=1000
    )
    seed: int = setting(0, help="Seed of the first demo.", min=0, max=MAX_SEED - MAX_COUNT)
    memorization_clips: int = setting(
        0, help="Clips generated at the end for the memorization score.", min=0, max=MAX_COUNT
    )

    def __post_init__(self) -> None:
        check_settings(self, "callbacks.demos")
        if not (self.prompts or self.heldout_prompts or self.inpaint or self.memorization_clips):
            raise ConfigError(
                "callbacks.demos has nothing to generate. Set prompts, heldout_prompts or inpaint, or enabled=false."
            )


@dataclass(frozen=True)
class LoggingSettings:
    """Where metrics go besides `metrics.csv` in the run folder."""

    name: Literal["csv", "tensorboard", "wandb"] = setting("csv", help="Logger besides metrics.csv; csv adds none.")
    mode: Literal["online", "offline", "disabled"] | None = setting(None, help="W&B mode.")
    project: str | None = setting(None, help="W&B project.", text="filled", characters=128)
    entity: str | None = setting(None, help="W&B entity; null: the account's default.", text="filled", characters=128)
    group: str | None = setting(None, help="W&B group.", text="filled", characters=128)
    tags: list[str] = setting([], help="W&B tags.", text="filled", characters=64)
    timeout: float = setting(30.0, help="Time to wait for the W&B server.", unit="seconds", above=0, max=3600)

    def __post_init__(self) -> None:
        check_settings(self, "logger")
        if self.name == "wandb":
            if self.mode is None or not self.project:
                raise ConfigError("logger=wandb needs logger.mode (online, offline or disabled) and logger.project.")
        elif self.mode or self.project or self.entity or self.group or self.tags:
            wandb_only: dict[str, Any] = {"mode": None, "project": None, "entity": None, "group": None, "tags": []}
            raise ConflictError(
                f"logger.{', '.join(wandb_only)} have no effect with logger={self.name}. Use logger=wandb.",
                {f"logger.{name}": off for name, off in wandb_only.items()} | {"logger.name": ...},
            )


@dataclass(frozen=True)
class CallbackSettings:
    """What happens besides the training steps."""

    checkpoint: CheckpointSettings = setting(CheckpointSettings(), help="Checkpoint and adapter at intervals.")
    validation: ValidationSettings = setting(ValidationSettings(), help="Loss on fixed clips, noise and noise levels.")
    demos: DemoSettings = setting(DemoSettings(), help="Audio from fixed seeds, base and adapter side by side.")
    report: bool = setting(True, help="Update report.html in the run folder at every checkpoint.")


@dataclass(frozen=True)
class OptimizationSettings:
    """Settings of every training, whatever is learned."""

    optimizer: OptimizerSettings = OptimizerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    trainer: TrainerSettings = TrainerSettings()
    seed: int = setting(0, help="Seed of everything random.", min=0, max=MAX_SEED)

    def __post_init__(self) -> None:
        check_settings(self)
        steps, warmup = self.trainer.max_steps, self.scheduler.warmup_steps
        if warmup >= steps:
            raise ConflictError(
                f"scheduler.warmup_steps={warmup} must be below trainer.max_steps={steps}. Set it to {steps // 10}.",
                {"scheduler.warmup_steps": steps // 10, "trainer.max_steps": ...},
            )
        if self.trainer.ema_decay is not None and self.optimizer.name == "schedule-free":
            raise ConflictError(
                f"trainer.ema_decay={self.trainer.ema_decay} replaces schedule-free's own average, which then has no "
                "effect. Set trainer.ema_decay=null, or use another optimizer.",
                {"trainer.ema_decay": None, "optimizer.name": ...},
            )


@dataclass(frozen=True)
class TrainingSettings(OptimizationSettings):
    """All settings of `sa3train.training.run.train`; `sa3-train` adds data, model, adapter and loggers."""

    loss: LossSettings = LossSettings()
    callbacks: CallbackSettings = CallbackSettings()
