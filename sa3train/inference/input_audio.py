"""Audio that a generation starts from or fills in: a path, or an array with its sample rate.

Arrays are float32 tensors (C, N), full scale ±1.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3train.audio.edit import to_channels
from sa3train.audio.io import check_audio, load_audio
from sa3train.audio.resample import resample
from sa3train.core.errors import AudioError, RequestError
from sa3train.core.files import sha256_of

CHANNELS = 2


@dataclass(frozen=True)
class Source:
    """Stereo audio (2, N) at the model's rate, its path (None: an array), and the SHA-256 of what was given."""

    audio_CN: Tensor
    path: str | None
    sha256: str

    def record(self) -> dict[str, str | None]:
        """For the sidecar."""
        return {"path": self.path, "sha256": self.sha256}


def load_source(value: Any, sample_rate: int, role: str) -> Source:
    """Read what was given as `role`: a path, `(sample_rate, array)` or `(array, sample_rate)`.

    Arrays are (N,), (C, N) or (1, C, N), floating point, of any rate and any channel count that `sa3train.audio` knows.
    Raises `AudioError` for audio that cannot be used, `RequestError` for anything else.
    """
    if isinstance(value, str | os.PathLike):
        path = Path(value)
        audio_CN = load_audio(path, sample_rate, CHANNELS)
        return Source(audio_CN, str(value), sha256_of(path))
    array, rate = _array_and_rate(value, role)
    check_audio(array, rate, role)
    digest = hashlib.sha256(f"{rate} {tuple(array.shape)} ".encode() + array.contiguous().numpy().tobytes())
    return Source(resample(to_channels(array, CHANNELS), rate, sample_rate), None, digest.hexdigest())


def _array_and_rate(value: Any, role: str) -> tuple[Tensor, int]:
    kind = f"{role} must be a path, (sample_rate, tensor) or (tensor, sample_rate)"
    if not isinstance(value, Sequence) or len(value) != 2:
        raise RequestError(f"{kind}, not {type(value).__name__}.")
    arrays = [entry for entry in value if isinstance(entry, Tensor | np.ndarray) and entry.ndim > 0]
    rates = [entry for entry in value if not isinstance(entry, bool) and isinstance(entry, int | np.integer)]
    if len(arrays) != 1 or len(rates) != 1:
        raise RequestError(f"{kind}, not ({type(value[0]).__name__}, {type(value[1]).__name__}).")
    array = torch.as_tensor(arrays[0]).detach().cpu()
    if not array.is_floating_point():
        raise AudioError(
            f"{role} must be floating point within ±1, not {array.dtype}; divide whole numbers by their range."
        )
    array = array.float()
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    return array[None] if array.ndim == 1 else array, int(rates[0])
