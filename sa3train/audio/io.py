"""Audio files in and out, through libsndfile, and through the ffmpeg program for what libsndfile cannot read.

Arrays are float32 tensors (C, N), full scale ±1, channels in the order of the file.
"""

import contextlib
import errno
import io
import mmap
import os
from dataclasses import dataclass
from os import PathLike, fsencode
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sa3train.audio.decode import NEEDS_FFMPEG, DecodedAudio, Source, decode_audio, describe_source, scan_audio
from sa3train.audio.edit import mix_channels
from sa3train.audio.resample import BEST, SincFilter, resample
from sa3train.audio.scan import OPEN_LENGTH
from sa3train.core.errors import AudioError
from sa3train.core.files import write_bytes
from sa3train.core.imports import explain_imports
from sa3train.core.log import get_logger
from sa3train.core.mapped import iterate_parts, open_temporary

with explain_imports():
    import soundfile

_logger = get_logger(__name__)

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".rf64", ".au"),
    *NEEDS_FFMPEG,
)
"""Files that a folder scan takes for audio."""

PLAUSIBLE_RATES = (2000, 768_000)
"""Lowest and highest sample rate in Hz; where a file states another, its header is damaged."""

INTEGER_SCALE = 32.0
"""Peaks above this (+30 dBFS) are integers stored as floats, not loud audio."""

BLOCK, LONG = 1 << 20, 120 * 44100
"""Samples that are handled at a time; audio longer than the second is encoded to a file that is mapped into memory."""

WRITERS = {f".{name.lower()}": name for name in ("WAV", "FLAC", "AIFF", "OGG", "MP3")} | {
    ".aif": "AIFF",
    ".opus": "OGG",
}
"""Container by file suffix."""

_ENCODINGS = {".ogg": "VORBIS", ".opus": "OPUS", ".mp3": "MPEG_LAYER_III"}  # where the suffix leaves no choice


@dataclass(frozen=True)
class AudioInfo:
    """Facts about an audio file.

    Attributes:
        sample_rate: Sample rate in Hz.
        channels: Channels.
        samples: Samples per channel.
        container: Name of the container, such as "WAV".
        encoding: Name of the encoding, such as "PCM_16"; "ffmpeg" where ffmpeg decoded the file.
    """

    sample_rate: int
    channels: int
    samples: int
    container: str
    encoding: str

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples / self.sample_rate


def read_audio(source: Source) -> tuple[Tensor, int]:
    """Read an audio file with its own channels and sample rate.

    Reads WAV of 8-bit integers to 64-bit floats, FLAC, MP3, Ogg Vorbis, Opus, AIFF and CAF; M4A, AAC and the like where
    ffmpeg is installed.

    Args:
        source: Path, or the bytes of a file.

    Returns:
        Audio (C, N) in float32, and its sample rate in Hz.

    Raises:
        AudioError: The file is missing, not audio, empty, or contains NaN or infinity.
    """
    decoded = _read_with_warnings(source)
    return decoded.audio_CN, decoded.sample_rate


def _read_with_warnings(source: Source) -> DecodedAudio:
    decoded = read_whole(source)
    for problem in decoded.problems:
        if problem != OPEN_LENGTH:
            _logger.warning("%s: %s.", describe_source(source), problem.detail)
    return decoded


def read_whole(source: Source) -> DecodedAudio:
    """Read an audio file with all that is known about its completeness. Nothing is logged.

    Args:
        source: Path, or the bytes of a file.

    Returns:
        The audio with its own channels and sample rate, and its problems.

    Raises:
        AudioError: As `read_audio`.
    """
    decoded = decode_audio(source)
    check_audio(decoded.audio_CN, decoded.sample_rate, describe_source(source))
    return decoded


def load_audio(source: Source, sample_rate: int = 44100, channels: int = 2, sinc: SincFilter = BEST) -> Tensor:
    """Read an audio file, mix it to mono or stereo, and resample it.

    Args:
        source: Path, or the bytes of a file.
        sample_rate: Sample rate of the result in Hz.
        channels: 1 or 2.
        sinc: Filter for resampling.

    Returns:
        Audio (channels, N) in float32.

    Raises:
        AudioError: As `read_audio`, its samples are not within ±1, its sample rate is implausible, or there is no rule
            to mix its channels.
    """
    decoded = _read_with_warnings(source)
    name = describe_source(source)
    check_plausible(decoded.audio_CN, decoded.sample_rate, name)
    try:
        mixed_CN = mix_channels(decoded.audio_CN, channels, decoded.speakers)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from error
    return resample(mixed_CN, decoded.sample_rate, sample_rate, sinc)


def read_audio_info(path: str | PathLike[str]) -> AudioInfo:
    """Measure an audio file: by its header where that agrees with the file's size, by decoding otherwise.

    Args:
        path: File.

    Returns:
        Facts about the audio that `read_audio` returns.

    Raises:
        AudioError: The file is missing or not audio.
    """
    if scan_audio(path).is_trusted:
        with contextlib.suppress(Exception):  # decoding tells what is wrong
            info = soundfile.info(fsencode(path))
            return AudioInfo(info.samplerate, info.channels, info.frames, info.format, info.subtype)
    decoded = read_whole(path)
    channels, samples = decoded.audio_CN.shape
    return AudioInfo(decoded.sample_rate, channels, samples, decoded.container, decoded.encoding)


