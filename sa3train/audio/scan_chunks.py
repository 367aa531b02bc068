"""Scan of files made of chunks (WAV, RF64, W64, AIFF, CAF) and of AU: sizes that do not agree with the file."""

from dataclasses import dataclass, replace
from typing import BinaryIO, Literal

from sa3train.audio.chunks import CHUNK_KINDS, iterate_chunks
from sa3train.audio.scan import OPEN_LENGTH, Problem, Scan, read_at
from sa3train.audio.scan_mpeg import scan_mpeg
from sa3train.audio.scan_ogg import scan_ogg

PCM_TAGS = (1, 3, 6, 7, 0xFFFE)
"""Format tags of WAV whose blocks hold one sample per channel."""

MPEG_TAGS = (0x50, 0x55)
OGG_TAGS = (0x674F, 0x6750, 0x6751, 0x676F, 0x6770, 0x6771)
"""Format tags of WAV for whole streams of another kind in the data chunk."""

MIN_UNREAD = 4096  # bytes after the audio that are reported, where they are neither chunks nor tags
_DEFAULT_BLOCK = 320  # samples, for codecs that do not state it: GSM has the longest

# What programs write into a pipe, where they cannot come back to fill in the size (ffmpeg, sox, arecord, mpg123).
_OPEN_SIZES = ((0, 0), (0x7FFFF000, 0x80000000), (0xFFFFFF00, 0xFFFFFFFF), (2**63 - 4096, 2**64 - 1))

AU_ORDERS: dict[bytes, Literal["little", "big"]] = {b".snd": "big", b"dns.": "little"}
CHUNKED = (*CHUNK_KINDS, *AU_ORDERS)
"""First bytes of the files that `scan_chunks` reads."""


@dataclass(frozen=True)
class _Data:
    """The chunk with the audio, and where its size is written."""

    start: int
    size: int
    size_at: int
    size_bytes: int
    order: Literal["little", "big"]
    magic: bytes
    extra: int = 0  # counted in the size besides the data
    tag: int = 1  # of the encoding, in WAV
    fact: int | None = None
    block: int = 0


def scan_chunks(file: BinaryIO, size: int) -> Scan:
    """Compare the sizes that a file of chunks states with the file's own.

    Args:
        file: Opened file.
        size: Its length in bytes.

    Returns:
        The scan. A file without audio chunk is left to the decoder.
    """
    data = _find_data(file, size)
    if data is None:
        return Scan(is_known=False)
    held = size - data.start
    joined, unread = (size, 0) if data.size >= held else _judge_rest(file, size, data)
    if data.tag in OGG_TAGS or data.tag in MPEG_TAGS:
        content = read_at(file, data.start, min(data.size, held) or -1)
        content = content[max(0, content.find(b"OggS")) :] if data.tag in OGG_TAGS else content
        scan = scan_ogg(content) if data.tag in OGG_TAGS else scan_mpeg(content)
        if scan.parts or scan.is_known:
            return replace(scan, parts=scan.parts or (content,), following=read_at(file, joined, -1))
    if data.size >= held or (data.size == 0 and unread == held):
        return _scan_to_end(file, data, held)
    following = read_at(file, joined, -1)
    return Scan(
        parts=(read_at(file, 0, joined),) if following else (),
        following=following,
        samples=data.fact,
        block=data.block,
        problems=(Problem("unread_data", f"{unread} bytes after the audio"),) if unread > MIN_UNREAD else (),
    )


def _scan_to_end(file: BinaryIO, data: _Data, held: int) -> Scan:
    """Scan a file whose audio ends with it: whole, cut, or of a length that its header leaves open."""
    if any(low <= data.size <= high for low, high in _OPEN_SIZES):
        return _scan_open(read_at(file, 0, -1), data)
    missing = data.size - held
    return Scan(
        parts=(_write_size(read_at(file, 0, -1), data, held),) if missing and data.magic == b"caff" else (),
        lost=missing / max(1, held),
        samples=data.fact,
        block=data.block,
    )


def _scan_open(content: bytes, data: _Data) -> Scan:
    """Scan a file without a size. Another one that was joined to it is known by the first bytes that both have."""
    offset = 12 if data.magic in AU_ORDERS else 8
    end = content.find(content[offset:24], data.start) - offset
    if end < data.start or content[end : end + 4] != data.magic:
        end = len(content)
    part = _write_size(content[:end], data, end - data.start)
    problems = (OPEN_LENGTH,)
    return Scan(parts=(part,), following=content[end:], samples=data.fact, block=data.block, problems=problems)


def _find_data(file: BinaryIO, size: int) -> _Data | None:
    magic = read_at(file, 0, 4)
    if magic in AU_ORDERS:
        order = AU_ORDERS[magic]
        start, length = (int.from_bytes(read_at(file, at, 4), order) for at in (4, 8))
        return _Data(start, length, 8, 4, order, magic) if 24 <= start <= size else None
    kind = CHUNK_KINDS[magic]
    facts: dict[str, int] = {}
    size_at, size_bytes, extra = 0, kind.size_bytes, (kind.id_bytes + kind.size_bytes) * kind.counts_header
    for name, start, length in iterate_chunks(file, size, kind, kind.start):
        if name == b"fmt ":
            facts |= _parse_format(read_at(file, start, min(length, 20)), kind.order)
        elif name == b"fact" and facts.get("block"):
            facts["fact"] = int.from_bytes(read_at(file, start, 4), kind.order)
        elif name == b"ds64":
            size_at, size_bytes = start + 8, 8
        elif name in (b"data", b"SSND"):
            return _Data(start, length, size_at or start - size_bytes, size_bytes, kind.order, magic, extra, **facts)
    return None


def _parse_format(content: bytes, order: Literal["little", "big"]) -> dict[str, int]:
    """Read the encoding of WAV, and the samples per block where its blocks hold more than one."""
    tag = int.from_bytes(content[:2], order)
    stated = int.from_bytes(content[18:20], order) if int.from_bytes(content[16:18], order) >= 2 else 0
    return {"tag": tag, "block": 0 if tag in PCM_TAGS else stated or _DEFAULT_BLOCK}


def _judge_rest(file: BinaryIO, size: int, data: _Data) -> tuple[int, int]:
    """Judge what follows the audio: where another file begins, and the number of bytes that are no chunks or tags."""
    kind = CHUNK_KINDS.get(data.magic)
    position = kind.find_next(data.start, data.size) if kind else data.start + data.size
    own = read_at(file, 0, 12)

    def is_joined(at: int) -> bool:
        head = read_at(file, at, 12)
        return head[:4] == data.magic and (kind is None or head[8:] == own[8:])

    for _, start, length in iterate_chunks(file, size, kind, position) if kind else ():
        if is_joined(position) or start + length > size:
            break
        position = kind.find_next(start, length) if kind else size
    if is_joined(position):
        return position, 0
    rest = read_at(file, position, 1 << 20)
    is_harmless = rest[:3] in (b"TAG", b"ID3") or rest[:8] == b"APETAGEX" or (data.size > 0 and not any(rest))
    return size, 0 if position >= size or is_harmless else size - position


def _write_size(content: bytes, data: _Data, held: int) -> bytes:
    """Write the size of the audio chunk that is true."""
    size = min(held + data.extra, 256**data.size_bytes - 1)
    end = data.size_at + data.size_bytes
    return content[: data.size_at] + size.to_bytes(data.size_bytes, data.order) + content[end:]
