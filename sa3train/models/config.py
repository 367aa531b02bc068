"""What a model is made of: frozen dataclasses that `parse.py` fills from a published `model_config.json`."""

from dataclasses import dataclass

FOURIER_FEATURES = 256
HEAD_WIDTH = 64


@dataclass(frozen=True)
class StackConfig:
    """One direction (encoder or decoder) of a SAME autoencoder. Widths in channels, lengths in tokens."""

    width: int
    depth: int
    latent_width: int
    stride: int = 16
    chunk_size: int | None = None  # raw tokens per chunk (chunked kind)
    window: int | None = None  # groups to each side (window kind)
    mask_noise: float = 0.0
    sinusoidal_blocks: int = 0
    conv_mapping: bool = False
    ff_mult: int = 3


@dataclass(frozen=True)
class AutoencoderConfig:
    """A SAME autoencoder: patches of `patch_size` samples, then `stride` patches per latent frame."""

    encoder: StackConfig
    decoder: StackConfig
    latent_width: int
    audio_channels: int = 2
    patch_size: int = 256
    sample_rate: int = 44100
    noise_regularize: bool = True

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent frame."""
        return self.patch_size * self.encoder.stride


@dataclass(frozen=True)
class TextConfig:
    """The prompt conditioner: where its text encoder is, and how many tokens it reads."""

    max_length: int = 256
    model_path: str | None = None  # relative to the checkpoint's folder
    repo_id: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True)
class NumberConfig:
    """A number conditioner: the range it clamps to, in seconds."""

    min_value: float = 0.0
    max_value: float = 384.0


@dataclass(frozen=True)
class ConditionerConfig:
    """Both conditioners and the width they share."""

    width: int
    text: TextConfig
    seconds: NumberConfig


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer. `local_width` = 1 (inpainting mask) + latent channels."""

    latent_width: int
    width: int
    depth: int
    heads: int
    context_width: int
    global_width: int
    local_width: int
    differential: bool = False
    ff_mult: float = 4.0
    memory_tokens: int = 0
    features: int = FOURIER_FEATURES


@dataclass(frozen=True)
class ShiftConfig:
    """The TRAINING shift of noise levels (`distribution_shift_options`)."""

    kind: str = "full"
    min_length: int = 256
    max_length: int = 4096


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint. `sample_size` is the longest generation in samples."""

    sample_rate: int
    sample_size: int
    audio_channels: int
    objective: str  # "rectified_flow" (base) or "rf_denoiser" (post-trained)
    dit: DiTConfig
    conditioner: ConditionerConfig
    autoencoder: AutoencoderConfig
    chunked: bool = False  # whether generate() runs the autoencoder in chunks
    training_shift: ShiftConfig = ShiftConfig()
    use_effective_length: bool = True
    mask_padding: bool = True
