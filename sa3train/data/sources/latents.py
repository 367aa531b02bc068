"""Latents that other tools encoded: `NAME.npy` (channels, frames) beside `NAME.json`, often padded.

The released pre-encoder and Underfit write folders of them; `padding_mask` says which frames are real. `silence.npy`
and `details.json` describe the folder and are no clips.
"""

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sa3train.core.errors import DataError
from sa3train.core.safetensors_file import hash_tensors
from sa3train.data.sources.storage import Blob
from sa3train.data.sources.text import TEXT_LIMIT

LATENTS_SUFFIX = ".npy"
SILENCE, DETAILS = "silence.npy", "details.json"
LATENT_FIELDS = (
    *("path", "relpath", "src_relpath", "padding_mask", "latent_shape", "audio_samples", "sample_rate"),
    *("seconds_start", "seconds_total", "timestamps", "load_time", "latent_filename"),
)
"""Fields of the JSON that describe the file; all others are captions and tags."""
RATE, RATIO = 44100, 4096
"""Samples per second and per latent frame of every released autoencoder."""


@dataclass(frozen=True)
class ImportedLatents:
    """Latents of another tool.

    Attributes:
        latents_CF: The real frames, float32.
        padding_CF: The frames after them.
        seconds: Length of the audio.
        path: The audio file that the JSON names; empty where it names none.
        unused: Fields of the JSON that are neither text nor numbers.
    """

    latents_CF: np.ndarray
    padding_CF: np.ndarray
    seconds: float
    path: str
    unused: tuple[str, ...]

    @property
    def content(self) -> str:
        """Hash of the real frames."""
        import torch  # takes a second that listing does without

        return hash_tensors((f"latents {self.latents_CF.shape}", torch.from_numpy(self.latents_CF)))


def read_imported_latents(latents: Blob, fields: Blob) -> ImportedLatents:
    """Read latents and cut their padding.

    Args:
        latents: The `.npy`.
        fields: The `.json` beside it.

    Returns:
        The latents.

    Raises:
        DataError: Either file cannot be used, or the two do not agree.
    """
    array, described = read_array(latents), read_fields(fields)
    real = _count_real_frames(described, array.shape, fields.name)
    unused = (name for name, value in described.items() if name not in LATENT_FIELDS and not _is_text(value))
    path = described.get("src_relpath") or described.get("relpath") or described.get("path")
    return ImportedLatents(
        np.ascontiguousarray(array[:, :real]),
        array[:, real:],
        _find_seconds(described, real, fields.name),
        path if isinstance(path, str) else "",
        tuple(sorted(unused)),
    )


def read_array(blob: Blob) -> np.ndarray:
    """Read latents.

    Args:
        blob: The `.npy`.

    Returns:
        Latents (channels, frames) in float32.

    Raises:
        DataError: It is no array of latents.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(blob.read()), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise DataError(f"{blob.name} is no NumPy array ({error})") from error
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise DataError(f"{blob.name} has the shape {array.shape} of {array.dtype}, not (channels, frames) of floats")
    if not np.isfinite(array).all() or np.abs(array).max() > np.finfo(np.float16).max:
        raise DataError(f"{blob.name} has values that are NaN, infinite or beyond float16")
    return np.asarray(array, dtype=np.float32)


def read_fields(blob: Blob) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        blob: The file.

    Returns:
        Its fields.

    Raises:
        DataError: It is not a JSON object.
    """
    try:
        described = json.loads(blob.read(TEXT_LIMIT))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{blob.name} is no JSON ({error})") from error
    if not isinstance(described, dict):
        raise DataError(f"{blob.name} is not a JSON object with fields")
    return described


def _count_real_frames(described: dict[str, Any], shape: tuple[int, ...], name: str) -> int:
    mask = described.get("padding_mask")
    if not isinstance(mask, list) or len(mask) != shape[1] or any(value not in (0, 1) for value in mask):
        raise DataError(f"{name}: padding_mask must have a 0 or 1 for each of the {shape[1]} frames")
    real = int(sum(mask))
    if not real or 0 in mask[:real]:
        raise DataError(f"{name}: padding_mask must be 1 for the first frames, at least one, and 0 after them")
    if described.get("latent_shape") not in (None, list(shape), [1, *shape]):
        raise DataError(f"{name}: latent_shape is {described['latent_shape']}, the array has {list(shape)}")
    if described.get("sample_rate") not in (None, RATE):
        raise DataError(f"{name}: sample_rate is {described['sample_rate']}, latents are of {RATE} Hz")
    return real


def _find_seconds(described: dict[str, Any], real: int, name: str) -> float:
    """The length of the audio: from its samples, or whole seconds rounded up, but no more than the frames hold."""
    longest, samples = real * RATIO / RATE, described.get("audio_samples")
    seconds = samples / RATE if isinstance(samples, int) else described.get("seconds_total", longest)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise DataError(f"{name}: seconds_total is {described.get('seconds_total')!r}, not a length in seconds")
    if seconds < longest - 2 * RATIO / RATE:
        raise DataError(f"{name}: {seconds:g} s of audio, but {real} real frames are {longest:.2f} s")
    return float(round(min(seconds, longest), 6))


def _is_text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, str | int | float | None) for item in values)
