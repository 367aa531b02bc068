"""Scan of MP3 files: every frame is counted, since libsndfile believes a length that encoders state or it estimates.

A file whose first frame (Xing, Info or VBRI) does not tell the true count is rebuilt: an Info frame that does, and then
the frames, without what lies between them. Layout: ISO/IEC 11172-3; Info frame as LAME writes it.
"""

import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mutagen.id3 import BitPaddedInt
from mutagen.mp3 import HeaderNotFoundError, MPEGFrame

from sa3train.audio.scan import OPEN_LENGTH, Problem, Scan, skip_id3

EMPTY_ID3 = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)
"""A tag without entries. Without a tag, libsndfile looks for a resource fork before it tries MP3. Where the audio has
no name, that is the file "._" of the current folder, and whatever is in it ends the reading: see
findings/libsndfile_resource_fork.sh.
"""

MIN_FRAMES = 3  # that follow each other, for bytes without another mark to be taken for MP3
MIN_GARBAGE = 4096  # bytes without a frame that are reported where nothing states the length

_RATES = bytes(byte for byte in range(0x10, 0xF0) if byte & 0x0C != 0x0C)
_SYNC = re.compile(rb"\xff[\xe2-\xe7\xf2-\xff][" + re.escape(_RATES) + b"]")
"""What a header begins with that has neither a reserved version, layer or sample rate nor a free bit rate."""

_INFO_OFFSETS = {(True, 2): 36, (True, 1): 21, (False, 2): 21, (False, 1): 13}
_EXTENSION = slice(120, 156)  # what LAME adds, from "Xing" or "Info" on
_GAPS = slice(141, 144)  # samples of delay and of padding, 12 bits each
_INFO_BYTES = 192


@dataclass(frozen=True)
class _Format:
    """What one frame header says. Frames with equal keys are decoded together."""

    length: int
    info_offset: int
    key: tuple[float, int, int, int]


class _Info(NamedTuple):
    """Frames and bytes that an Info frame states, 0 for none, and its own length, which the bytes include."""

    frames: int
    bytes: int
    length: int


@dataclass
class _Run:
    """Consecutive frames of one format, and what Info frames among them state."""

    start: int
    format: _Format
    frames: list[bytes] = field(default_factory=list)
    infos: list[_Info] = field(default_factory=list)
    extension: bytes = bytes(36)


def scan_mpeg(content: bytes, is_certain: bool = True) -> Scan:
    """Count the frames of an MP3 file.

    Args:
        content: Bytes of the file.
        is_certain: Whether something else says that this is MP3.

    Returns:
        The scan. A file of MPEG layers I and II, or without frames, is left to libsndfile.
    """
    runs, garbage, has_partial = _collect_runs(content)
    counted = sum(len(run.frames) for run in runs)
    if not counted or any(run.format.key[1] != 3 for run in runs) or (not is_certain and counted < MIN_FRAMES):
        return Scan(is_known=False)
    size = sum(len(frame) for run in runs for frame in run.frames)
    infos = [info for run in runs for info in run.infos if info.frames]
    stated = [info.frames for info in infos]
    tells_bytes = all(info.bytes for info in infos)
    is_complete = tells_bytes and sum(info.bytes - info.length for info in infos) <= size
    is_plain = not garbage and len(runs) == 1 and stated == [counted] and runs[0].start == _find_start(content)
    problems: list[Problem] = []
    missing = 0 if is_complete else sum(stated) - counted
    lost = missing / counted if missing > (0 if tells_bytes else len(stated)) else 0.0  # some count the Info frame
    if not stated:
        lost = garbage / size if garbage > MIN_GARBAGE else 0.0
        if has_partial:
            problems.append(Problem("cut_short", "it ends inside a frame: how much is missing is not known"))
        elif not lost:
            problems.append(OPEN_LENGTH)
    parts = () if is_plain else tuple(_rebuild(run, lost > 0 or len(stated) > 1) for run in runs if run.frames)
    return Scan(parts=parts, lost=lost, problems=tuple(problems))


def _find_start(content: bytes) -> int:
    """Find where libsndfile looks for the first frame: behind one tag."""
    return 10 + BitPaddedInt(content[6:10]) if content.startswith(b"ID3") else 0


