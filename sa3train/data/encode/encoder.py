"""Audio to latents: batches by memory, long clips in chunks, and random numbers that belong to the clip alone.

Shapes: C channels, N samples, T latent frames.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sa3train.core.device import is_shortage, memory_named, to_device
from sa3train.core.errors import ConfigError

CHUNK, OVERLAP = 128, 32
"""Latent frames of a chunk, and those shared with the next: the released models' own."""

LARGEST = 65504.0
"""What float16 can hold."""


class Autoencoder(Protocol):
    """What encoding needs of `sa3train.models`' autoencoder."""

    config: Any

    @property
    def latent_channels(self) -> int: ...
    @property
    def downsampling_ratio(self) -> int: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def fingerprint(self) -> str: ...
    def frames_of(self, samples: int) -> int: ...
    def encode(
        self, audio_BCN: torch.Tensor, *, generator: torch.Generator | None = None, chunked: bool | None = None
    ) -> torch.Tensor: ...
    def encode_many(
        self, clips: Sequence[torch.Tensor], *, generator: torch.Generator | None = None
    ) -> list[torch.Tensor]: ...


class Encoder:
    """An autoencoder with the choices that latents depend on. `chunked`: clips longer than a chunk (11.9 s) are encoded
    piece by piece, as the released models do when they generate.
    """

    def __init__(self, autoencoder: Autoencoder, name: str, chunked: bool = True) -> None:
        self.autoencoder, self.name, self.chunked = autoencoder, name, chunked
        self.noisy = float(autoencoder.config.encoder.mask_noise) > 0
        self.device = autoencoder.device
        if autoencoder.sample_rate != 44100:
            raise ConfigError(
                f"the autoencoder of '{name}' runs at {autoencoder.sample_rate} Hz; 44100 Hz is expected."
            )

    @property
    def model(self) -> dict[str, Any]:
        """How shards name the autoencoder."""
        return {
            "name": self.name,
            "fingerprint": self.autoencoder.fingerprint(),
            "latent_channels": self.autoencoder.latent_channels,
            "sample_rate": self.autoencoder.sample_rate,
            "downsampling_ratio": self.autoencoder.downsampling_ratio,
        }

    @property
    def precision(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.autoencoder.dtype).removeprefix("torch.")

    def frames(self, samples: int) -> int:
        """Latent frames that are kept of a clip: those that hold any of its samples."""
        return -(-samples // self.autoencoder.downsampling_ratio)

    def computed_frames(self, samples: int) -> int:
        """Latent frames that are computed for a clip, the autoencoder's own rounding included."""
        return self.autoencoder.frames_of(samples)

    def encode(self, clips: Sequence[torch.Tensor], seeds: Sequence[int]) -> list[np.ndarray | None]:
        """(C, T) float16 latents of each clip (2, N), as `latents` gives them; None where they are not finite."""
        return [_stored(latent_CT) for latent_CT in self.latents(clips, seeds)]

    def latents(self, clips: Sequence[torch.Tensor], seeds: Sequence[int]) -> list[torch.Tensor]:
        """(C, T) latents of each clip (2, N), float32 on the CPU. The same, whoever else is in the batch: no padding is
        computed, and noise that the model adds is drawn from the clip's own seed. Raises `MemoryShortageError`.
        """
        longest = max((clip.shape[1] for clip in clips), default=0) / self.autoencoder.sample_rate
        remedies = [
            *([] if self.chunked else ["chunked=true"]),
            *(["model.dtype=bf16"] if self.precision == "float32" else []),
            "another device",
        ]
        with memory_named(self.device, f"encoding a clip of {longest:.0f} s", remedies):
            return self._latents(clips, seeds)

    def _latents(self, clips: Sequence[torch.Tensor], seeds: Sequence[int]) -> list[torch.Tensor]:
        alone: dict[int, torch.Tensor] = {}
        for place, (clip, seed) in enumerate(zip(clips, seeds, strict=True)):
            chunked = self.chunked and self.frames(clip.shape[1]) > CHUNK
            if chunked or self.noisy:
                alone[place] = self._alone(clip, seed, chunked)
        together = iter(self._together([clip for place, clip in enumerate(clips) if place not in alone]))
        latents = [alone[place] if place in alone else next(together) for place in range(len(clips))]
        kept = [latent_CT[:, : self.frames(clip.shape[1])] for latent_CT, clip in zip(latents, clips, strict=True)]
        return [latent_CT.float().cpu() for latent_CT in kept]

    def silence(self) -> np.ndarray:
        """(C, 16) float16: latents of silence, away from its ends."""
        audio_CN = torch.zeros(2, 48 * self.autoencoder.downsampling_ratio)
        latent_CT = self.encode([audio_CN], [0])[0]
        if latent_CT is None:
            remedy = "copy the model again" if self.precision == "float32" else "use model.dtype=fp32"
            raise ConfigError(
                f"the autoencoder of '{self.name}' gives no finite latents of silence in {self.precision}: {remedy}."
            )
        return latent_CT[:, 16:32]

    def batch_seconds(self) -> float:
        """Seconds of audio to encode at a time: a minute on the CPU, what half of the free memory holds on a GPU."""
        if self.device.type != "cuda":
            return 60.0
        free, _ = torch.cuda.mem_get_info(self.device)
        width = int(self.autoencoder.config.encoder.width)
        per_frame = 17 * width * 40 * self.autoencoder.dtype.itemsize  # about forty live vectors a token in a layer
        frames = 0.5 * free / per_frame
        return float(
            min(3600.0, max(30.0, frames * self.autoencoder.downsampling_ratio / self.autoencoder.sample_rate))
        )

    @torch.inference_mode()
    def _alone(self, clip_CN: torch.Tensor, seed: int, chunked: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.autoencoder.encode(to_device(clip_CN[None], self.device), generator=generator, chunked=chunked)[0]

    @torch.inference_mode()
    def _together(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All at once; when the GPU's memory does not hold them, in halves."""
        if not clips:
            return []
        try:
            return self.autoencoder.encode_many([to_device(clip, self.device) for clip in clips])
        except RuntimeError as error:
            if len(clips) == 1 or not is_shortage(error):
                raise
        torch.cuda.empty_cache()
        middle = len(clips) // 2
        return [*self._together(clips[:middle]), *self._together(clips[middle:])]


def _stored(latent_CT: torch.Tensor) -> np.ndarray | None:
    if not bool(torch.isfinite(latent_CT).all()) or float(latent_CT.abs().max()) > LARGEST:
        return None
    return latent_CT.to(torch.float16).numpy()
