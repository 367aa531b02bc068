"""The SAME autoencoder: stereo audio to latent frames and back, whole, in chunks, or many clips at once.

Shape legend: B batch, C audio channels or latent channels, N samples, P patches (16 per latent frame), K patch width,
T latent frames, L rows of all items laid end to end.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3train.errors import ConfigError
from sa3train.models.config import AutoencoderConfig
from sa3train.models.fingerprints import fingerprint_of
from sa3train.models.same import Stack, draw_noise

BOTTLENECK_NOISE = 0.001


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

    `chunked` is what `chunked=None` means in `encode` and `decode`.
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

    def fingerprint(self) -> str:
        """Hex digest of the weights: equal for one SAME stand-alone or inside a model, in fp32 or bf16."""
        if self.file_fingerprint is not None:
            return self.file_fingerprint()
        return fingerprint_of(sorted(self.state_dict().items(), key=lambda item: item[0]))

    def frames_of(self, samples: int) -> int:
        """Latent frames that `encode` makes of so many samples."""
        unit = self.downsampling_ratio * self._encoder_groups
        return -(-samples // unit) * self._encoder_groups

    def encode(
        self,
        audio_BCN: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: bool = True,
        chunked: bool | None = None,
        chunk_size: int = 128,
        overlap: int = 32,
    ) -> Tensor:
        """Audio to latents (B, C, T). The end is padded with silence to whole frames (two frames in the chunked kind).

        Chunked running takes `chunk_size` frames at a time, `overlap` of them shared with the next chunk; audio shorter
        than one chunk runs whole. Raises `ValueError` for another shape and `ConfigError` for sizes that do not fit.
        """
        _check_channels(audio_BCN, self.config.audio_channels, "audio (batch, channels, samples)")
        if self.chunked if chunked is None else chunked:
            ratio = self.downsampling_ratio
            padded_BCN = F.pad(audio_BCN, (0, -audio_BCN.shape[-1] % ratio))
            frames = padded_BCN.shape[-1] // ratio
            if frames > chunk_size:
                pieces = (
                    (span, self._encode(padded_BCN[..., span.start * ratio : span.stop * ratio], noise, generator))
                    for span in chunk_spans(frames, chunk_size, overlap)
                )
                return _stitch(pieces, frames, overlap, 1)
        return self._encode(audio_BCN, noise, generator)

    def decode(
        self,
        z_BCT: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: bool = True,
        chunked: bool | None = None,
        chunk_size: int = 128,
        overlap: int = 32,
    ) -> Tensor:
        """Latents to audio (B, C, 4096 T); run whole, the chunked kind makes an odd T one frame longer.

        Draws the bottleneck's noise first and the new tokens' next (chunk by chunk when chunked). Chunking and
        errors as in `encode`.
        """
        _check_channels(z_BCT, self.latent_channels, "latents (batch, channels, frames)")
        frames = z_BCT.shape[-1]
        if (self.chunked if chunked is None else chunked) and frames > chunk_size:
            pieces = (
                (span, self._decode(z_BCT[..., span.start : span.stop], noise, generator))
                for span in chunk_spans(frames, chunk_size, overlap)
            )
            return _stitch(pieces, frames, overlap, self.downsampling_ratio)
        return self._decode(z_BCT, noise, generator)

    def encode_many(
        self, clips: Sequence[Tensor], *, generator: torch.Generator | None = None, noise: bool = True
    ) -> list[Tensor]:
        """Clips (C, N_i) of different lengths to latents (C, T_i), each as if encoded alone; no padding is computed."""
        unit = self.downsampling_ratio * self._encoder_groups
        patches, groups = [], []
        for clip in clips:
            _check_channels(clip[None], self.config.audio_channels, "a clip (channels, samples)")
            padded_1CN = F.pad(clip.to(self.dtype), (0, -clip.shape[-1] % unit))[None]
            patches.append(patch(padded_1CN, self.config.patch_size)[0])
            groups.append(padded_1CN.shape[-1] // self.downsampling_ratio)
        z_LC = self.encoder(torch.cat(patches), tuple(groups), noise, generator)
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
        patches_LK = self.decoder(torch.cat(scaled), lengths, noise, generator)
        whole = [-(-length // self._decoder_groups) * self._decoder_groups for length in lengths]
        stride, channels = self.config.decoder.stride, self.config.audio_channels
        parts = patches_LK.split([count * stride for count in whole])
        return [
            unpatch(part[None, : length * stride], channels)[0].to(z_CT.dtype)
            for part, length, z_CT in zip(parts, lengths, latents, strict=True)
        ]

    @property
    def _encoder_groups(self) -> int:
        return (self.config.encoder.chunk_size or self.config.encoder.stride) // self.config.encoder.stride

    @property
    def _decoder_groups(self) -> int:
        return (self.config.decoder.chunk_size or self.config.decoder.stride) // self.config.decoder.stride

    def _encode(self, audio_BCN: Tensor, noise: bool, generator: torch.Generator | None) -> Tensor:
        unit = self.downsampling_ratio * self._encoder_groups
        padded_BCN = F.pad(audio_BCN.to(self.dtype), (0, -audio_BCN.shape[-1] % unit))
        batch, frames = padded_BCN.shape[0], padded_BCN.shape[-1] // self.downsampling_ratio
        patches_LK = patch(padded_BCN, self.config.patch_size).flatten(0, 1)
        z_LC = self.encoder(patches_LK, (frames,) * batch, noise, generator)
        return self.bottleneck.encode(z_LC.unflatten(0, (batch, frames)).mT).contiguous().to(audio_BCN.dtype)

    def _decode(self, z_BCT: Tensor, noise: bool, generator: torch.Generator | None) -> Tensor:
        batch, _, frames = z_BCT.shape
        noisy = noise and self.config.noise_regularize
        scaled_BCT = self.bottleneck.decode(z_BCT.to(self.dtype), noisy, generator)
        patches_LK = self.decoder(scaled_BCT.mT.flatten(0, 1), (frames,) * batch, noise, generator)
        return unpatch(patches_LK.unflatten(0, (batch, -1)), self.config.audio_channels).to(z_BCT.dtype)


def chunk_spans(frames: int, chunk_size: int, overlap: int) -> list[range]:
    """The stretches of latent frames that chunked running computes: every `chunk_size - overlap`, the last at the end.

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


def _stitch(pieces: Iterator[tuple[range, Tensor]], frames: int, overlap: int, scale: int) -> Tensor:
    """Lay chunks over one another, half the overlap dropped at inner edges; later chunks overwrite earlier ones."""
    out: Tensor | None = None
    margin = overlap // 2
    for span, piece in pieces:
        if out is None:
            out = piece.new_zeros(*piece.shape[:-1], frames * scale)
        start = span.start + (margin if span.start > 0 else 0)
        stop = span.stop - (margin if span.stop < frames else 0)
        out[..., start * scale : stop * scale] = piece[..., (start - span.start) * scale : (stop - span.start) * scale]
    assert out is not None
    return out


def _check_channels(x: Tensor, channels: int, what: str) -> None:
    if x.ndim != 3 or x.shape[1] != channels or x.shape[2] == 0:
        raise ValueError(f"{what} must have {channels} channels and some length, not shape {tuple(x.shape)}")
