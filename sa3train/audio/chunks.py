"""Chunks of RIFF, RF64, Wave64, AIFF and CAF files."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal

MAX_CHUNKS = 65536
"""Most chunks that are looked at, so that a file of nothing else is soon done with."""

_MAX_BYTES = 1 << 20
"""Longest chunk that is read; longer ones hold samples, pictures and the like."""


@dataclass(frozen=True)
class ChunkKind:
    """How a kind of file is laid out.

    Attributes:
        start: Offset of the first chunk.
        id_bytes: Length of a chunk's name.
        size_bytes: Length of a chunk's size.
        order: Byte order.
        counts_header: Whether a chunk's size includes its header.
        align: Chunks begin at multiples of this.
    """

    start: int
    id_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    counts_header: bool = False
    align: int = 2

    def find_next(self, start: int, length: int) -> int:
        """Find where the chunk after another one begins.

        Args:
            start: Offset of a chunk's content.
            length: Its length.

        Returns:
            Offset of the next chunk.
        """
        return start + length + -(length if self.align == 2 else start + length) % self.align


CHUNK_KINDS = {
    b"RIFF": ChunkKind(12, 4, 4, "little"),
    b"RIFX": ChunkKind(12, 4, 4, "big"),
    b"RF64": ChunkKind(12, 4, 4, "little"),
    b"BW64": ChunkKind(12, 4, 4, "little"),
    b"FORM": ChunkKind(12, 4, 4, "big"),
    b"riff": ChunkKind(40, 16, 8, "little", counts_header=True, align=8),
    b"caff": ChunkKind(8, 4, 8, "big", align=1),
}
"""Kinds of files by their first four bytes."""


def iterate_chunks(file: BinaryIO, size: int, kind: ChunkKind, start: int) -> Iterator[tuple[bytes, int, int]]:
    """Iterate over chunks while there is something that looks like one.

    Args:
        file: Opened file.
        size: Its length in bytes.
        kind: How it is laid out.
        start: Offset of a chunk.

    Yields:
        (first four bytes of the name, offset of the content, size of the content); in RF64 the size that `ds64` has.
    """
    header, long_size = kind.id_bytes + kind.size_bytes, 0
    for _ in range(MAX_CHUNKS):
        if start + header > size:
            return
        file.seek(start)
        head = file.read(header)
        if not head[:4].isascii() or not head[:4].decode().isprintable():
            return
        length = int.from_bytes(head[kind.id_bytes :], kind.order)
        if kind.counts_header:
            length = max(0, length - header)
        if head[:4] == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        elif head[:4] == b"data" and length == 0xFFFFFFFF:
            length = long_size or length
        yield head[:4], start + header, length
        start = kind.find_next(start + header, length)


def read_chunks(
    source: str | PathLike[str] | bytes, *names: bytes
) -> tuple[Literal["little", "big"], list[tuple[bytes, bytes]]]:
    """Read chunks by their names. A damaged or foreign file has fewer chunks, or none.

    Args:
        source: Path, or the bytes of a file.
        names: Chunks to read, such as b"fmt ".

    Returns:
        The byte order, and (name, content) pairs in the order of the file.
    """
    found = []
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        kind = CHUNK_KINDS.get(file.read(4))
        size = file.seek(0, 2)
        for name, offset, length in iterate_chunks(file, size, kind, kind.start) if kind else ():
            if name in names and length <= _MAX_BYTES:
                file.seek(offset)
                found.append((name, file.read(length)))
    return kind.order if kind else "little", found
