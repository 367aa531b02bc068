"""What a model is made of: frozen dataclasses that `parse.py` fills from a published `model_config.json`."""

from dataclasses import dataclass

FOURIER_FEATURES = 256
HEAD_WIDTH = 64


@dataclass(frozen=True)
class StackConfig:
    """One direction (encoder or decoder) of a SAME autoencoder (docs/model.md, section 2).

    Attributes:
        width: Channels inside.
        depth: Layers.
        latent_width: Channels of a latent frame.
        stride: Patches per latent frame.
        chunk_size: Patches of a chunk (chunked kind).
        window: Groups that are seen to each side (window kind).
        mask_noise: Scale of the noise on new tokens.
        sinusoidal_blocks: Last layers with a sine activation, and one.
        conv_mapping: Whether the map to patches has kernel 3.
        ff_mult: Inner width of the feed-forward, times the width.
    """

    width: int
    depth: int
    latent_width: int
    stride: int = 16
    chunk_size: int | None = None
    window: int | None = None
    mask_noise: float = 0.0
    sinusoidal_blocks: int = 0
    conv_mapping: bool = False
    ff_mult: int = 3


@dataclass(frozen=True)
class AutoencoderConfig:
    """A SAME autoencoder: patches of `patch_size` samples, then `stride` patches per latent frame.

    Attributes:
        encoder: Encoder.
        decoder: Decoder.
        latent_width: Channels of a latent frame.
        audio_channels: Channels of audio.
        patch_size: Samples of a patch.
        sample_rate: Sample rate in Hz.
        noise_regularize: Whether decoding adds the bottleneck's noise.
    """

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
    """The prompt conditioner.

    Attributes:
        max_length: Tokens of a prompt that are read.
        model_path: Folder of the text encoder, relative to the checkpoint's.
        repo_id: Or its repository.
        subfolder: Folder in the repository.
    """

    max_length: int = 256
    model_path: str | None = None
    repo_id: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True)
class NumberConfig:
    """A number conditioner.

    Attributes:
        min_value: Smallest value in seconds; lower ones are clamped.
        max_value: Largest value in seconds.
    """

    min_value: float = 0.0
    max_value: float = 384.0


@dataclass(frozen=True)
class ConditionerConfig:
    """Both conditioners.

    Attributes:
        width: Width of their tokens.
        text: The prompt.
        seconds: The duration.
    """

    width: int
    text: TextConfig
    seconds: NumberConfig


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer (docs/model.md, section 4).

    Attributes:
        latent_width: Channels of a latent frame.
        width: Channels inside.
        depth: Blocks.
        heads: Attention heads.
        context_width: Width of the condition tokens.
        global_width: Width of the global condition.
        local_width: 1 (inpainting mask) + latent channels.
        differential: Whether attention is differential.
        ff_mult: Inner width of the feed-forward, times the width.
        memory_tokens: Learned tokens in front of the frames.
        features: Fourier features of the noise level.
    """

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
class ModelConfig:
    """A whole checkpoint.

    Attributes:
        sample_rate: Sample rate in Hz.
        sample_size: Samples of the longest generation.
        audio_channels: Channels of audio.
        objective: "rectified_flow" (base) or "rf_denoiser" (post-trained).
        dit: Diffusion transformer.
        conditioner: Prompt and duration.
        autoencoder: SAME.
        chunked: Whether a generation runs the autoencoder in chunks.
    """

    sample_rate: int
    sample_size: int
    audio_channels: int
    objective: str
    dit: DiTConfig
    conditioner: ConditionerConfig
    autoencoder: AutoencoderConfig
    chunked: bool = False
