"""A shard on disk: a WebDataset tar of `<key>.npy` and `<key>.json`, and its listing, `NAME.jsonl`."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sa3train.core.files import replace_file

BLOCK = 512
"""Bytes of a block of a tar."""

MAX_BYTES = 512_000_000
"""Size that a shard grows to, unless told otherwise."""

ENCODED_FIELDS = ("frames", "seconds", "crc32", "applied")
"""Fields of a record that encoding adds; `ShardEntry.digest` covers the others, which were planned before."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A clip in a shard.

    Attributes:
        record: Its record.
        npy_offset: First byte of its array in the tar.
        npy_size: Size of its array in bytes.
        json_offset: First byte of its record in the tar.
        json_size: Size of its record in bytes.
    """

    record: dict[str, Any]
    npy_offset: int
    npy_size: int
    json_offset: int
    json_size: int

    @property
    def key(self) -> str:
        """Key of the clip."""
        return str(self.record["key"])

    @property
    def digest(self) -> str:
        """Hash of what was planned for this clip, to tell whether the plan has changed."""
        return hash_record(self.record)


def hash_record(record: Mapping[str, Any]) -> str:
    """Hash the planned part of a record, independent of the order of its keys.

    Args:
        record: Record of a clip.

    Returns:
        24 hex digits.
    """
    planned = {name: value for name, value in record.items() if name not in ENCODED_FIELDS}
    canonical = json.dumps(planned, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def get_listing_path(shard: Path) -> Path:
    """Get the path of a shard's listing.

    Args:
        shard: Such as `train-000-00000.tar`.

    Returns:
        Such as `train-000-00000.jsonl`.
    """
    return shard.with_suffix(".jsonl")


def write_listing(shard: Path, entries: list[ShardEntry]) -> None:
    """Write the listing of a shard, one JSON line per clip.

    Args:
        shard: Path of the shard.
        entries: Its clips in the order of the tar.
    """
    with replace_file(get_listing_path(shard)) as path, path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")


def read_listing(shard: Path) -> Iterator[ShardEntry]:
    """Read the clips of a finished shard; a missing or damaged listing is made again from the tar.

    Args:
        shard: Path of the shard.

    Yields:
        Its clips in the order of the tar.
    """
    try:
        lines = get_listing_path(shard).read_text(encoding="utf-8").splitlines()
        entries = [ShardEntry(**json.loads(line)) for line in lines]
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, TypeError):
        entries, _ = scan_shard(shard)
        write_listing(shard, entries)
    yield from entries


def read_latents(path: Path, entry: ShardEntry) -> np.ndarray | None:
    """Read latents from a shard.

    Args:
        path: Path of the shard.
        entry: The clip.

    Returns:
        (C, F) float16; None when the bytes are damaged.
    """
    try:
        with path.open("rb") as file:
            file.seek(entry.npy_offset)
            content = file.read(entry.npy_size)
    except OSError:
        return None
    if zlib.crc32(content) != entry.record["crc32"]:
        return None
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def scan_shard(path: Path) -> tuple[list[ShardEntry], int]:
    """Scan a shard or part for complete, undamaged clips.

    Args:
        path: Path of the shard or part.

    Returns:
        The clips up to the first incomplete or damaged one, and the byte where they end.
    """
    entries: list[ShardEntry] = []
    end = 0
    with path.open("rb") as file:
        while True:
            array = _read_member(file, end)
            text = _read_member(file, array[2]) if array else None
            entry = _parse_entry(array, text) if array and text else None
            if entry is None or text is None:
                return entries, end
            entries.append(entry)
            end = text[2]


def _read_member(file: BinaryIO, start: int) -> tuple[str, bytes, int] | None:
    """Name, content and end of the member whose header is at `start`; None if it is incomplete."""
    file.seek(start)
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        return None
    content = file.read(pad(header.size)) if 0 <= header.size <= MAX_BYTES * 8 else b""
    if header.size <= 0 or len(content) < pad(header.size):
        return None
    return header.name, content[: header.size], start + BLOCK + len(content)


def _parse_entry(array: tuple[str, bytes, int], text: tuple[str, bytes, int]) -> ShardEntry | None:
    key = array[0].removesuffix(".npy")
    if array[0] != f"{key}.npy" or text[0] != f"{key}.json":
        return None
    try:
        record = json.loads(text[1])
        if record["key"] != key or record["crc32"] != zlib.crc32(array[1]):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    start = array[2] - pad(len(array[1])) - BLOCK
    return make_entry(record, start, len(array[1]), len(text[1]))


def make_entry(record: dict[str, Any], start: int, npy: int, text: int) -> ShardEntry:
    """Compute the offsets of a clip in its shard.

    Args:
        record: Its record.
        start: Byte where its first header starts.
        npy: Size of its array in bytes.
        text: Size of its record in bytes.

    Returns:
        The clip.
    """
    return ShardEntry(record, start + BLOCK, npy, start + 2 * BLOCK + pad(npy), text)


def pad(size: int) -> int:
    """Round a size up to whole blocks of a tar.

    Args:
        size: Bytes.

    Returns:
        Bytes, a multiple of 512.
    """
    return -(-size // BLOCK) * BLOCK
