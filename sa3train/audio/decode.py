"""Decoding of audio files to their last frame, through libsndfile, and through ffmpeg where libsndfile fails.

Shapes: N samples, C channels.
"""

import io
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike, fsencode, fspath
from pathlib import Path
from typing import Any, BinaryIO

import mutagen
import numpy as np
import torch
from torch import Tensor

from sa3train.audio.layouts import read_speakers
from sa3train.audio.scan import ASF_START, OPEN_LENGTH, Problem, Scan, read_at, scan_flac, scan_repeated, skip_id3
from sa3train.audio.scan_chunks import CHUNKED, scan_chunks
from sa3train.audio.scan_mpeg import EMPTY_ID3, scan_mpeg
from sa3train.audio.scan_ogg import scan_ogg
from sa3train.core.errors import AudioError
from sa3train.core.imports import explain_imports
from sa3train.core.user_files import stat_file

with explain_imports():
    import soundfile

Source = str | PathLike[str] | bytes

NEEDS_FFMPEG = (".m4a", ".aac", ".mp4", ".wma", ".alac")

UNKNOWN_FRAMES = 2**40
"""Frames from which on a length is one that libsndfile does not know."""

AUDIO_LIMIT = 4 << 30
"""Most bytes of an audio file, which is read whole: 6.7 hours of stereo at 44.1 kHz and 16 bits."""

MAX_JUNK = 65536
"""Bytes before the first page of an Ogg stream: the rest of a page that a recording began in."""

ROUNDING_SECONDS = 0.005  # by which libsndfile misses the lengths that it reports itself
FFMPEG_SECONDS = 0.1  # by which containers round what encoders add at both ends

MATROSKA_START = b"\x1aE\xdf\xa3"
_BLOCK = 65536  # samples


@dataclass(frozen=True)
class DecodedAudio:
    """Audio of a file, and what is known to be missing.

    Attributes:
        audio_CN: Audio in float32.
        sample_rate: Sample rate in Hz.
        container: Name of the container, such as "WAV".
        encoding: Name of the encoding, such as "PCM_16"; "ffmpeg" where ffmpeg decoded the file.
        problems: What is missing, may be missing, or was not read.
        speakers: Speaker of each channel, as `sa3train.audio.layouts.read_speakers` returns.
        missing: Samples that were stated and not delivered.
    """

    audio_CN: Tensor
    sample_rate: int
    container: str
    encoding: str
    problems: tuple[Problem, ...] = ()
    speakers: tuple[str, ...] | None = None
    missing: int = 0