def _collect_runs(content: bytes) -> tuple[list[_Run], int, bool]:
    """Collect the frames by format, count the bytes that belong to none, and see whether the last frame is partial."""
    runs: list[_Run] = []
    end, garbage, has_partial = skip_id3(content), 0, False
    for start, frame, format_ in _iterate_frames(content, end):
        garbage += max(0, start - _skip_tags(content, end)) if runs else 0
        end = start + len(frame)
        if len(frame) < format_.length:
            has_partial = True
            break
        if not runs or runs[-1].format.key != format_.key:
            runs.append(_Run(start, format_))
        _add_frame(runs[-1], frame, format_)
    tail = _skip_tags(content, end)
    return runs, garbage + len(content) - tail, has_partial


def _iterate_frames(content: bytes, start: int) -> Iterator[tuple[int, bytes, _Format]]:
    """Yield frames with their offsets. Other bytes are passed over until two frames follow each other, or the last."""
    key, is_synced = None, False
    while start <= len(content) - 4:
        format_ = _parse_header(content[start : start + 4])
        end = start + format_.length if format_ else 0
        if format_ and is_synced and format_.key == key:
            is_frame = True
        elif format_ and end <= len(content) == _skip_tags(content, end):
            is_frame = key in (None, format_.key)
        else:
            following = _parse_header(content[end : end + 4])
            is_frame = bool(format_ and following and following.key == format_.key)
        if format_ and is_frame:
            key, is_synced = format_.key, True
            yield start, content[start:end], format_
            start = end
        elif (after := _skip_tags(content, start)) > start:
            start = after
        else:
            sync, is_synced = _SYNC.search(content, start + 1), False
            start = sync.start() if sync else len(content)


def _add_frame(run: _Run, frame: bytes, format_: _Format) -> None:
    at = format_.info_offset
    if frame[at : at + 4] in (b"Xing", b"Info"):
        frames, size = (int.from_bytes(frame[at + offset :][:4], "big") for offset in (8, 12))
        run.infos.append(_Info(frames * (frame[at + 7] & 1), size * (frame[at + 7] & 3 == 3), len(frame)))
        if frame[at + 7] & 15 == 15 and not run.frames:
            run.extension = frame[at:][_EXTENSION].ljust(36, b"\0")
    elif frame[36:40] == b"VBRI":
        size, frames = (int.from_bytes(frame[offset:][:4], "big") for offset in (46, 50))
        run.infos.append(_Info(frames, size, len(frame)))
    else:
        run.frames.append(frame)


def _skip_tags(content: bytes, start: int) -> int:
    """Skip ID3 and APE tags of either version."""
    while start < len(content):
        before, start = start, skip_id3(content, start)
        if content[start : start + 3] == b"TAG":
            start += 128
        elif content[start : start + 8] == b"APETAGEX":
            is_header = content[start + 23] & 0x20 if len(content) > start + 23 else 0
            start += 32 + (int.from_bytes(content[start + 12 : start + 16], "little") if is_header else 0)
        if start == before:
            break
    return min(start, len(content))


@functools.lru_cache(4096)
def _parse_header(header: bytes) -> _Format | None:
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    file = io.BytesIO(header)
    try:
        frame = MPEGFrame(file)
    except HeaderNotFoundError:
        return None
    offset = _INFO_OFFSETS[frame.version == 1, frame.channels]
    return _Format(file.tell(), offset, (frame.version, frame.layer, frame.sample_rate, frame.channels))


def _rebuild(run: _Run, has_other_end: bool) -> bytes:
    """Write the frames of a run behind an Info frame that tells their number, and no padding for another end."""
    first = bytearray(run.frames[0][:4])
    first[1] |= 1  # no checksum
    for bitrate in range(1, 15):
        first[2] = bitrate << 4 | (first[2] & 0x0C)
        format_ = _parse_header(bytes(first))
        if format_ and format_.length >= run.format.info_offset + _INFO_BYTES:
            break
    assert format_ is not None
    info = bytearray(format_.length)
    at = run.format.info_offset
    info[:4] = first
    size = len(info) + sum(map(len, run.frames))
    info[at : at + 16] = b"Info\0\0\0\x0f" + len(run.frames).to_bytes(4, "big") + size.to_bytes(4, "big")
    info[at + _EXTENSION.start : at + _EXTENSION.stop] = run.extension
    if has_other_end:
        gaps = int.from_bytes(info[at + _GAPS.start : at + _GAPS.stop], "big") & 0xFFF000
        info[at + _GAPS.start : at + _GAPS.stop] = gaps.to_bytes(3, "big")
    return b"".join((EMPTY_ID3, info, *run.frames))
