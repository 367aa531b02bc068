"""Write latent shards: ordinary WebDataset tars (`<key>.npy`, `<key>.json`), so that a killed process loses nothing.

A shard is first `NAME.tar.part`, to which clips are appended, array first and record second: a complete record means a
complete clip. Opening a writer recovers the part of an earlier run and cuts off an incomplete clip. A full shard gets
its listing (`NAME.jsonl`, one line per clip with its offsets in the tar) and is then renamed to `NAME.tar`. This
recovery is why `webdataset.ShardWriter` is not used.
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
from sa3train.core.files import replace_file, replace_path

_BLOCK = 512
_MAX_BYTES = 512_000_000
PART, STALE = ".tar.part", ".tar.stale"


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


class ShardWriter:
    """Appends clips to the shards of one split and one process; use as a context manager.

    Leaving it finishes the open shard; leaving it by an exception keeps the part for the next run.

    Attributes:
        folder: Folder of the shards.
        max_bytes: Largest shard in bytes.
        prefix: Start of the shards' file names.
    """

    def __init__(self, folder: Path, split: str, rank: int = 0, max_bytes: int = _MAX_BYTES) -> None:
        """Open a writer, and recover what an earlier run left.

        Args:
            folder: Folder of the shards.
            split: "train" or "heldout".
            rank: Number of this process.
            max_bytes: Largest shard in bytes.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self.prefix = f"{split}-{rank:03d}"
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._entries: list[ShardEntry] = []
        parts = sorted(folder.glob(f"{self.prefix}-*{PART}"))
        for part in parts[:-1]:
            finish_shard(part)
        if parts:
            self._open(parts[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._file is not None:
            self._file.close()

    def add(self, latents_CF: np.ndarray, record: Mapping[str, Any]) -> ShardEntry:
        """Append one clip.

        Args:
            latents_CF: (C, F) latents.
            record: Its record, with a `key`; `frames` and `crc32` are added.

        Returns:
            Its position in the shard.

        Raises:
            DataError: When the disk is full or the folder cannot be written.
        """
        array = _serialize_array(latents_CF)
        whole = {**record, "frames": int(latents_CF.shape[1]), "crc32": zlib.crc32(array)}
        text = json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")
        needed = _pad(len(array)) + _pad(len(text)) + 4 * _BLOCK
        try:
            if self._file is not None and self._file.tell() + needed > self.max_bytes:
                self.finish()
            if self._file is None:
                self._open(self._next_path())
            assert self._file is not None
            start = self._file.tell()
            _write_all(
                self._file, _make_member(f"{record['key']}.npy", array) + _make_member(f"{record['key']}.json", text)
            )
        except OSError as error:
            raise _describe_write_error(self.folder, error) from error
        entry = _make_entry(whole, start, len(array), len(text))
        self._entries.append(entry)
        return entry

    def finish(self) -> None:
        """Finish the open shard; a part without a clip is removed."""
        if self._file is None or self._path is None:
            return
        self._file.close()
        finish_shard(self._path, self._entries)
        self._file, self._path, self._entries = None, None, []

    def _open(self, path: Path) -> None:
        try:
            path.touch()
            self._entries, end = scan_shard(path)
            self._file, self._path = path.open("r+b", buffering=0), path
            self._file.truncate(end)
            self._file.seek(end)
        except OSError as error:
            raise _describe_write_error(self.folder, error) from error

    def _next_path(self) -> Path:
        taken = [int(p.name.split(".")[0].rsplit("-", 1)[1]) for p in self.folder.glob(f"{self.prefix}-*.tar*")]
        return self.folder / f"{self.prefix}-{max(taken, default=-1) + 1:05d}{PART}"


def finish_shard(part: Path, entries: list[ShardEntry] | None = None) -> Path | None:
    """Finish a part: close the tar, write its listing, and rename it.

    Args:
        part: Path of the part.
        entries: Its clips; None to scan it.

    Returns:
        The shard, or None when it contained no complete clip.

    Raises:
        DataError: When it cannot be written.
    """
    found, end = scan_shard(part) if entries is None else (entries, part.stat().st_size)
    if not found:
        part.unlink()
        return None
    target = part.with_name(part.name.removesuffix(PART) + ".tar")
    try:
        with part.open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(bytes(2 * _BLOCK))
            file.flush()
            os.fsync(file.fileno())
        write_listing(target, found)
        replace_path(part, target)
    except OSError as error:
        raise _describe_write_error(part.parent, error) from error
    return target


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
        header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        return None
    content = file.read(_pad(header.size)) if 0 <= header.size <= _MAX_BYTES * 8 else b""
    if header.size <= 0 or len(content) < _pad(header.size):
        return None
    return header.name, content[: header.size], start + _BLOCK + len(content)


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
    start = array[2] - _pad(len(array[1])) - _BLOCK
    return _make_entry(record, start, len(array[1]), len(text[1]))


def _make_entry(record: dict[str, Any], start: int, npy: int, text: int) -> ShardEntry:
    return ShardEntry(record, start + _BLOCK, npy, start + 2 * _BLOCK + _pad(npy), text)


def _serialize_array(latents_CF: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(latents_CF, dtype=np.float16), allow_pickle=False)
    return buffer.getvalue()


def _make_member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + content.ljust(_pad(len(content)), b"\0")


def _write_all(file: BinaryIO, content: bytes) -> None:
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[file.write(remaining) :]


def _pad(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _describe_write_error(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write shards in {folder}: {error.strerror or error}. What is encoded so far is kept; "
        f"free some space or fix the folder's permissions, then run the same command again."
    )
