"""The structure of an audio file: what it states, what it holds, and how libsndfile can be made to read all of it.

libsndfile believes headers. It stops at a length that is stated or estimated too short, at the end of the first of
several joined streams and at damage, and refuses some files that were written to a pipe. A scan compares statement and
content without decoding. Where they differ it rebuilds the file: the same coded audio under a true header.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mutagen.id3 import BitPaddedInt


@dataclass(frozen=True)
class Problem:
    """Why audio may be less than was recorded.

    Attributes:
        code: "cut_short" where audio is missing, "open_length" where nothing states the length, "unread_data" where
            data is left that nothing reads.
        detail: What was found.
    """

    code: str
    detail: str


@dataclass(frozen=True)
class Scan:
    """What the structure of an audio file says.

    Attributes:
        parts: Rebuilt files, whose audio in order is the file's; none where libsndfile reads the file as it is.
        following: Bytes of another file of the same kind that was joined to this one.
        lost: Stated audio that is not there, as a multiple of what is there.
        samples: True length per channel where the last block is padded; None where it is not known.
        block: Samples per block; a longer excess over `samples` is no padding.
        problems: What cannot be known or read.
        is_known: Whether the scan compared length and content.
    """

    parts: tuple[bytes, ...] = ()
    following: bytes = b""
    lost: float = 0.0
    samples: int | None = None
    block: int = 0
    problems: tuple[Problem, ...] = ()
    is_known: bool = True

    @property
    def is_trusted(self) -> bool:
        """Whether what libsndfile says about the file's length is true, and all of it."""
        return self.is_known and not (self.parts or self.samples is not None)


OPEN_LENGTH = Problem("open_length", "nothing in the file states how long it is")
FLAC_START = b"fLaC\0\0\0\x22"
ASF_START = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")

_FLAC_FRAME = re.compile(rb"\xff[\xf8\xf9]")
_FLAC_TOTAL = slice(18, 26)  # sample rate, channels, bits and, in the last 36 bits, the number of samples


def skip_id3(content: bytes, start: int = 0) -> int:
    """Skip ID3v2 tags.

    Args:
        content: Bytes of a file.
        start: Where a tag may begin.

    Returns:
        Where the tags end; `start` where there are none.
    """
    while (head := content[start : start + 10])[:3] == b"ID3" and len(head) == 10 and max(head[6:]) < 0x80 > head[3]:
        end = start + 10 + BitPaddedInt(head[6:])
        start = end if end <= len(content) else start + 10
    return start


def scan_flac(content: bytes) -> Scan:
    """Scan a FLAC file for a length that is open or too short, and for files that were joined to it.

    Args:
        content: Bytes of the file, from "fLaC" on.

    Returns:
        The scan.
    """
    scan = scan_repeated(content, FLAC_START)
    own = scan.parts[0] if scan.parts else content
    facts = int.from_bytes(own[_FLAC_TOTAL], "big")
    stated, held = facts % 2**36, _count_flac_samples(own)
    parts = scan.parts
    if held > stated:
        parts = (own[: _FLAC_TOTAL.start] + (facts - stated + held).to_bytes(8, "big") + own[_FLAC_TOTAL.stop :],)
    return Scan(parts, scan.following, problems=() if stated else (OPEN_LENGTH,), is_known=False)


def _count_flac_samples(content: bytes) -> int:
    """Where the last frame ends that follows another one; 0 where there is none."""
    later = (0, 0)
    for start, end in _iterate_flac_frames(content):
        if end == later[0]:
            return later[1]
        later = (start, end)
    return later[1] if later[0] == 0 else 0


def _iterate_flac_frames(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the first sample of each frame and the one after it, by headers from the last (RFC 9639, section 9.1)."""
    for match in reversed(list(_FLAC_FRAME.finditer(content))):
        header = content[match.start() : match.start() + 16].ljust(16, b"\0")
        ones = 8 - (~header[4] & 0xFF).bit_length()  # the number is coded as UTF-8 codes characters
        number, at = header[4] & 0x7F >> ones, 4 + max(1, ones)
        for byte in header[5:at]:
            number = number << 6 | byte & 0x3F
        code, size = header[2] >> 4, 1 << (header[2] >> 4)
        if code in (6, 7):
            size = int.from_bytes(header[at : at + code - 5], "big") + 1
            at += code - 5
        elif code < 6:
            size = 192 if code == 1 else 144 << code
        at += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)  # a sample rate
        if code and at < 16 and _compute_crc8(header[:at]) == header[at]:
            start = number if header[1] & 1 else number * int.from_bytes(content[8:10], "big")
            yield start, start + size


def _compute_crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    return crc


def scan_repeated(content: bytes, start: bytes) -> Scan:
    """Scan a file for another one of its kind that was joined to it.

    Args:
        content: Bytes of the file.
        start: Bytes that a file of this kind begins with.

    Returns:
        The scan.
    """
    end = content.find(start, len(start))
    parts = () if end < 0 else (content[:end],)
    return Scan(parts=parts, following=b"" if end < 0 else content[end:], is_known=False)


def read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    """Read bytes at an offset.

    Args:
        file: Opened file.
        offset: Where to begin.
        count: Number of bytes.

    Returns:
        The bytes; fewer at the end of the file.
    """
    file.seek(offset)
    return file.read(count)
