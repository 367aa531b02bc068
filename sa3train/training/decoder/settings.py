"""Settings of a training on the autoencoder's decoder, declared as those of `training/settings.py`.

Nothing heavy is imported, so that command lines can use this module.
"""

from dataclasses import dataclass

from sa3train.core.config import MAX_COUNT, check_settings, setting
from sa3train.core.errors import ConfigError, ConflictError
from sa3train.training.settings import CheckpointSettings, OptimizationSettings, ValidationSchedule


@dataclass(frozen=True)
class DecoderDataSettings:
    """The clips."""

    split: float | str = setting(
        0.1,
        help="Share to hold out (by content, as sa3-encode does), or the path of a list of sources.",
        min=0,
        below=1,
        text="path",
    )
    crop_seconds: float = setting(
        0.75, help="Length of a crop; shorter clips end in silence.", unit="seconds", min=0.2, max=600
    )
    batch_size: int = setting(4, help="Crops per micro-batch on each rank.", min=1, max=65_536)

    def __post_init__(self) -> None:
        check_settings(self, "data")


@dataclass(frozen=True)
class DecoderLossSettings:
    """How far decoded audio is from the clip."""

    stft: float = setting(1.0, help="Weight of log magnitudes, over several window lengths.", min=0, max=1e6)
    waveform: float = setting(0.05, help="Weight of the error's energy relative to the clip's.", min=0, max=1e6)
    mid_side: float = setting(0.5, help="Weight of log magnitudes of mid and side.", min=0, max=1e6)
    round_trip: float = setting(1.0, help="Weight of the same three after encoding and decoding again.", min=0, max=1e6)
    round_trips: int = setting(
        3, help="How often again, at most; drawn for each micro-batch, and only the last decode learns.", min=1, max=100
    )

    def __post_init__(self) -> None:
        check_settings(self, "loss")
        if not self.stft + self.waveform + self.mid_side > 0:
            raise ConfigError("loss.stft, loss.waveform and loss.mid_side are 0: nothing is learned. Set one above 0.")
        if not self.round_trip and self.round_trips != DecoderLossSettings.round_trips:
            raise ConflictError(
                f"loss.round_trips={self.round_trips} has no effect with loss.round_trip=0. Remove one of them.",
                {"loss.round_trips": DecoderLossSettings.round_trips, "loss.round_trip": ...},
            )


@dataclass(frozen=True)
class DecoderValidationSettings(ValidationSchedule):
    """Round trips of fixed clips, by the base and by the adapter."""

    seconds: float = setting(6.0, help="Longest part of a clip.", unit="seconds", min=0.2, max=600)
    round_trips: int = setting(5, help="Times that a clip is encoded and decoded.", min=1, max=100)


@dataclass(frozen=True)
class DecoderDemoSettings:
    """Held-out clips after one round trip and after several, by the base and by the adapter."""

    enabled: bool = setting(True, help="Whether to write demos.")
    every: int = setting(500, help="Optimizer steps between demos.", min=1, max=MAX_COUNT)
    clips: int = setting(3, help="Held-out clips to play.", min=1, max=1000)

    def __post_init__(self) -> None:
        check_settings(self, "callbacks.demos")


@dataclass(frozen=True)
class DecoderCallbackSettings:
    """What happens besides the training steps."""

    checkpoint: CheckpointSettings = setting(CheckpointSettings(), help="Checkpoint and adapter at intervals.")
    validation: DecoderValidationSettings = setting(DecoderValidationSettings(), help="Round trips of fixed clips.")
    demos: DecoderDemoSettings = setting(DecoderDemoSettings(), help="Round trips to listen to.")
    report: bool = setting(True, help="Update report.html in the run folder at every checkpoint.")


@dataclass(frozen=True)
class DecoderSettings(OptimizationSettings):
    """All settings of `sa3train.training.decoder.run.train_decoder`; `sa3-train` adds model, adapter and loggers."""

    data: DecoderDataSettings = DecoderDataSettings()
    loss: DecoderLossSettings = DecoderLossSettings()
    callbacks: DecoderCallbackSettings = DecoderCallbackSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        trainer = self.trainer
        for key, value, off in (
            ("quantize", trainer.quantize, "none"),
            ("compile", trainer.compile, False),
            ("activation_checkpointing", trainer.activation_checkpointing, "auto"),
            ("strategy", trainer.strategy == "fsdp", False),
        ):
            if value != off:
                raise ConfigError(f"trainer.{key} has no effect on the autoencoder's decoder. Remove it.")