class _Memory(io.BytesIO):
    """Bytes in which libsndfile may seek to before their start, as it does in damaged files."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        start = (0, self.tell(), self.getbuffer().nbytes)[whence]
        return super().seek(max(0, start + offset))


def describe_source(source: Source) -> str:
    """Describe a source for messages.

    Args:
        source: Path, or the bytes of a file.

    Returns:
        The path, or the number of bytes.
    """
    return f"{len(source)} bytes of audio" if isinstance(source, bytes) else fspath(source)


def _check_exists(source: Source) -> None:
    """Check that a source is bytes or a regular file with content, not a folder, pipe, socket or device."""
    if isinstance(source, bytes):
        return
    try:
        size = stat_file(source).st_size
    except FileNotFoundError as error:
        raise AudioError(f"no such audio file: {fspath(source)}.") from error
    except OSError as error:
        raise AudioError(f"cannot read {fspath(source)}: {error.strerror}. Give an audio file.") from error
    if size > AUDIO_LIMIT:
        raise AudioError(f"{fspath(source)} has {size >> 30} GiB; the limit is {AUDIO_LIMIT >> 30}. Cut it into clips.")
    if size == 0:  # so say files of /proc too, some of which block
        raise AudioError(f"cannot read {fspath(source)}: it is empty. Copy or export it again.")


def scan_audio(source: Source) -> Scan:
    """Scan the structure of an audio file of any kind.

    Args:
        source: Path, or the bytes of a file.

    Returns:
        The scan; of kinds without a scanner, that nothing is known.

    Raises:
        AudioError: There is no such file, it is no regular file, it is empty, or it cannot be read.
    """
    _check_exists(source)
    try:
        if isinstance(source, bytes):
            return _scan(io.BytesIO(source), len(source))
        with Path(source).open("rb") as file:
            return _scan(file, Path(source).stat().st_size)
    except OSError as error:
        raise AudioError(f"cannot read {describe_source(source)}: {error.strerror or error}.") from error


def _scan(file: BinaryIO, size: int) -> Scan:
    head = file.read(12)
    if head[:4] in CHUNKED:
        scan = scan_chunks(file, size)
        if head[:4] == b"BW64":  # RF64 under another name, which libsndfile does not know
            scan = replace(scan, parts=tuple(b"RF64" + part[4:] for part in scan.parts or (read_at(file, 0, -1),)))
        return scan
    if head[:4] == MATROSKA_START:
        return Scan(is_known=False)
    content = head + file.read()
    if head[4:8] == b"ftyp":
        return scan_repeated(content, head)
    if content.startswith(ASF_START):
        return scan_repeated(content, ASF_START)
    start = skip_id3(content)
    own = content[start:] if start else content
    if own.startswith((b"fLaC", b"OggS")):
        scan = scan_ogg(own) if own.startswith(b"OggS") else scan_flac(own)
        return replace(scan, parts=(own,)) if start and not scan.parts else scan
    scan, page = scan_mpeg(content, start > 0 or own[:1] == b"\xff"), content.find(b"OggS", 0, MAX_JUNK)
    if scan.is_known or page < 0:
        return scan
    scan = scan_ogg(content[page:])
    return scan if scan.parts else replace(scan, parts=(content[page:],))


def decode_audio(source: Source) -> DecodedAudio:
    """Decode an audio file to its last frame.

    Args:
        source: Path, or the bytes of a file.

    Returns:
        The audio with its own channels and sample rate, and its problems.

    Raises:
        AudioError: The file is missing, not audio, or damaged so that nothing can be read.
    """
    scan = scan_audio(source)
    parts = _decode_file(source, scan)
    while scan.following:
        following = scan.following
        scan = scan_audio(following)
        try:
            parts += _decode_file(following, scan)
        except AudioError as error:
            text = f"{len(following) - len(scan.following)} bytes of a joined file: {error}"
            parts[0] = replace(parts[0], problems=(*parts[0].problems, Problem("unread_data", text)))
    return _join(parts)


def _decode_file(source: Source, scan: Scan) -> list[DecodedAudio]:
    """Decode a file without those that were joined to it. Its first part has the problems of all."""
    if scan.following:
        source = scan.parts[0]
    parts, errors = [], []
    for part in scan.parts or (source if isinstance(source, bytes) else fspath(source),):
        try:
            parts.append(_decode(part))
        except Exception as error:  # noqa: BLE001  what libsndfile raises for damage is not one class
            errors.append(error)
    if not parts:
        parts, errors = [_decode_with_ffmpeg(source, errors[0])], []
    elif (errors or any(part.missing for part in parts)) and shutil.which("ffmpeg"):
        parts = _try_ffmpeg(source, parts)
    first, held = parts[0], sum(part.audio_CN.shape[1] for part in parts)
    missing = max(first.missing, math.ceil(scan.lost * held))
    audio_CN = first.audio_CN
    if scan.samples is not None and missing and abs(scan.samples - held - missing) < 2 * scan.block:
        missing = scan.samples - held
    elif scan.samples is not None and 0 < held - scan.samples < scan.block:
        audio_CN = audio_CN[:, : scan.samples]
    problems = (*scan.problems, *first.problems)
    if errors:
        problems += (Problem("unread_data", f"{len(errors)} of {len(scan.parts)} streams"),)
    if scan.is_known and OPEN_LENGTH not in scan.problems:
        problems = tuple(problem for problem in problems if problem != OPEN_LENGTH)
    return [replace(first, audio_CN=audio_CN, missing=missing, problems=problems), *parts[1:]]


def _join(parts: Sequence[DecodedAudio]) -> DecodedAudio:
    """Join the parts that have the first one's rate and channels, and state what is missing."""
    first, shapes = parts[0], [_describe_shape(part) for part in parts]
    equal = [part for part, shape in zip(parts, shapes, strict=True) if shape == shapes[0]]
    problems = [problem for part in equal for problem in part.problems]
    for part, shape in zip(parts, shapes, strict=True):
        if shape != shapes[0]:
            seconds = part.audio_CN.shape[1] / part.sample_rate
            problems.append(Problem("unread_data", f"{seconds:.2f} s with {shape}, unlike the first {shapes[0]}"))
    audio_CN, rate = torch.cat([part.audio_CN for part in equal], dim=1).contiguous(), first.sample_rate
    missing, held = sum(part.missing for part in equal), audio_CN.shape[1]
    if missing:
        amount = f"{missing / rate:.2f} s" if missing >= 0.005 * rate else "less than 0.01 s"
        problems.insert(0, Problem("cut_short", f"{amount} of {(held + missing) / rate:.2f} s missing"))
    if any(problem.code == "cut_short" for problem in problems):
        problems = [problem for problem in problems if problem != OPEN_LENGTH]
    details: dict[str, dict[str, None]] = {}
    for problem in problems:
        details.setdefault(problem.code, {})[problem.detail] = None
    merged = tuple(Problem(code, "; ".join(texts)) for code, texts in details.items())
    return replace(first, audio_CN=audio_CN, problems=merged, missing=missing)


def _describe_shape(part: DecodedAudio) -> str:
    channels = len(part.audio_CN)
    return f"{part.sample_rate} Hz and {channels} channel{'s' if channels > 1 else ''}"


def _open(source: str | bytes) -> soundfile.SoundFile:
    if isinstance(source, str):
        return soundfile.SoundFile(fsencode(source))  # it refuses text for a name that is not UTF-8
    is_mpeg = source[:1] == b"\xff"
    return soundfile.SoundFile(_Memory(EMPTY_ID3 + source if is_mpeg else source))


