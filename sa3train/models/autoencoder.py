"""The SAME autoencoder: stereo audio to latent frames and back, whole, in chunks, or many clips at once.

Shape legend: B batch, C audio channels or latent channels, N samples, P patches (16 per latent frame), K patch width,
T latent frames, L rows of all items laid end to end.

Where the autoencoder runs in chunks: which latent frames each chunk covers, keeps, and has to compute for that.
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
from sa3train.models.resampler import Stack, draw_noise
from sa3train.models.weight_files import fingerprint_of


@dataclass(frozen=True)
class Chunk:
    """Stretches of latent frames: the chunk as the released model runs it (`span`), what of it goes into the result
    (`kept`), and what has to be computed for that (`computed`).
    """

    span: range
    kept: range
    computed: range

    def kept_slice(self, scale: int = 1) -> slice:
        """Where `kept` lies in what was computed, in units of `scale` a frame."""
        first = self.kept.start - self.computed.start
        return slice(first * scale, (first + len(self.kept)) * scale)

    def computed_slice(self) -> slice:
        """Where `computed` lies in the chunk."""
        return slice(self.computed.start - self.span.start, self.computed.stop - self.span.start)


def whole_chunk(frames: int, unit: int) -> Chunk:
    """All frames as one chunk, kept to the end of its last `unit`."""
    return Chunk(range(frames), range(-(-frames // unit) * unit), range(frames))


def chunk_spans(frames: int, chunk_size: int, overlap: int) -> list[range]:
    """The stretches of latent frames that chunked running covers: every `chunk_size - overlap`, the last at the end.

    Raises `ConfigError` when the chunk is not longer than its overlap.
    """
    if not 0 <= overlap < chunk_size:
        raise ConfigError(f"overlap must be at least 0 and below chunk_size, not {overlap} and {chunk_size}")
    if frames <= chunk_size:
        return [range(frames)]
    starts = list(range(0, frames - chunk_size + 1, chunk_size - overlap))
    if starts[-1] + chunk_size != frames:
        starts.append(frames - chunk_size)
    return [range(start, start + chunk_size) for start in starts]


def chunks_of(frames: int, chunk_size: int, overlap: int, reach: int, unit: int) -> list[Chunk]:
    """The chunks of `frames`. Half the overlap is dropped at inner edges, and later chunks overwrite earlier ones.

    A kept frame depends on none further away than `reach`, so the rest of a chunk need not be computed; what is
    computed starts and ends whole `unit`s of frames from the chunk's start, or at its end.
    """
    spans = chunk_spans(frames, chunk_size, overlap)
    starts = [span.start + (overlap // 2 if span.start > 0 else 0) for span in spans]
    return [
        Chunk(span, range(start, stop), _computed(span, start, stop, reach, unit))
        for span, (start, stop) in zip(spans, itertools.pairwise([*starts, frames]), strict=True)
    ]


def _computed(span: range, start: int, stop: int, reach: int, unit: int) -> range:
    first = max(0, start - reach - span.start) // unit * unit
    last = -(-(stop + reach - span.start) // unit) * unit
    return range(span.start + first, min(span.start + last, span.stop))


def computed_frames(chunks: Sequence[Chunk]) -> int:
    """Latent frames computed in all."""
    return sum(len(chunk.computed) for chunk in chunks)


_COMPLETING = threading.Lock()
BOTTLENECK_NOISE = 0.001
CHUNK_SIZE, OVERLAP = 128, 32
WIDE_CHUNKS = 4
"""SAME-L's chunks at a time on a GPU, where each costs as many launches as all together."""


def patch(audio_BCN: Tensor, size: int) -> Tensor:
    """(B, C, N) to (B, P, C * size); channel-major within a patch. N must be a multiple of `size`."""
    return audio_BCN.unflatten(-1, (-1, size)).permute(0, 2, 1, 3).flatten(2)


def unpatch(patches_BPK: Tensor, channels: int) -> Tensor:
    """The inverse of `patch`."""
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
        """To unit scale."""
        return (z_BCT * self.scaling_factor + self.bias) / self.running_std

    def decode(self, z_BCT: Tensor, noise: bool, generator: torch.Generator | None) -> Tensor:
        """Back to the decoder's scale, with the small noise it was trained with."""
        scaled = z_BCT * self.running_std
        if not noise:
            return scaled
        return scaled + draw_noise(z_BCT.shape, z_BCT, generator) * self.running_std * BOTTLENECK_NOISE


