"""Reading latent shards: every clip of a folder or URL by number, at random, each checked as it is read.

Tensor names end in their axes: C latent channels, T latent frames.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from sa3train.core.errors import DataError
from sa3train.core.files import sha256_of
from sa3train.core.log import get_logger
from sa3train.data.shards.index import INDEX, SILENCE, parse_index
from sa3train.data.sources.storage import reaching

_logger = get_logger(__name__)

_PLACED = ("npy_at", "npy_size", "json_at", "json_size")
_LISTED = ("frames", "seconds", "crc32", *_PLACED)


class LatentStore:
    """The clips of a folder of shards. One row is one take of a clip; rows of one clip differ in their view.

    `path` is a folder or any fsspec URL (`memory://`, `http://`, `s3://`, `simplecache::https://…`). Shards are checked
    at opening as `verify` says: `size` (there, and of the right size), `hash` (every byte, of silence.npy too), or
    `none`. A damaged shard is a `DataError` that names it, unless `allow_damaged`: then it is named in the log, left
    out, and listed in `.damaged`. Every clip is checked as it is read, whatever `verify` says.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: str = "size", allow_damaged: bool = False) -> None:
        self.path = os.fspath(path)
        if verify not in ("size", "hash", "none"):
            raise DataError(f"verify is {verify!r}; choose size, hash or none.")
        self._remote, self._root = _locate(self.path)
        self.index = parse_index(self._fetch(INDEX), self._place(INDEX))
        self.damaged: dict[str, str] = {}
        self.shards: list[str] = []
        self._files: dict[tuple[int, int], int] = {}
        self._silence_CT: np.ndarray | None = None
        self._load(verify, allow_damaged)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split (`train` or `heldout`), in stored order."""
        return np.flatnonzero(self.split == split)

    def latent(self, row: int) -> np.ndarray:
        """(C, T) float16 latents of one row. Raises `DataError` naming shard and clip when the bytes are damaged."""
        return self._array(row, self._read(row, int(self.npy_at[row]), int(self.npy_size[row])))

    def record(self, row: int) -> dict[str, Any]:
        """The record of one row: caption, tags, seconds, source and hashes."""
        return self._record(row, self._read(row, int(self.json_at[row]), int(self.json_size[row])))

    def read(self, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Latents and record of one row, in one read."""
        start, end = int(self.npy_at[row]), int(self.json_at[row] + self.json_size[row])
        both = self._read(row, start, end - start)
        return self._array(row, both[: self.npy_size[row]]), self._record(row, both[self.json_at[row] - start :])

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, record) of every row, from the listings: far quicker than reading each clip."""
        row = 0
        for shard in self.shards:
            for line in self._fetch(f"{shard.removesuffix('.tar')}.jsonl").splitlines():
                yield row, json.loads(line)["record"]
                row += 1

    def silence(self, frames: int, start: int = 0) -> np.ndarray:
        """(C, frames) float16: what the autoencoder makes of silence, from latent frame `start` on."""
        if self._silence_CT is None:
            content = self._fetch(SILENCE)
            try:
                self._silence_CT = np.load(io.BytesIO(content), allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise self._bad_silence(f"it is no array ({error})") from error
        silence_CT = self._silence_CT
        return silence_CT[:, np.arange(start, start + frames) % silence_CT.shape[1]]

    def shard_of(self, row: int) -> str:
        """File name of the shard that holds `row`."""
        return self.shards[self.shard[row]]

    def verify_shards(self) -> dict[str, str]:
        """Check every byte of every shard and of the silence against `index.json`, and the listings against the shards:
        name → what is wrong, empty when all is well.
        """
        checked = {entry["file"]: self._fault(entry, "hash") for entry in self.index["shards"]}
        found = {name: fault for name, fault in checked.items() if fault}
        for row, listed in self.records():
            shard = self.shard_of(row)
            if shard not in found and not self._is_listed(row, listed):
                found[shard] = f"its listing says otherwise than it does of clip {self.keys[row]}"
        fault = self._silence_fault()
        return found | ({SILENCE: fault} if fault else {})

    def _silence_fault(self) -> str | None:
        if (silence := self.index.get("silence")) is None:
            return None
        try:
            whole = hashlib.sha256(self._fetch(SILENCE)).hexdigest() == silence["sha256"]
        except DataError as error:
            return str(error)
        return None if whole else "its bytes are not those that index.json has the hash of"

    def _bad_silence(self, fault: str) -> DataError:
        return DataError(
            f"damaged {self._place(SILENCE)}: {fault}. Run the same sa3-encode command again, which makes it anew."
        )

    def _is_listed(self, row: int, listed: dict[str, Any]) -> bool:
        try:
            return self.record(row) == listed
        except DataError:
            return False

    def _load(self, verify: str, allow_damaged: bool) -> None:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_LISTED, "shard")}
        splits: list[np.ndarray] = []
        self.keys: list[str] = []
        self.clips: list[str] = []
        self.views: list[str] = []
        for entry in self.index["shards"]:
            fault = self._fault(entry, verify) or self._load_listing(entry, columns)
            if fault:
                self._refuse(entry["file"], fault, allow_damaged)
                continue
            splits.append(np.full(entry["clips"], entry["split"]))
        if verify == "hash" and (silent := self._silence_fault()):
            raise self._bad_silence(silent)
        for name, parts in columns.items():
            setattr(self, name, np.concatenate(parts) if parts else np.zeros(0, np.int64))
        self.split = np.concatenate(splits) if splits else np.zeros(0, "U1")

    frames: np.ndarray
    seconds: np.ndarray
    npy_at: np.ndarray
    npy_size: np.ndarray
    json_at: np.ndarray
    json_size: np.ndarray
    crc32: np.ndarray
    shard: np.ndarray

    def _load_listing(self, entry: dict[str, Any], columns: dict[str, list[np.ndarray]]) -> str | None:
        """Append one shard's clips to the columns; returns what is wrong with the listing, if anything."""
        try:
            lines = self._fetch(entry["listing"]).splitlines()
            rows = np.empty((len(lines), len(_LISTED)))
            names = []
            for number, line in enumerate(lines):
                fields = json.loads(line)
                record = fields["record"]
                rows[number] = [record["frames"], record["seconds"], record["crc32"], *(fields[n] for n in _PLACED)]
                names.append((record["key"], record["clip"], record["view"]))
        except (DataError, ValueError, KeyError, TypeError) as error:
            return f"its listing {entry['listing']} is missing or damaged ({error})"
        if len(names) != entry["clips"]:
            return f"its listing has {len(names)} clips, index.json says {entry['clips']}"
        for name, values in zip(_LISTED, rows.T, strict=True):
            columns[name].append(values if name == "seconds" else values.astype(np.int64))
        columns["shard"].append(np.full(len(names), len(self.shards), np.int32))
        self.shards.append(entry["file"])
        self.keys += [key for key, _, _ in names]
        self.clips += [key if clip == key else clip for key, clip, _ in names]
        self.views += [view if view != "original" else "original" for _, _, view in names]
        return None

    def _fault(self, entry: dict[str, Any], verify: str) -> str | None:
        name = entry["file"]
        if verify == "none":
            return None
        try:
            with reaching("cannot be read"):
                size = self._size(name)
                if size != entry["bytes"]:
                    return f"has {size} bytes, index.json says {entry['bytes']}"
                if verify == "hash" and self._sha256(name) != entry["sha256"]:
                    return "its bytes are not those that index.json has the hash of"
        except DataError as error:
            return str(error)
        return None

    def _refuse(self, name: str, fault: str, allow_damaged: bool) -> None:
        message = f"damaged shard {self._place(name)}: {fault}"
        if not allow_damaged:
            raise DataError(
                f"{message}. Delete it and run the same sa3-encode command again (only its clips are encoded anew), "
                f"or leave its clips out with allow_damaged=true."
            )
        self.damaged[name] = fault
        _logger.warning("left out: %s", message)

    def _array(self, row: int, content: bytes) -> np.ndarray:
        if zlib.crc32(content) != self.crc32[row]:
            raise self._damaged(row, "its checksum does not match")
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        return array

    def _record(self, row: int, content: bytes) -> dict[str, Any]:
        try:
            record = json.loads(content)
            if record["key"] != self.keys[row]:
                raise self._damaged(row, f"another record ({record['key']}) is in its place")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(row, "its record is not readable") from error
        return dict(record)

    def _damaged(self, row: int, fault: str) -> DataError:
        return DataError(
            f"clip {self.keys[row]} in shard {self._place(self.shard_of(row))} is damaged: {fault}. "
            f"See which shards are with: sa3-data inspect {self.path} --verify"
        )

    def _read(self, row: int, start: int, size: int) -> bytes:
        number = int(self.shard[row])
        try:
            with reaching("cannot be read"):
                if self._remote is None:
                    content = os.pread(self._descriptor(number), size, start)
                else:
                    whole = f"{self._root}/{self.shards[number]}"
                    content = self._remote.cat_file(whole, start=start, end=start + size)
        except DataError as error:
            raise self._damaged(row, str(error)) from error
        if len(content) > size:
            raise DataError(f"the server of {self.path} sends whole files only: give simplecache::{self.path} instead.")
        if len(content) < size:
            raise self._damaged(row, f"{len(content)} bytes came for {size}")
        return bytes(content)

    def _descriptor(self, number: int) -> int:
        """An open file for a shard, one for each process (a forked worker must not share it)."""
        slot = (os.getpid(), number)
        if slot not in self._files:
            self._files[slot] = os.open(Path(self._root) / self.shards[number], os.O_RDONLY)
        return self._files[slot]

    def _fetch(self, name: str) -> bytes:
        try:
            with reaching(f"cannot read {self._place(name)}"):
                if self._remote is None:
                    return (Path(self._root) / name).read_bytes()
                return bytes(self._remote.cat_file(f"{self._root}/{name}"))
        except DataError as error:
            raise DataError(
                f"{error}. "
                f"Give a folder of latent shards as sa3-encode makes it; if it was cut short, run it again first."
            ) from error

    def _size(self, name: str) -> int:
        if self._remote is None:
            return (Path(self._root) / name).stat().st_size
        return int(self._remote.info(f"{self._root}/{name}")["size"])

    def _sha256(self, name: str) -> str:
        if self._remote is None:
            return sha256_of(Path(self._root) / name)
        with self._remote.open(f"{self._root}/{name}", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _place(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"


def _locate(path: str) -> tuple[Any | None, str]:
    """(file system, root) for a URL, (None, folder) for a local path."""
    if "://" not in path and "::" not in path:
        return None, path
    if path.startswith("file://"):
        return None, path.removeprefix("file://")
    with reaching(f"cannot open {path}"):
        remote, root = fsspec.core.url_to_fs(path)
    return remote, root.rstrip("/")
