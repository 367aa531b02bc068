"""What a training run can be told, section by section. Light: nothing heavy is imported, so command lines can use it.

The YAML groups of `conf/` have the same names and keys; each section checks its own values.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sa3train.core.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16-mixed"]


@dataclass(frozen=True)
class Objective:
    """What is trained, with the released models' values as defaults (reference section 6).

    timesteps: how t is drawn; "levels" draws only the noise levels that a sampler of `sampler_steps` steps visits (a
    few-step model's own). shift: warp of t by effective length. coupling: pair items with noise that crosses fewer
    paths. silence_seconds: mean of the exponential extension of the real length into silence; 0 turns it off.
    inpainting: share of each kind of inpainting mask. cfg_dropout: share of items without a prompt.
    loss: "mse", or "huber" with `huber_delta`. weighting: a name, or weights at evenly spaced t from 0 to 1.
    context_weight: weight of the same loss over kept positions.
    """

    timesteps: Literal["trunc_logit_normal", "log_snr", "log_snr_uniform", "uniform", "levels"] = "trunc_logit_normal"
    sampler_steps: int | None = None
    shift: Literal["none", "full", "full.sine", "flux", "logsnr"] = "full"
    coupling: bool = True
    silence_seconds: float = 4.0
    inpainting: dict[str, float] = field(default_factory=lambda: {"segments": 0.1, "full": 0.8, "continuation": 0.1})
    cfg_dropout: float = 0.1
    loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = 1.0
    weighting: str | list[float] = "none"
    context_weight: float = 1.0

    def __post_init__(self) -> None:
        known = ("segments", "full", "continuation", "spans")
        for kind in self.inpainting:
            _one_of("objective.inpainting", kind, known)
        shares = list(self.inpainting.values())
        if not shares or min(shares) < 0 or sum(shares) <= 0:
            raise ConfigError("objective.inpainting needs shares of at least 0, not all 0.")
        if isinstance(self.weighting, str):
            _one_of("objective.weighting", self.weighting, ("none", "min_snr", "cosmap"))
        elif len(self.weighting) < 2 or min(self.weighting) < 0:
            raise ConfigError("objective.weighting needs two or more weights of at least 0, for t from 0 to 1.")
        _between("objective.cfg_dropout", self.cfg_dropout, 0, 1)
        _at_least("objective.silence_seconds", self.silence_seconds, 0)
        _at_least("objective.context_weight", self.context_weight, 0)
        if self.huber_delta <= 0:
            raise ConfigError(f"objective.huber_delta={self.huber_delta} must be above 0.")
        if self.loss != "huber" and self.huber_delta != 1.0:
            raise ConfigError("objective.huber_delta has no effect without objective.loss=huber.")
        if (self.timesteps == "levels") != (self.sampler_steps is not None):
            raise ConfigError(
                "objective.sampler_steps goes with objective.timesteps=levels, and has no effect without it."
            )
        if self.sampler_steps is not None:
            _at_least("objective.sampler_steps", self.sampler_steps, 1)
            if self.shift != "none":
                raise ConfigError("objective.timesteps=levels are noise levels already: set objective.shift=none.")


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its values; `options` are further arguments of that optimizer.

    lora_plus: the B matrices learn at lr × this (LoRA+, Hayou et al. 2024).
    """

    name: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.01
    lora_plus: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "lora_plus"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be above 0.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={self.betas} must be two numbers from 0 to below 1.")
        _at_least("optimizer.weight_decay", self.weight_decay, 0)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate rises straight over `warmup_steps`, then follows the schedule called `name` with `options`."""

    name: str = "constant"
    warmup_steps: int = 0
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopSettings:
    """The loop and the machine it runs on (`trainer` in the configuration).

    max_steps: optimizer steps. accumulate: micro-batches per step. clip: limit of the gradient norm, 0 for none.
    average: decay of a running average (EMA) of the adapter, null for none. log_every: steps per log line.
    precision: "auto" is bf16-mixed on a GPU that has it, else fp32. quantize: the frozen base in 8 or 4 bits.
    accelerator, devices, num_nodes, strategy: as in Lightning, but that "auto" is CUDA, else the CPU; "fsdp" shards the
    frozen base. activation_checkpointing: none, blocks, or auto by measured memory. compile: torch.compile each block.
    threads: CPU threads of torch, null for its own choice.
    """

    max_steps: int = 2000
    accumulate: int = 1
    clip: float = 1.0
    average: float | None = None
    log_every: int = 10
    precision: Precision = "auto"
    quantize: Literal["none", "int8", "fp8", "nf4"] = "none"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    activation_checkpointing: Literal["none", "blocks", "auto"] = "auto"
    compile: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulate", "log_every", "num_nodes"):
            _at_least(f"trainer.{name}", getattr(self, name), 1)
        _at_least("trainer.clip", self.clip, 0)
        if self.average is not None and not 0 < self.average < 1:
            raise ConfigError(
                f"trainer.average={self.average} must lie between 0 and 1, such as 0.99; null turns it off."
            )
        if self.devices != "auto":
            _at_least("trainer.devices", self.devices, 1)
        if self.threads is not None:
            _at_least("trainer.threads", self.threads, 1)


@dataclass(frozen=True)
class SaveSettings:
    """Training state and adapter every `every` steps; the last `keep` states stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least("callbacks.save.every", self.every, 1)
        _at_least("callbacks.save.keep", self.keep, 1)


@dataclass(frozen=True)
class JudgeSettings:
    """Fixed evaluation every `every` steps on up to `clips` held-out and `clips` training clips.

    enabled: whether it happens at all. rows: (clip, level) pairs computed at a time. select_best: the run's adapter is
    that of the lowest held-out loss. patience: stop after so many judgements without a new best. seed: of the fixed
    noise.
    """

    enabled: bool = True
    every: int = 250
    clips: int = 16
    rows: int = 20
    select_best: bool = False
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("callbacks.judge.every", self.every, 1)
        _at_least("callbacks.judge.clips", self.clips, 1)
        _at_least("callbacks.judge.rows", self.rows, 1)
        if self.patience is not None:
            _at_least("callbacks.judge.patience", self.patience, 1)
        if not self.enabled and (self.select_best or self.patience):
            raise ConfigError("callbacks.judge: select_best and patience have no effect with enabled=false.")


@dataclass(frozen=True)
class DemoSettings:
    """Audio from fixed seeds at step 0 and every `every` steps.

    enabled: whether it happens at all. prompts: texts to play. heldout_prompts: how many captions of held-out clips to
    add. duration: seconds. strengths: of the adapter; 0 (the base) is always played once. sibling: also play on the
    model's twin when it is on this machine. inpaint: also inpaint the middle of a held-out clip. steps, cfg_scale: of
    the model that is trained, null for its defaults; the twin plays with its own. memorisation_clips: generations for
    the memorisation score at the end; 0 for none.
    """

    enabled: bool = True
    every: int = 500
    prompts: list[str] = field(default_factory=list)
    heldout_prompts: int = 2
    duration: float = 10.0
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0])
    sibling: bool = True
    inpaint: bool = True
    steps: int | None = None
    cfg_scale: float | None = None
    seed: int = 0
    memorisation_clips: int = 0

    def __post_init__(self) -> None:
        _at_least("callbacks.demos.every", self.every, 1)
        _at_least("callbacks.demos.heldout_prompts", self.heldout_prompts, 0)
        _at_least("callbacks.demos.memorisation_clips", self.memorisation_clips, 0)
        if not self.duration > 0:
            raise ConfigError(f"callbacks.demos.duration={self.duration} must be above 0 seconds.")
        if not self.strengths:
            raise ConfigError("callbacks.demos.strengths is empty: give at least one, such as [1.0].")
        if self.steps is not None:
            _at_least("callbacks.demos.steps", self.steps, 1)
        if not (self.prompts or self.heldout_prompts or self.inpaint or self.memorisation_clips):
            raise ConfigError(
                "callbacks.demos has nothing to play: give prompts, heldout_prompts or inpaint, or set enabled=false."
            )


@dataclass(frozen=True)
class TrackSettings:
    """Where metrics go besides `metrics.csv`: nowhere, tensorboard or wandb; the rest is for wandb alone."""

    name: Literal["csv", "tensorboard", "wandb"] = "csv"
    mode: Literal["online", "offline", "disabled"] | None = None
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.name == "wandb":
            if self.mode is None or not self.project:
                raise ConfigError("logger=wandb needs logger.mode (online, offline or disabled) and logger.project.")
        elif self.mode or self.project or self.entity or self.group or self.tags:
            raise ConfigError(
                f"logger.mode, project, entity, group and tags have no effect with logger={self.name}: "
                "use logger=wandb."
            )
        if not self.timeout > 0:
            raise ConfigError(f"logger.timeout={self.timeout} must be above 0 seconds.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    from sa3train.core.config import closest

    if value not in known:
        close = closest(value, known)
        hint = f"Did you mean {close}?" if close else f"Choose from: {', '.join(known)}."
        raise ConfigError(f"{name}: {value!r} is unknown. {hint}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}={value} must be at least {least}.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} must be between {low} and {high}.")