def write_audio(path: str | PathLike[str], audio_CN: Tensor, sample_rate: int, subtype: str = "PCM_16") -> None:
    """Write an audio file atomically. Equal audio gives equal bytes in WAV, FLAC and AIFF.

    Args:
        path: File to create or replace. The suffix chooses the container.
        audio_CN: Audio. Integer encodings clip what is beyond ±1.
        sample_rate: Sample rate in Hz.
        subtype: PCM_16, PCM_24 or FLOAT. Ogg, Opus and MP3 have one encoding and ignore it.

    Raises:
        AudioError: The suffix or encoding is unknown, or the audio contains NaN.
        SA3Error: The file cannot be written.
    """
    write_bytes(path, encode_audio(audio_CN, sample_rate, Path(path).suffix, subtype, str(path)))


def encode_audio(
    audio_CN: Tensor, sample_rate: int, suffix: str = ".wav", subtype: str = "PCM_16", name: str = "the audio"
) -> bytes:
    """Encode audio as the bytes of a file.

    Args:
        audio_CN: Audio (C, N).
        sample_rate: Sample rate in Hz.
        suffix: Suffix of the file, which chooses the container.
        subtype: As in `write_audio`.
        name: Name of the audio for messages.

    Returns:
        The content of the file; of long audio a map of a temporary file, so that memory does not grow with its length.

    Raises:
        AudioError: The suffix or encoding is unknown, or the audio contains NaN.
        SA3Error: The disk has no room for the temporary file.
    """
    if suffix.lower() not in WRITERS:
        known = ", ".join(WRITERS)
        raise AudioError(f"cannot write {name}: unknown suffix {suffix!r}. Use one of {known}.")
    container, chosen = WRITERS[suffix.lower()], _ENCODINGS.get(suffix.lower(), subtype)
    if not soundfile.check_format(container, chosen):
        raise AudioError(
            f"cannot write {name}: {container} does not support {subtype}. Use PCM_16 or PCM_24, or a .wav file."
        )
    check_audio(audio_CN, sample_rate, name)
    is_long = audio_CN.shape[1] > LONG
    with open_temporary() if is_long else io.BytesIO() as buffer:
        try:
            with soundfile.SoundFile(buffer, "w", sample_rate, len(audio_CN), chosen, format=container) as file:
                for part_CN in iterate_parts(audio_CN, BLOCK if is_long else audio_CN.shape[1]):
                    file.write(part_CN.float().cpu().T.numpy())
        except soundfile.LibsndfileError as error:
            raise AudioError(f"cannot write {name} as {container} at {sample_rate} Hz: {error.error_string}") from error
        except AssertionError as error:  # fewer samples were written than given
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        content: Any = bytearray(buffer.getvalue()) if isinstance(buffer, io.BytesIO) else mmap.mmap(buffer.fileno(), 0)
    _clear_timestamp(content)
    return cast("bytes", content) if is_long else bytes(content)


def check_audio(audio_CN: Tensor, sample_rate: int, name: str = "the audio") -> None:
    """Check that audio has samples, all of them finite.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.
        name: Name of the audio for messages.

    Raises:
        AudioError: The shape or rate is invalid, there are no samples, or some are NaN or infinite.
    """
    if audio_CN.dim() != 2 or audio_CN.shape[0] == 0:
        raise AudioError(f"{name}: audio must be (channels, samples), not {tuple(audio_CN.shape)}.")
    if sample_rate <= 0:
        raise AudioError(f"{name}: the sample rate must be above 0 Hz, not {sample_rate}.")
    if audio_CN.shape[1] == 0:
        raise AudioError(f"{name}: it contains no audio (0 samples).")
    bad = sum(int((~torch.isfinite(part_CN)).sum()) for part_CN in iterate_parts(audio_CN, BLOCK))
    if bad:
        raise AudioError(f"{name}: {bad} samples are NaN or infinite. Export the audio again and check the source.")


def check_plausible(audio_CN: Tensor, sample_rate: int, name: str = "the audio") -> None:
    """Check that audio has a sample rate that audio can have, and is not at the scale of integers, such as ±32768.

    Args:
        audio_CN: Audio.
        sample_rate: Sample rate in Hz.
        name: Name of the audio for messages.

    Raises:
        AudioError: The sample rate is not one of audio, the peak is far above full scale (+30 dB), or all samples are
            whole numbers and some above 1.
    """
    lowest, highest = PLAUSIBLE_RATES
    if not lowest <= sample_rate <= highest:
        raise AudioError(
            f"{name}: a sample rate of {sample_rate} Hz is outside {lowest} to {highest} Hz. Export the audio again."
        )
    peak = float(audio_CN.abs().max())
    if peak > INTEGER_SCALE or (peak >= 2 and bool((audio_CN == audio_CN.round()).all())):
        raise AudioError(
            f"{name}: a peak of {peak:.6g}, where full scale is 1: integers stored as floats. Export it again as "
            f"integers, or as floats within ±1."
        )


def _clear_timestamp(content: bytearray | mmap.mmap) -> None:
    """Clear the second of writing, with which libsndfile stamps float WAVs, so that equal audio is equal bytes."""
    at = content.find(b"PEAK", 12, 128)
    if content[:4] == b"RIFF" and at >= 0:
        content[at + 12 : at + 16] = bytes(4)
