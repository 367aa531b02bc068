"""Write latent shards: ordinary WebDataset tars (`shard_file`), so that a killed process loses nothing.

A shard is first `NAME.tar.part`, to which clips are appended, array first and record second: a complete record means a
complete clip. Opening a writer recovers the part of an earlier run and cuts off an incomplete clip. A full shard gets
its listing (`NAME.jsonl`, one line per clip with its offsets in the tar) and is then renamed to `NAME.tar`. This
recovery is why `webdataset.ShardWriter` is not used.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from sa3train.core.errors import DataError
from sa3train.core.files import replace_path
from sa3train.data.shards.shard_file import BLOCK, MAX_BYTES, ShardEntry, make_entry, pad, scan_shard, write_listing

PART, STALE = ".tar.part", ".tar.stale"


class ShardWriter:
    """Appends clips to the shards of one split and one process; use as a context manager.

    Leaving it finishes the open shard; leaving it by an exception keeps the part for the next run.

    Attributes:
        folder: Folder of the shards.
        max_bytes: Largest shard in bytes.
        prefix: Start of the shards' file names.
    """

    def __init__(self, folder: Path, split: str, rank: int = 0, max_bytes: int = MAX_BYTES) -> None:
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
        needed = pad(len(array)) + pad(len(text)) + 4 * BLOCK
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
        entry = make_entry(whole, start, len(array), len(text))
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
            file.write(bytes(2 * BLOCK))
            file.flush()
            os.fsync(file.fileno())
        write_listing(target, found)
        replace_path(part, target)
    except OSError as error:
        raise _describe_write_error(part.parent, error) from error
    return target


def _serialize_array(latents_CF: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(latents_CF, dtype=np.float16), allow_pickle=False)
    return buffer.getvalue()


def _make_member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + content.ljust(pad(len(content)), b"\0")


def _write_all(file: BinaryIO, content: bytes) -> None:
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[file.write(remaining) :]


def _describe_write_error(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write shards in {folder}: {error.strerror or error}. What is encoded so far is kept; "
        f"free some space or fix the folder's permissions, then run the same command again."
    )
