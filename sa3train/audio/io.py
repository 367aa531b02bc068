"""Audio files in and out, through libsndfile, and through the ffmpeg program for what libsndfile cannot read.

Arrays are float32 tensors (C, N), full scale ±1, channels in WAV order (FL FR FC LFE BL BR SL SR).
"""

import io
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3train.audio.edit import mix_channels
from sa3train.audio.resample import resample
from sa3train.core.errors import AudioError
from sa3train.core.files import write_bytes
from sa3train.core.imports import explain_imports

with explain_imports():
    import soundfile

Source = str | PathLike[str] | bytes

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".rf64", ".au"),
    *(".m4a", ".aac", ".mp4", ".wma", ".alac"),
)
"""Files that a folder scan takes for audio."""

NEEDS_FFMPEG = (".m4a", ".aac", ".mp4", ".wma", ".alac")

# libsndfile returns the channels of Ogg files in the order of the Vorbis I specification (4.3.9).
VORBIS_TO_WAV_ORDER = {
    3: (0, 2, 1),
    5: (0, 2, 1, 3, 4),
    6: (0, 2, 1, 5, 3, 4),
    7: (0, 2, 1, 6, 5, 3, 4),
    8: (0, 2, 1, 7, 5, 6, 3, 4),
}

WRITERS = {
    ".wav": ("WAV", None),
    ".flac": ("FLAC", None),
    ".aiff": ("AIFF", None),
    ".aif": ("AIFF", None),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
"""Container, and the encoding where the suffix leaves no choice, by file suffix."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says.

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
    name = _describe_source(source)
    _check_exists(source)
    try:
        samples, rate, container = _decode(source if isinstance(source, bytes) else fspath(source))
    except soundfile.LibsndfileError as error:
        samples, rate, container = _decode_with_ffmpeg(source, name, error)
    except OSError as error:
        raise AudioError(f"cannot read {name}: {error.strerror or error}.") from error
    audio_CN = torch.from_numpy(np.ascontiguousarray(samples.T))
    if container == "OGG" and len(audio_CN) in VORBIS_TO_WAV_ORDER:
        audio_CN = audio_CN[list(VORBIS_TO_WAV_ORDER[len(audio_CN)])]
    check_audio(audio_CN, rate, name)
    return audio_CN, rate


def load_audio(source: Source, sample_rate: int = 44100, channels: int = 2) -> Tensor:
    """Read an audio file, mix it to mono or stereo, and resample it.

    Args:
        source: Path, or the bytes of a file.
        sample_rate: Sample rate of the result in Hz.
        channels: 1 or 2.

    Returns:
        Audio (channels, N) in float32.

    Raises:
        AudioError: As `read_audio`, or there is no rule to mix its channels.
    """
    audio_CN, rate = read_audio(source)
    try:
        mixed_CN = mix_channels(audio_CN, channels)
    except AudioError as error:
        raise AudioError(f"{_describe_source(source)}: {error}") from error
    return resample(mixed_CN, rate, sample_rate)


def read_audio_info(path: str | PathLike[str]) -> AudioInfo:
    """Read the header of an audio file. What only ffmpeg can read is decoded.

    Args:
        path: File.

    Returns:
        Facts from the header.

    Raises:
        AudioError: The file is missing or not audio.
    """
    _check_exists(path)
    try:
        info = soundfile.info(fspath(path))
    except soundfile.LibsndfileError:
        audio_CN, rate = read_audio(path)
        return AudioInfo(rate, audio_CN.shape[0], audio_CN.shape[1], Path(path).suffix.lstrip(".").upper(), "ffmpeg")
    except OSError as error:
        raise AudioError(f"cannot read {path}: {error.strerror or error}.") from error
    return AudioInfo(info.samplerate, info.channels, info.frames, info.format, info.subtype)


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
        The content of the file.

    Raises:
        AudioError: The suffix or encoding is unknown, or the audio contains NaN.
    """
    if suffix.lower() not in WRITERS:
        known = ", ".join(WRITERS)
        raise AudioError(f"cannot write {name}: unknown suffix {suffix!r}. Use one of {known}.")
    container, own_subtype = WRITERS[suffix.lower()]
    chosen = own_subtype or subtype
    if not soundfile.check_format(container, chosen):
        raise AudioError(
            f"cannot write {name}: {container} does not support {subtype}. Use PCM_16 or PCM_24, or a .wav file."
        )
    check_audio(audio_CN, sample_rate, name)
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, audio_CN.float().cpu().T.numpy(), sample_rate, format=container, subtype=chosen)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"cannot write {name} as {container} at {sample_rate} Hz: {error.error_string}") from error
    return _clear_timestamp(buffer.getvalue())


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
    bad = int((~torch.isfinite(audio_CN)).sum())
    if bad:
        raise AudioError(f"{name}: {bad} samples are NaN or infinite. Export the audio again and check the source.")


def _describe_source(source: Source) -> str:
    return f"{len(source)} bytes of audio" if isinstance(source, bytes) else fspath(source)


def _check_exists(source: Source) -> None:
    if isinstance(source, bytes):
        return
    if not Path(source).exists():
        raise AudioError(f"no such audio file: {fspath(source)}.")
    if Path(source).is_dir():
        raise AudioError(f"{fspath(source)} is a folder, not an audio file.")


def _decode(source: str | bytes) -> tuple[np.ndarray[Any, Any], int, str]:
    with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        return file.read(dtype="float32", always_2d=True), file.samplerate, file.format


def _decode_with_ffmpeg(source: Source, name: str, cause: Exception) -> tuple[np.ndarray[Any, Any], int, str]:
    program = shutil.which("ffmpeg")
    if program is None:
        suffix = "" if isinstance(source, bytes) else Path(source).suffix.lower()
        if suffix in NEEDS_FFMPEG:
            raise AudioError(
                f"cannot read {name}: {suffix} files need the ffmpeg program. "
                f"Install it (Debian, Ubuntu: apt install ffmpeg) or convert the file to WAV or FLAC."
            ) from cause
        raise AudioError(
            f"cannot read {name}: it is not WAV, FLAC, MP3, Ogg, Opus or AIFF, or it is damaged. "
            f"Convert it to WAV or FLAC, or install the ffmpeg program, which reads more formats."
        ) from cause
    with tempfile.TemporaryDirectory() as folder:
        given, wav = Path(folder) / "given", Path(folder) / "decoded.wav"
        if isinstance(source, bytes):
            given.write_bytes(source)
        path = str(given if isinstance(source, bytes) else Path(source).absolute())
        command = [program, "-nostdin", "-v", "error", "-i", path, "-map", "0:a:0", "-c:a", "pcm_f32le", str(wav)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wav.exists():
            reason = done.stderr.strip().splitlines()[-1:] or ["no audio in it"]
            raise AudioError(f"cannot read {name}: neither libsndfile nor ffmpeg can ({reason[0]}).") from cause
        return _decode(str(wav))


def _clear_timestamp(content: bytes) -> bytes:
    """Clear the second of writing, with which libsndfile stamps float WAVs, so that equal audio is equal bytes."""
    at = content.find(b"PEAK", 12, 128)
    if not content.startswith(b"RIFF") or at < 0:
        return content
    return content[: at + 12] + bytes(4) + content[at + 16 :]
