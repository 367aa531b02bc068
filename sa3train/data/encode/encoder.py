"""Encode audio into latents: batches that fit the memory, long clips in chunks, random numbers that depend on the clip.

Shapes: C channels, N samples, F latent frames.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sa3train.core.device import empty_cache, measure_device_memory, move_to_device
from sa3train.core.device_errors import explain_device_errors, is_out_of_memory
from sa3train.core.errors import ConfigError
from sa3train.models.autoencoder import CHUNK_SIZE

if TYPE_CHECKING:
    from sa3train.models.autoencoder import Autoencoder

_FLOAT16_MAX = 65504.0


class Encoder:
    """An autoencoder with the choices that latents depend on.

    Attributes:
        autoencoder: The autoencoder.
        name: Name of its model.
        chunked: Whether clips longer than a chunk (11.9 s) are encoded piece by piece, as released models do.
        device: Where it runs.
    """

    def __init__(self, autoencoder: "Autoencoder", name: str, chunked: bool = True) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: The autoencoder.
            name: Name of its model, for shards and messages.
            chunked: Encode long clips in chunks.

        Raises:
            ConfigError: When it does not run at 44100 Hz.
        """
        self.autoencoder, self.name, self.chunked = autoencoder, name, chunked
        self.device = autoencoder.device
        self._adds_noise = float(autoencoder.config.encoder.mask_noise) > 0
        if autoencoder.sample_rate != 44100:
            raise ConfigError(
                f"the autoencoder of '{name}' runs at {autoencoder.sample_rate} Hz; 44100 Hz is expected."
            )

    @property
    def model(self) -> dict[str, Any]:
        """How shards identify the autoencoder."""
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

    def count_frames(self, samples: int) -> int:
        """Count the latent frames that are kept of a clip: those that contain any of its samples.

        Args:
            samples: Length of the clip.

        Returns:
            Number of frames.
        """
        return -(-samples // self.autoencoder.downsampling_ratio)

    def encode(self, clips: Sequence[torch.Tensor], seeds: Sequence[int]) -> list[np.ndarray | None]:
        """Encode clips for storage.

        Args:
            clips: (2, N) audio of each clip.
            seeds: Seed of each clip.

        Returns:
            (C, F) float16 latents of each clip; None where they are not finite.
        """
        return [_to_float16(latents_CF) for latents_CF in self.compute_latents(clips, seeds)]

    def compute_latents(self, clips: Sequence[torch.Tensor], seeds: Sequence[int]) -> list[torch.Tensor]:
        """Compute latents that do not depend on which other clips are in the batch.

        No padding is computed, and noise that the model adds is drawn from the clip's own seed.

        Args:
            clips: (2, N) audio of each clip.
            seeds: Seed of each clip.

        Returns:
            (C, F) float32 latents of each clip, on the CPU.
        """
        longest = max((clip.shape[1] for clip in clips), default=0) / self.autoencoder.sample_rate
        fixes = [
            *([] if self.chunked else ["chunked=true"]),
            *(["model.dtype=bf16"] if self.precision == "float32" else []),
            "another device",
        ]
        with explain_device_errors(self.device, f"encoding a clip of {longest:.0f} s", fixes):
            single: dict[int, torch.Tensor] = {}
            for index, (clip, seed) in enumerate(zip(clips, seeds, strict=True)):
                chunked = self.chunked and self.count_frames(clip.shape[1]) > CHUNK_SIZE
                if chunked or self._adds_noise:
                    single[index] = self._encode_single(clip, seed, chunked)
            batched = iter(self._encode_batch([clip for index, clip in enumerate(clips) if index not in single]))
            latents = [single[index] if index in single else next(batched) for index in range(len(clips))]
            return [
                latents_CF[:, : self.count_frames(clip.shape[1])].float().cpu()
                for latents_CF, clip in zip(latents, clips, strict=True)
            ]

    def encode_silence(self) -> np.ndarray:
        """Encode silence, away from its ends.

        Returns:
            (C, 16) float16 latents.

        Raises:
            ConfigError: When they are not finite.
        """
        audio_CN = torch.zeros(2, 48 * self.autoencoder.downsampling_ratio)
        latents_CF = self.encode([audio_CN], [0])[0]
        if latents_CF is None:
            fix = "copy the model again" if self.precision == "float32" else "use model.dtype=fp32"
            raise ConfigError(
                f"the autoencoder of '{self.name}' returns non-finite latents of silence in {self.precision}: {fix}."
            )
        return latents_CF[:, 16:32]

    def estimate_batch_seconds(self) -> float:
        """Estimate how much audio to encode at a time.

        Returns:
            Seconds: 60 on the CPU, what half of the free memory holds on a GPU.
        """
        if self.device.type == "cpu":
            return 60.0
        free = measure_device_memory(self.device).free
        width = int(self.autoencoder.config.encoder.width)
        per_frame = 17 * width * 40 * self.autoencoder.dtype.itemsize  # about forty live vectors a token in a layer
        seconds = 0.5 * free / per_frame * self.autoencoder.downsampling_ratio / self.autoencoder.sample_rate
        return float(min(3600.0, max(30.0, seconds)))

    @torch.inference_mode()
    def _encode_single(self, clip_CN: torch.Tensor, seed: int, chunked: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.autoencoder.encode(
            move_to_device(clip_CN[None], self.device), generator=generator, chunked=chunked
        )[0]

    @torch.inference_mode()
    def _encode_batch(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode all at once, or in halves when they do not fit the GPU's memory."""
        if not clips:
            return []
        try:
            return self.autoencoder.encode_many([move_to_device(clip, self.device) for clip in clips])
        except RuntimeError as error:
            if len(clips) == 1 or not is_out_of_memory(error):
                raise
        empty_cache(self.device)
        middle = len(clips) // 2
        return [*self._encode_batch(clips[:middle]), *self._encode_batch(clips[middle:])]


def _to_float16(latents_CF: torch.Tensor) -> np.ndarray | None:
    if not bool(torch.isfinite(latents_CF).all()) or float(latents_CF.abs().max()) > _FLOAT16_MAX:
        return None
    return latents_CF.to(torch.float16).numpy()