class Autoencoder(nn.Module):
    """SAME. Noise is part of the released model; `noise=False` leaves it out and makes a call deterministic.

    `chunked` is what `chunked=None` means in `encode` and `decode`. `later` fills the encoder, once it is first needed,
    where loading has left it out.
    """

    def __init__(self, config: AutoencoderConfig, chunked: bool = False) -> None:
        super().__init__()
        self.config = config
        self.chunked = chunked
        patch_width = config.audio_channels * config.patch_size
        self.encoder = Stack(config.encoder, patch_width, "encoder")
        self.decoder = Stack(config.decoder, patch_width, "decoder")
        self.bottleneck = Bottleneck(config.latent_width)
        self.file_fingerprint: Callable[[], str] | None = None
        self.later: Callable[[nn.Module, torch.device, torch.dtype], None] | None = None

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
        """Hz."""
        return self.config.sample_rate

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; what comes in is cast to it and what goes out is cast back."""
        return self.bottleneck.bias.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.bottleneck.bias.device

    def fingerprint(self) -> str:
        """Hex digest of the weights: equal for one SAME stand-alone or inside a model, in fp32 or bf16."""
        if self.file_fingerprint is not None:
            return self.file_fingerprint()
        return fingerprint_of(sorted(self.state_dict().items(), key=lambda item: item[0]))

    def frames_of(self, samples: int) -> int:
        """Latent frames that `encode` makes of so many samples."""
        groups = self.encoder.resampler.groups_per_chunk
        return -(-samples // (self.downsampling_ratio * groups)) * groups

    def _complete(self) -> None:
        with (
            _COMPLETING,
            torch.inference_mode(mode=False),
        ):  # weights are no inference tensors, whoever needs them first
            if self.later is not None:
                self.later(self.encoder, self.device, self.dtype)
                self.later = None

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
        """Audio to latents (B, C, T). The end is padded with silence to whole frames (two frames in the chunked kind).

        Chunked running takes `chunk_size` frames at a time, `overlap` of them shared with the next chunk; audio shorter
        than one chunk runs whole. Raises `ValueError` for another shape and `ConfigError` for sizes that do not fit.
        """
        self._complete()
        _check_channels(audio_BCN, self.config.audio_channels, "audio (batch, channels, samples)")
        unit, ratio = self.encoder.resampler.groups_per_chunk, self.downsampling_ratio
        frames = -(-audio_BCN.shape[-1] // ratio)
        chunks = [whole_chunk(-(-frames // unit) * unit, unit)]
        if (self.chunked if chunked is None else chunked) and frames > chunk_size:
            chunks = chunks_of(frames, chunk_size, overlap, self.encoder.resampler.reach, unit)
        audio_BCN = F.pad(audio_BCN, (0, chunks[-1].span.stop * ratio - audio_BCN.shape[-1]))
        parts = [self._encode(audio_BCN, together, noise, generator) for together in self._batches(chunks)]
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
        """Latents to audio (B, C, 4096 T); run whole, the chunked kind makes an odd T one frame longer.

        Draws the bottleneck's noise first and the new tokens' next (chunk by chunk when chunked). Chunking and
        errors as in `encode`.
        """
        _check_channels(z_BCT, self.latent_channels, "latents (batch, channels, frames)")
        chunks = self._decoded_chunks(z_BCT.shape[-1], chunked, chunk_size, overlap)
        parts = [self._decode(z_BCT, together, noise, generator) for together in self._batches(chunks)]
        return torch.cat(parts, dim=-1)

    def _decoded_chunks(self, frames: int, chunked: bool | None, chunk_size: int, overlap: int) -> list[Chunk]:
        unit = self.decoder.resampler.groups_per_chunk
        if (self.chunked if chunked is None else chunked) and frames > chunk_size:
            return chunks_of(frames, chunk_size, overlap, self.decoder.resampler.reach, unit)
        return [whole_chunk(frames, unit)]

    def draws(self, batch: int, frames: int, chunked: bool | None = None) -> list[tuple[int, ...]]:
        """The shapes that `decode` draws for latents (B, C, T) with noise, in order."""
        shapes: list[tuple[int, ...]] = []
        resampler, unit = self.decoder.resampler, self.decoder.resampler.groups_per_chunk
        for chunk in self._decoded_chunks(frames, chunked, CHUNK_SIZE, OVERLAP):
            if self.config.noise_regularize:
                shapes.append((batch, self.latent_channels, len(chunk.span)))
            if resampler.config.mask_noise:
                shapes.append(resampler.drawn_shape(batch * -(-len(chunk.span) // unit) * unit))
        return shapes

    def encode_many(
        self, clips: Sequence[Tensor], *, generator: torch.Generator | None = None, noise: bool = True
    ) -> list[Tensor]:
        """Clips (C, N_i) of different lengths to latents (C, T_i), each as if encoded alone; no padding is computed."""
        self._complete()
        unit = self.downsampling_ratio * self.encoder.resampler.groups_per_chunk
        patches, groups = [], []
        for clip in clips:
            _check_channels(clip[None], self.config.audio_channels, "a clip (channels, samples)")
            padded_1CN = F.pad(clip.to(self.dtype), (0, -clip.shape[-1] % unit))[None]
            patches.append(patch(padded_1CN, self.config.patch_size)[0])
            groups.append(padded_1CN.shape[-1] // self.downsampling_ratio)
        drawn_GND = self.encoder.resampler.draw(sum(groups), patches[0], generator) if noise else None
        z_LC = self.encoder(torch.cat(patches), tuple(groups), drawn_GND)
        latents = (self.bottleneck.encode(z_TC.mT[None])[0] for z_TC in z_LC.split(groups))
        return [z_CT.to(clip.dtype) for z_CT, clip in zip(latents, clips, strict=True)]

    def decode_many(
        self, latents: Sequence[Tensor], *, generator: torch.Generator | None = None, noise: bool = True
    ) -> list[Tensor]:
        """Latents (C, T_i) of different lengths to audio (C, 4096 T_i), without computing padding beyond each chunk."""
        for z_CT in latents:
            _check_channels(z_CT[None], self.latent_channels, "latents (channels, frames)")
        lengths = tuple(z_CT.shape[-1] for z_CT in latents)
        noisy = noise and self.config.noise_regularize
        scaled = [self.bottleneck.decode(z_CT[None].to(self.dtype), noisy, generator)[0].mT for z_CT in latents]
        unit = self.decoder.resampler.groups_per_chunk
        whole = [-(-length // unit) * unit for length in lengths]
        drawn_GND = self.decoder.resampler.draw(sum(whole), scaled[0], generator) if noise else None
        patches_LK = self.decoder(torch.cat(scaled), lengths, drawn_GND)
        stride, channels = self.config.decoder.stride, self.config.audio_channels
        parts = patches_LK.split([count * stride for count in whole])
        return [
            unpatch(part[None, : length * stride], channels)[0].to(z_CT.dtype)
            for part, length, z_CT in zip(parts, lengths, latents, strict=True)
        ]

    def _batches(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """Chunks to compute at a time: all of SAME-S's; of SAME-L's few, for the memory that its width takes."""
        if self.config.decoder.window is None:
            return [chunks]
        few = WIDE_CHUNKS if self.device.type == "cuda" else 1
        return [chunks[at : at + few] for at in range(0, len(chunks), few)]

    def _encode(self, audio_BCN: Tensor, chunks: list[Chunk], noise: bool, generator: torch.Generator | None) -> Tensor:
        """What the chunks keep, (B, C, kept frames). Random numbers are drawn for whole chunks, one after the other."""
        batch, ratio, unit = len(audio_BCN), self.downsampling_ratio, self.encoder.resampler.groups_per_chunk
        patches, groups, drawn = [], [], []
        for chunk in chunks:
            part_BCN = audio_BCN[..., chunk.computed.start * ratio : chunk.computed.stop * ratio].to(self.dtype)
            part_BCN = F.pad(part_BCN, (0, -part_BCN.shape[-1] % (unit * ratio)))
            patches.append(patch(part_BCN, self.config.patch_size).flatten(0, 1))
            groups.append(part_BCN.shape[-1] // ratio)
            drawn += _drawn(self.encoder, chunk, batch, part_BCN, generator) if noise else []
        rows = tuple(count for count in groups for _ in range(batch))
        z_LC = self.encoder(torch.cat(patches), rows, torch.cat(drawn) if drawn else None)
        parts = []
        for chunk, z_part in zip(chunks, z_LC.split([batch * count for count in groups]), strict=True):
            z_BCT = z_part.unflatten(0, (batch, -1)).mT
            parts.append(self.bottleneck.encode(z_BCT[..., chunk.kept_slice()]).to(audio_BCN.dtype))
        return torch.cat(parts, dim=-1)

    def _decode(self, z_BCT: Tensor, chunks: list[Chunk], noise: bool, generator: torch.Generator | None) -> Tensor:
        """What the chunks keep, (B, C, samples). Random numbers as in `_encode`, a chunk's bottleneck's first."""
        batch, noisy = len(z_BCT), noise and self.config.noise_regularize
        latents, drawn = [], []
        for chunk in chunks:
            span_BCT = z_BCT[..., chunk.span.start : chunk.span.stop].to(self.dtype)
            scaled_BCT = self.bottleneck.decode(span_BCT, noisy, generator)[..., chunk.computed_slice()]
            latents.append(scaled_BCT.mT.flatten(0, 1))
            drawn += _drawn(self.decoder, chunk, batch, scaled_BCT, generator) if noise else []
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
            audio_BCN = unpatch(part_LK.unflatten(0, (batch, -1)), self.config.audio_channels)
            parts.append(audio_BCN[..., chunk.kept_slice(ratio)].to(z_BCT.dtype))
        return torch.cat(parts, dim=-1)


def _drawn(stack: Stack, chunk: Chunk, batch: int, like: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    """The noise of a chunk's new tokens: drawn for all of it, and of that what is computed; nothing without noise."""
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
