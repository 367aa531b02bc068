"""Latent shards on disk: ordinary WebDataset tars (`<key>.npy`, `<key>.json`), written so that a kill loses nothing.

A shard is first `NAME.tar.part`, to which whole clips are appended, array first and record second: a record that is
there in full means a clip that is done. Opening a writer salvages the part an earlier run left, cutting off the clip it
was writing. A full shard gets its listing (`NAME.jsonl`, one line a clip with its place in the tar) and is then renamed
to `NAME.tar`.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from sa3train.core.errors import DataError
from sa3train.core.files import atomic_path

BLOCK = 512
MAX_SHARD_BYTES = 512_000_000
PART, STALE = ".tar.part", ".tar.stale"


MADE = ("frames", "seconds", "crc32", "applied")
"""What a record says of the encoded result; the rest was known before and is what `Entry.digest` covers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One clip in a shard: its record, and where its array and its record lie in the tar (bytes)."""

    record: dict[str, Any]
    npy_at: int
    npy_size: int
    json_at: int
    json_size: int

    @property
    def key(self) -> str:
        return str(self.record["key"])

    @property
    def digest(self) -> str:
        """A hash of what was planned for this clip, to tell whether the plan has changed."""
        return record_digest(self.record)


def record_digest(record: Mapping[str, Any]) -> str:
    """A short hash of a record's planned part, whatever the order of its keys."""
    planned = {name: value for name, value in record.items() if name not in MADE}
    canonical = json.dumps(planned, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class ShardWriter:
    """Appends clips to the shards of one split and one process; use as a context manager.

    Leaving it normally finishes the open shard; leaving it by an exception keeps the part for the next run.
    """

    def __init__(self, folder: Path, split: str, rank: int = 0, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.prefix = f"{split}-{rank:03d}"
        self.file: BinaryIO | None = None
        self.path: Path | None = None
        self.entries: list[Entry] = []
        parts = sorted(folder.glob(f"{self.prefix}-*{PART}"))
        for part in parts[:-1]:
            finish_part(part)
        if parts:
            self._open(parts[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self.file is not None:
            self.file.close()

    def add(self, latent_CT: np.ndarray, record: Mapping[str, Any]) -> Entry:
        """Append one clip. `record` needs a `key`; `frames` and `crc32` are added to it. Raises `DataError` when the
        disk is full or the folder cannot be written.
        """
        array = _array_bytes(latent_CT)
        whole = {**record, "frames": int(latent_CT.shape[1]), "crc32": zlib.crc32(array)}
        text = json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")
        needed = _padded(len(array)) + _padded(len(text)) + 4 * BLOCK
        try:
            if self.file is not None and self.file.tell() + needed > self.max_bytes:
                self.finish()
            if self.file is None:
                self._open(self._next_path())
            assert self.file is not None
            start = self.file.tell()
            _write_all(self.file, _member(f"{record['key']}.npy", array) + _member(f"{record['key']}.json", text))
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        entry = _entry(whole, start, len(array), len(text))
        self.entries.append(entry)
        return entry

    def finish(self) -> None:
        """Turn the open part into a finished shard; a part without a clip is removed."""
        if self.file is None or self.path is None:
            return
        self.file.close()
        finish_part(self.path, self.entries)
        self.file, self.path, self.entries = None, None, []

    def _open(self, path: Path) -> None:
        try:
            path.touch()
            self.entries, end = scan_latents(path)
            self.file, self.path = path.open("r+b", buffering=0), path
            self.file.truncate(end)
            self.file.seek(end)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error

    def _next_path(self) -> Path:
        taken = [int(p.name.split(".")[0].rsplit("-", 1)[1]) for p in self.folder.glob(f"{self.prefix}-*.tar*")]
        return self.folder / f"{self.prefix}-{max(taken, default=-1) + 1:05d}{PART}"


def finish_part(part: Path, entries: list[Entry] | None = None) -> Path | None:
    """Close the tar, write its listing, and rename it; returns the shard, or None when it held no whole clip."""
    found, end = scan_latents(part) if entries is None else (entries, part.stat().st_size)
    if not found:
        part.unlink()
        return None
    target = part.with_name(part.name.removesuffix(PART) + ".tar")
    try:
        with part.open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(bytes(2 * BLOCK))
            file.flush()
            os.fsync(file.fileno())
        write_listing(target, found)
        part.replace(target)
    except OSError as error:
        raise _cannot_write(part.parent, error) from error
    return target


def listing_path(shard: Path) -> Path:
    """The listing beside a shard: `train-000-00000.tar` → `train-000-00000.jsonl`."""
    return shard.with_suffix(".jsonl")


def write_listing(shard: Path, entries: list[Entry]) -> None:
    """Write the listing of `shard`, one JSON line a clip, in the order of the tar."""
    with atomic_path(listing_path(shard)) as path, path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")


def read_listing(shard: Path) -> Iterator[Entry]:
    """The clips of a finished shard; a listing that is missing or damaged is made again from the tar."""
    try:
        lines = listing_path(shard).read_text(encoding="utf-8").splitlines()
        entries = [Entry(**json.loads(line)) for line in lines]
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, TypeError):
        entries, _ = scan_latents(shard)
        write_listing(shard, entries)
    yield from entries


def read_array(path: Path, entry: Entry) -> np.ndarray | None:
    """The (C, T) array of an entry, or None when its bytes are no longer what they were."""
    try:
        with path.open("rb") as file:
            file.seek(entry.npy_at)
            content = file.read(entry.npy_size)
    except OSError:
        return None
    if zlib.crc32(content) != entry.record["crc32"]:
        return None
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def scan_latents(path: Path) -> tuple[list[Entry], int]:
    """The whole, undamaged clips at the head of a shard or part, and the byte where they end."""
    entries: list[Entry] = []
    end = 0
    with path.open("rb") as file:
        while True:
            array = _read_member(file, end)
            text = _read_member(file, array[2]) if array else None
            entry = _whole_entry(array, text) if array and text else None
            if entry is None or text is None:
                return entries, end
            entries.append(entry)
            end = text[2]


def _read_member(file: BinaryIO, at: int) -> tuple[str, bytes, int] | None:
    """Name, content and end of the member whose header is at `at`; None if it is not there in full."""
    file.seek(at)
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        return None
    content = file.read(_padded(header.size)) if 0 <= header.size <= MAX_SHARD_BYTES * 8 else b""
    if header.size <= 0 or len(content) < _padded(header.size):
        return None
    return header.name, content[: header.size], at + BLOCK + len(content)


def _whole_entry(array: tuple[str, bytes, int], text: tuple[str, bytes, int]) -> Entry | None:
    key = array[0].removesuffix(".npy")
    if array[0] != f"{key}.npy" or text[0] != f"{key}.json":
        return None
    try:
        record = json.loads(text[1])
        if record["key"] != key or record["crc32"] != zlib.crc32(array[1]):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    start = array[2] - _padded(len(array[1])) - BLOCK
    return _entry(record, start, len(array[1]), len(text[1]))


def _entry(record: dict[str, Any], start: int, npy: int, text: int) -> Entry:
    return Entry(record, start + BLOCK, npy, start + 2 * BLOCK + _padded(npy), text)


def _array_bytes(latent_CT: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(latent_CT, dtype=np.float16), allow_pickle=False)
    return buffer.getvalue()


def _member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + content.ljust(_padded(len(content)), b"\0")


def _write_all(file: BinaryIO, content: bytes) -> None:
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[file.write(remaining) :]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _cannot_write(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write shards in {folder}: {error.strerror or error}. What is encoded so far is kept; "
        f"free some space or mend the folder's permissions, then run the same command again."
    )
