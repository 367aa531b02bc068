"""The SAME autoencoder (docs/model.md, section 2): stereo audio to latent frames and back, whole or in chunks.

Shape legend: B batch, C audio channels or latent channels, N samples, P patches (16 per latent frame), K patch width,
T latent frames, L rows of all clips laid end to end.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.core.errors import ConfigError
from sa3train.models.config import AutoencoderConfig
from sa3train.models.resampler import AutoencoderStack, Resampler, draw_noise
from sa3train.models.weight_files import compute_fingerprint

_LOAD_LOCK = threading.Lock()
BOTTLENECK_NOISE = 0.001
CHUNK_SIZE, OVERLAP = 128, 32
WIDE_CHUNKS = 4
"""Chunks of SAME-L at a time on a GPU, where one takes as many launches as several."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of latent frames.

    Attributes:
        span: Frames of the chunk as the released model runs it.
        kept: Frames that go into the result.
        computed: Frames that have to be computed for that.
    """

    span: range
    kept: range
    computed: range

    def kept_slice(self, scale: int = 1) -> slice:
        """Get where `kept` is in what was computed.

        Args:
            scale: Units per frame, such as samples.

        Returns:
            Slice.
        """
        first = self.kept.start - self.computed.start
        return slice(first * scale, (first + len(self.kept)) * scale)

    def computed_slice(self) -> slice:
        """Get where `computed` is in the chunk.

        Returns:
            Slice.
        """
        return slice(self.computed.start - self.span.start, self.computed.stop - self.span.start)


def list_chunk_spans(frames: int, chunk_size: int, overlap: int) -> list[range]:
    """List the frames of each chunk: one starts every `chunk_size - overlap` frames, and the last ends at the end.

    Args:
        frames: Latent frames in all.
        chunk_size: Frames of a chunk.
        overlap: Frames shared with the next chunk.

    Returns:
        Ranges of frames.

    Raises:
        ConfigError: The overlap is negative or not below the chunk size.
    """
    if not 0 <= overlap < chunk_size:
        raise ConfigError(f"overlap must be at least 0 and below chunk_size, not {overlap} and {chunk_size}")
    if frames <= chunk_size:
        return [range(frames)]
    starts = list(range(0, frames - chunk_size + 1, chunk_size - overlap))
    if starts[-1] + chunk_size != frames:
        starts.append(frames - chunk_size)
    return [range(start, start + chunk_size) for start in starts]


def plan_chunks(frames: int, chunk_size: int, overlap: int, reach: int, unit: int) -> list[Chunk]:
    """Plan chunks: half the overlap is dropped at inner edges, and later chunks overwrite earlier ones.

    A kept frame depends on none further away than `reach`, so the rest of a chunk is not computed. What is computed
    starts and ends at whole `unit`s from the chunk's start, or at its end.

    Args:
        frames: Latent frames in all.
        chunk_size: Frames of a chunk.
        overlap: Frames shared with the next chunk.
        reach: Frames to each side that a frame depends on.
        unit: Frames that are computed together.

    Returns:
        The chunks in order.
    """
    spans = list_chunk_spans(frames, chunk_size, overlap)
    starts = [span.start + (overlap // 2 if span.start > 0 else 0) for span in spans]
    return [
        Chunk(span, range(start, stop), _find_computed_range(span, start, stop, reach, unit))
        for span, (start, stop) in zip(spans, itertools.pairwise([*starts, frames]), strict=True)
    ]


def _find_computed_range(span: range, start: int, stop: int, reach: int, unit: int) -> range:
    first = max(0, start - reach - span.start) // unit * unit
    last = -(-(stop + reach - span.start) // unit) * unit
    return range(span.start + first, min(span.start + last, span.stop))


def patchify(audio_BCN: Tensor, size: int) -> Tensor:
    """Fold audio into patches, channel-major within a patch.

    Args:
        audio_BCN: Audio; N is a multiple of `size`.
        size: Samples of a patch.

    Returns:
        Patches (B, P, C * size).
    """
    return audio_BCN.unflatten(-1, (-1, size)).permute(0, 2, 1, 3).flatten(2)


def unpatchify(patches_BPK: Tensor, channels: int) -> Tensor:
    """Unfold patches: the inverse of `patchify`.

    Args:
        patches_BPK: Patches.
        channels: Audio channels.

    Returns:
        Audio (B, C, N).
    """
    return patches_BPK.unflatten(-1, (channels, -1)).permute(0, 2, 1, 3).flatten(2)


class Bottleneck(nn.Module):
    """A frozen affine map that gives latents unit scale. `noise_scaling_factor` is empty, as in the released files."""

    running_std: Tensor
    noise_scaling_factor: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, width, 1))
        self.scaling_factor = nn.Parameter(torch.ones(1, width, 1))
        self.noise_scaling_factor = nn.Parameter(torch.ones(1, 0, 1))
        self.register_buffer("running_std", torch.ones(1))

    def encode(self, z_BCT: Tensor) -> Tensor:
        """Normalize latents to unit scale.

        Args:
            z_BCT: Output of the encoder.

        Returns:
            Latents.
        """
        return (z_BCT * self.scaling_factor + self.bias) / self.running_std

    def decode(self, z_BCT: Tensor, noise: bool, generator: torch.Generator | None) -> Tensor:
        """Undo the normalization, with the small noise that the decoder was trained with.

        Args:
            z_BCT: Latents.
            noise: Whether to add the noise.
            generator: Source of the noise.

        Returns:
            Input of the decoder.
        """
        scaled = z_BCT * self.running_std
        if not noise:
            return scaled
        return scaled + draw_noise(z_BCT.shape, z_BCT, generator) * self.running_std * BOTTLENECK_NOISE


class Autoencoder(nn.Module):
    """SAME. Noise is part of the released model; `noise=False` leaves it out, which makes a call deterministic.

    Attributes:
        chunked: Meaning of `chunked=None` in `encode` and `decode`.
        load_encoder: Loads the encoder's weights on first use, where loading the model left them out.
        file_fingerprint: Computes the fingerprint from the file, without the weights in memory.
    """

    def __init__(self, config: AutoencoderConfig, chunked: bool = False) -> None:
        super().__init__()
        self.config = config
        self.chunked = chunked
        patch_width = config.audio_channels * config.patch_size
        self.encoder = AutoencoderStack(config.encoder, patch_width, "encoder")
        self.decoder = AutoencoderStack(config.decoder, patch_width, "decoder")
        self.bottleneck = Bottleneck(config.latent_width)
        self.file_fingerprint: Callable[[], str] | None = None
        self.load_encoder: Callable[[nn.Module, torch.device, torch.dtype], None] | None = None

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.config.latent_width

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent frame."""
        return self.config.downsampling_ratio

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""
        return self.config.sample_rate

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights. Inputs are cast to it, and outputs back to the input's."""
        return self.bottleneck.bias.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.bottleneck.bias.device

    def fingerprint(self) -> str:
        """Compute a fingerprint of the weights: equal for one SAME stand-alone or inside a model, in fp32 or bf16.

        Returns:
            Hex SHA-256.
        """
        if self.file_fingerprint is not None:
            return self.file_fingerprint()
        return compute_fingerprint(sorted(self.state_dict().items(), key=lambda item: item[0]))

    def count_frames(self, samples: int) -> int:
        """Count the latent frames that `encode` makes.

        Args:
            samples: Samples of audio.

        Returns:
            Frames.
        """
        groups = self.encoder.resampler.groups_per_chunk
        return -(-samples // (self.downsampling_ratio * groups)) * groups

    def _load_encoder(self) -> None:
        with (
            _LOAD_LOCK,
            torch.inference_mode(mode=False),
        ):  # weights are not inference tensors, whoever needs them first
            if self.load_encoder is not None:
                self.load_encoder(self.encoder, self.device, self.dtype)
                self.load_encoder = None

    def encode(
        self,
        audio_BCN: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: bool = True,
        chunked: bool | None = None,
        chunk_size: int = CHUNK_SIZE,
        overlap: int = OVERLAP,
    ) -> Tensor:
        """Encode audio to latents. The end is padded with silence to whole frames (to two in the chunked kind).

        Args:
            audio_BCN: Audio; another number of channels is a `ValueError`.
            generator: Source of the noise.
            noise: Whether to add the noise of the released model.
            chunked: Whether to run in chunks; None is `self.chunked`. Audio shorter than one chunk runs whole.
            chunk_size: Latent frames of a chunk.
            overlap: Frames shared with the next chunk. Sizes that do not fit are a `ConfigError`.

        Returns:
            Latents (B, C, T) in the dtype of the audio.
        """
        self._load_encoder()
        _check_channels(audio_BCN, self.config.audio_channels, "audio (batch, channels, samples)")
        frames = -(-audio_BCN.shape[-1] // self.downsampling_ratio)
        chunks = self._plan(self.encoder.resampler, frames, chunked, chunk_size, overlap)
        audio_BCN = F.pad(audio_BCN, (0, frames * self.downsampling_ratio - audio_BCN.shape[-1]))
        parts = [self._encode(audio_BCN, together, noise, generator) for together in self._group_chunks(chunks)]
        return torch.cat(parts, dim=-1)

    def decode(
        self,
        z_BCT: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: bool = True,
        chunked: bool | None = None,
        chunk_size: int = CHUNK_SIZE,
        overlap: int = OVERLAP,
    ) -> Tensor:
        """Decode latents to audio.

        Draws the bottleneck's noise first and the new tokens' second, chunk by chunk when chunked.

        Args:
            z_BCT: Latents; another number of channels is a `ValueError`.
            generator: Source of the noise.
            noise: Whether to add the noise of the released model.
            chunked: Whether to run in chunks; None is `self.chunked`. Latents shorter than one chunk run whole.
            chunk_size: Latent frames of a chunk.
            overlap: Frames shared with the next chunk. Sizes that do not fit are a `ConfigError`.

        Returns:
            Audio (B, C, 4096 T). Run whole, the chunked kind makes an odd T one frame longer.
        """
        _check_channels(z_BCT, self.latent_channels, "latents (batch, channels, frames)")
        chunks = self._plan(self.decoder.resampler, z_BCT.shape[-1], chunked, chunk_size, overlap)
        parts = [self._decode(z_BCT, together, noise, generator) for together in self._group_chunks(chunks)]
        return torch.cat(parts, dim=-1)

    def _plan(
        self, resampler: Resampler, frames: int, chunked: bool | None, chunk_size: int, overlap: int
    ) -> list[Chunk]:
        unit = resampler.groups_per_chunk
        if (self.chunked if chunked is None else chunked) and frames > chunk_size:
            return plan_chunks(frames, chunk_size, overlap, resampler.reach, unit)
        return [Chunk(range(frames), range(-(-frames // unit) * unit), range(frames))]

    def list_noise_shapes(self, batch: int, frames: int, chunked: bool | None = None) -> list[tuple[int, ...]]:
        """List the shapes of the noise that `decode` draws, in order.

        Args:
            batch: Clips.
            frames: Latent frames.
            chunked: As in `decode`.

        Returns:
            Shapes.
        """
        shapes: list[tuple[int, ...]] = []
        resampler, unit = self.decoder.resampler, self.decoder.resampler.groups_per_chunk
        for chunk in self._plan(resampler, frames, chunked, CHUNK_SIZE, OVERLAP):
            if self.config.noise_regularize:
                shapes.append((batch, self.latent_channels, len(chunk.span)))
            if resampler.config.mask_noise:
                shapes.append(resampler.get_noise_shape(batch * -(-len(chunk.span) // unit) * unit))
        return shapes

    def encode_many(
        self, clips: Sequence[Tensor], *, generator: torch.Generator | None = None, noise: bool = True
    ) -> list[Tensor]:
        """Encode clips of different lengths, each as if alone; no padding is computed.

        Args:
            clips: Audio (C, N_i) of each clip.
            generator: Source of the noise.
            noise: Whether to add the noise of the released model.

        Returns:
            Latents (C, T_i) of each clip.
        """
        self._load_encoder()
        unit = self.downsampling_ratio * self.encoder.resampler.groups_per_chunk
        patches, groups = [], []
        for clip in clips:
            _check_channels(clip[None], self.config.audio_channels, "a clip (channels, samples)")
            padded_1CN = F.pad(clip.to(self.dtype), (0, -clip.shape[-1] % unit))[None]
            patches.append(patchify(padded_1CN, self.config.patch_size)[0])
            groups.append(padded_1CN.shape[-1] // self.downsampling_ratio)
        drawn_GND = self.encoder.resampler.draw(sum(groups), patches[0], generator) if noise else None
        z_LC = self.encoder(torch.cat(patches), tuple(groups), drawn_GND)
        latents = (self.bottleneck.encode(z_TC.mT[None])[0] for z_TC in z_LC.split(groups))
        return [z_CT.to(clip.dtype) for z_CT, clip in zip(latents, clips, strict=True)]

    def _group_chunks(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """Group the chunks that are computed together: all of SAME-S, few of the wider SAME-L."""
        if self.config.decoder.window is None:
            return [chunks]
        few = WIDE_CHUNKS if self.device.type == "cuda" else 1
        return [chunks[at : at + few] for at in range(0, len(chunks), few)]

    def _encode(self, audio_BCN: Tensor, chunks: list[Chunk], noise: bool, generator: torch.Generator | None) -> Tensor:
        """Encode what the chunks keep: (B, C, kept frames). Noise is drawn for whole chunks, one after the other."""
        batch, ratio, unit = len(audio_BCN), self.downsampling_ratio, self.encoder.resampler.groups_per_chunk
        patches, groups, drawn = [], [], []
        for chunk in chunks:
            part_BCN = audio_BCN[..., chunk.computed.start * ratio : chunk.computed.stop * ratio].to(self.dtype)
            part_BCN = F.pad(part_BCN, (0, -part_BCN.shape[-1] % (unit * ratio)))
            patches.append(patchify(part_BCN, self.config.patch_size).flatten(0, 1))
            groups.append(part_BCN.shape[-1] // ratio)
            drawn += _draw_token_noise(self.encoder, chunk, batch, part_BCN, generator) if noise else []
        rows = tuple(count for count in groups for _ in range(batch))
        z_LC = self.encoder(torch.cat(patches), rows, torch.cat(drawn) if drawn else None)
        parts = []
        for chunk, z_part in zip(chunks, z_LC.split([batch * count for count in groups]), strict=True):
            z_BCT = z_part.unflatten(0, (batch, -1)).mT
            parts.append(self.bottleneck.encode(z_BCT[..., chunk.kept_slice()]).to(audio_BCN.dtype))
        return torch.cat(parts, dim=-1)

    def _decode(self, z_BCT: Tensor, chunks: list[Chunk], noise: bool, generator: torch.Generator | None) -> Tensor:
        """Decode what the chunks keep: (B, C, samples). Noise as in `_encode`, the bottleneck's first."""
        batch, noisy = len(z_BCT), noise and self.config.noise_regularize
        latents, drawn = [], []
        for chunk in chunks:
            span_BCT = z_BCT[..., chunk.span.start : chunk.span.stop].to(self.dtype)
            scaled_BCT = self.bottleneck.decode(span_BCT, noisy, generator)[..., chunk.computed_slice()]
            latents.append(scaled_BCT.mT.flatten(0, 1))
            drawn += _draw_token_noise(self.decoder, chunk, batch, scaled_BCT, generator) if noise else []
        groups = tuple(len(chunk.computed) for chunk in chunks for _ in range(batch))
        patches_LK = self.decoder(torch.cat(latents), groups, torch.cat(drawn) if drawn else None)
        unit, stride, ratio = (
            self.decoder.resampler.groups_per_chunk,
            self.config.decoder.stride,
            self.downsampling_ratio,
        )
        sizes = [batch * stride * (-(-len(chunk.computed) // unit) * unit) for chunk in chunks]
        parts = []
        for chunk, part_LK in zip(chunks, patches_LK.split(sizes), strict=True):
            audio_BCN = unpatchify(part_LK.unflatten(0, (batch, -1)), self.config.audio_channels)
            parts.append(audio_BCN[..., chunk.kept_slice(ratio)].to(z_BCT.dtype))
        return torch.cat(parts, dim=-1)


def _draw_token_noise(
    stack: AutoencoderStack, chunk: Chunk, batch: int, like: Tensor, generator: torch.Generator | None
) -> list[Tensor]:
    """Draw the noise of a chunk's new tokens for all of it, and return that of what is computed."""
    unit = stack.resampler.groups_per_chunk
    whole = -(-len(chunk.span) // unit) * unit
    drawn_GND = stack.resampler.draw(batch * whole, like, generator)
    if drawn_GND is None:
        return []
    first, last = chunk.computed.start - chunk.span.start, chunk.computed.stop - chunk.span.start
    return [drawn_GND.unflatten(0, (batch, whole))[:, first : -(-last // unit) * unit].flatten(0, 1)]


def _check_channels(x: Tensor, channels: int, what: str) -> None:
    if x.ndim != 3 or x.shape[1] != channels or x.shape[2] == 0:
        raise ValueError(f"{what} must have {channels} channels and some length, not shape {tuple(x.shape)}")