def _decode(source: str | bytes) -> DecodedAudio:
    with _open(source) as file:
        claimed, is_known = file.frames, file.frames < UNKNOWN_FRAMES
        try:
            samples_NC = file.read(dtype="float32", always_2d=True) if is_known else _salvage(source)
        except Exception:  # as above; MemoryError for a length that is not true
            samples_NC = _salvage(source)
            if not len(samples_NC):
                raise
        missing = claimed - len(samples_NC) if is_known else 0
        missing = missing if missing > ROUNDING_SECONDS * file.samplerate else 0
        speakers = read_speakers(source, file.channels)
        audio_CN = torch.from_numpy(samples_NC.T)
        return DecodedAudio(audio_CN, file.samplerate, file.format, file.subtype, (), speakers, missing)


def _salvage(source: str | bytes) -> np.ndarray[Any, Any]:
    """Read in blocks up to the first failure. What a failed read did deliver is told by what is no longer NaN."""
    blocks: list[np.ndarray[Any, Any]] = []
    with _open(source) as file:
        while True:
            block_NC = np.full((_BLOCK, file.channels), np.nan, np.float32)
            try:
                count = len(file.read(out=block_NC))
            except Exception:  # noqa: BLE001  as above
                count = _BLOCK - int(np.isnan(block_NC[::-1]).all(axis=1).cumprod().sum())
                blocks.append(block_NC[:count])
                break
            if not count:
                break
            blocks.append(block_NC[:count])
        return np.concatenate(blocks) if blocks else np.zeros((0, file.channels), np.float32)


def _try_ffmpeg(source: Source, parts: list[DecodedAudio]) -> list[DecodedAudio]:
    """Decode with ffmpeg what libsndfile could not read to its end, and keep the longer."""
    try:
        other = _decode_with_ffmpeg(source, None)
    except AudioError:
        return parts
    held, longer = sum(part.audio_CN.shape[1] for part in parts), other.audio_CN.shape[1]
    missing = max(0, held + sum(part.missing for part in parts) - longer)
    return [replace(other, missing=missing, problems=())] if longer > held else parts


def _decode_with_ffmpeg(source: Source, cause: Exception | None) -> DecodedAudio:
    name, program = describe_source(source), shutil.which("ffmpeg")
    if program is None:
        raise AudioError(f"cannot read {name}: {_suggest_conversion(source)}") from cause
    with tempfile.TemporaryDirectory() as folder:
        given, wav = Path(folder) / "given", Path(folder) / "decoded.wav"
        if isinstance(source, bytes):
            given.write_bytes(source)
        path = given if isinstance(source, bytes) else Path(source).absolute()
        command = [program, "-nostdin", "-v", "error", "-i", str(path), "-map", "0:a:0"]
        command += ["-c:a", "pcm_f32le", "-rf64", "auto", str(wav)]
        # A session of its own: cut off by a signal to our group, it would leave a file that looks damaged.
        flag = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", start_new_session=True, creationflags=flag
        )
        if done.returncode != 0 or not wav.exists():
            reason = done.stderr.strip().splitlines()[-1:] or ["no audio in it"]
            raise AudioError(f"cannot read {name}: neither libsndfile nor ffmpeg can ({reason[0]}).") from cause
        part = _decode(str(wav))
        stated = _find_stated_seconds(path)
    missing = stated - part.audio_CN.shape[1] / part.sample_rate
    complaints = re.sub(r"\[[^\]]* @ [^\]]*\] ", "", done.stderr).strip().splitlines()
    problems = () if stated else (OPEN_LENGTH,)
    if complaints:
        text = f"ffmpeg reports damage ({complaints[0]}): how much is missing is not known"
        problems = (Problem("cut_short", text),)
    container = "" if isinstance(source, bytes) else Path(source).suffix.lstrip(".").upper()
    if missing > FFMPEG_SECONDS:
        return replace(part, container=container, encoding="ffmpeg", missing=round(missing * part.sample_rate))
    return replace(part, container=container, encoding="ffmpeg", problems=problems)


def _find_stated_seconds(path: Path) -> float:
    """Find the length that the index of an MP4 or ASF file states; 0 where none does."""
    try:
        file = mutagen.File(path)
    except (mutagen.MutagenError, OSError, ValueError, IndexError, KeyError, ArithmeticError):
        return 0.0
    return float(file.info.length) if type(file).__name__ in ("MP4", "ASF") else 0.0


def _suggest_conversion(source: Source) -> str:
    suffix = "" if isinstance(source, bytes) else Path(source).suffix.lower()
    if suffix in NEEDS_FFMPEG:
        return (
            f"{suffix} files need the ffmpeg program. Install it (Debian, Ubuntu: apt install ffmpeg) "
            f"or convert the file to WAV or FLAC."
        )
    return (
        "it is not WAV, FLAC, MP3, Ogg, Opus or AIFF, or it is damaged. "
        "Convert it to WAV or FLAC, or install the ffmpeg program, which reads more formats."
    )
