"""Audio that a generation starts from, inpaints or continues: a path, or an array with its sample rate."""

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3train.audio.edit import mix_channels
from sa3train.audio.io import check_audio, check_plausible, load_audio
from sa3train.audio.resample import RELEASED, resample
from sa3train.core.errors import AudioError, GenerationError
from sa3train.core.files import hash_file
from sa3train.core.safetensors_file import hash_tensors
from sa3train.core.user_files import stat_file

CHANNELS = 2


@dataclass(frozen=True)
class InputAudio:
    """Input audio of a generation.

    Attributes:
        audio_CN: Stereo audio (2, N) at the model's rate, full scale ±1.
        path: The file; None for an array.
        sha256: Hash of the file or array.
    """

    audio_CN: Tensor
    path: str | None
    sha256: str

    def to_dict(self) -> dict[str, str | None]:
        """Return what the sidecar records.

        Returns:
            Path and hash.
        """
        return {"path": self.path, "sha256": self.sha256}


def load_input_audio(value: Any, sample_rate: int, role: str) -> InputAudio:
    """Load input audio and convert it to stereo at the model's rate, with the released project's resampling filter.

    Args:
        value: A path, `(sample_rate, array)` or `(array, sample_rate)`. Arrays are floating-point tensors or NumPy
            arrays (N,), (C, N) or (1, C, N) within ±1, of any rate and up to 8 channels.
        sample_rate: The model's.
        role: Name of the setting, for messages.

    Returns:
        The audio.

    Raises:
        AudioError: When the audio is unusable.
        GenerationError: When the value is something else.
    """
    if isinstance(value, str | os.PathLike):
        stamp: object = None
        with contextlib.suppress(OSError):  # loading tells what is wrong
            state = stat_file(value)
            stamp = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        return _load_file(str(value), sample_rate, stamp)
    array, rate = _array_and_rate(value, role)
    check_audio(array, rate, role)
    check_plausible(array, rate, role)
    digest = hash_tensors((f"{rate} {tuple(array.shape)} ", array))
    return InputAudio(resample(mix_channels(array, CHANNELS), rate, sample_rate, RELEASED), None, digest)


@functools.lru_cache(maxsize=2)
def _load_file(path: str, sample_rate: int, stamp: object) -> InputAudio:
    """Audio of a file: read once for the check before the model is loaded and for all batches."""
    return InputAudio(load_audio(Path(path), sample_rate, CHANNELS, RELEASED), path, hash_file(path))


def _array_and_rate(value: Any, role: str) -> tuple[Tensor, int]:
    expected = f"{role} must be a path, (sample_rate, tensor) or (tensor, sample_rate)"
    if not isinstance(value, Sequence) or len(value) != 2:
        raise GenerationError(f"{expected}, not {type(value).__name__}.")
    arrays = [entry for entry in value if isinstance(entry, Tensor | np.ndarray) and entry.ndim > 0]
    rates = [entry for entry in value if not isinstance(entry, bool) and isinstance(entry, int | np.integer)]
    if len(arrays) != 1 or len(rates) != 1:
        raise GenerationError(f"{expected}, not ({type(value[0]).__name__}, {type(value[1]).__name__}).")
    array = torch.as_tensor(arrays[0]).detach().cpu()
    if not array.is_floating_point():
        raise AudioError(f"{role} must be floating point within ±1, not {array.dtype}. Divide integers by their range.")
    array = array.float()
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    return array[None] if array.ndim == 1 else array, int(rates[0])
