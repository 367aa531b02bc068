"""Read latent shards: the latents of any clip in a folder or at a URL, at random, each checked as it is read.

Tensor names end in their axes: C latent channels, F latent frames.
"""

import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import DataError
from sa3train.core.log import get_logger
from sa3train.core.overrides import format_override
from sa3train.core.text import format_command
from sa3train.core.user_files import read_file, stat_file
from sa3train.data.shards.index import SILENCE_FILE, parse_index
from sa3train.data.sources.own_folders import INDEX_FILE, LATENTS, iterate_folders
from sa3train.data.sources.storage import read_remote_file, translate_errors

_logger = get_logger(__name__)

_OFFSETS = ("npy_offset", "npy_size", "json_offset", "json_size")
_COLUMNS = ("frames", "seconds", "crc32", *_OFFSETS)
_WRONG_HASH = "its bytes do not match the hash in index.json"


def check_not_audio(path: str, model: str = "MODEL") -> None:
    """Check that a path given for latents is not a folder of audio.

    Args:
        path: Folder of latent shards; a URL is left alone.
        model: The model to encode for, for the message.

    Raises:
        DataError: There is no index in it, but one below, or audio; with the command that encodes it.
    """
    if "://" in path or not Path(path).is_dir() or Path(path, INDEX_FILE).exists():
        return
    folders = list(iterate_folders([Path(path)]))
    if below := [folder.path for folder in folders if folder.own == LATENTS]:
        raise DataError(f"{path} is no folder of latents itself. Did you mean {below[0]}?")
    files = (name for folder in folders for name in folder.files)
    if any(Path(name).suffix.lower() in AUDIO_SUFFIXES for name in files):
        out = f"{Path(path).resolve().name}-latents" if Path("latents").exists() else "latents"
        settings = {"source": path, "out": out, "model": model}
        command = format_command(["sa3-encode", *(format_override(*each) for each in settings.items())])
        raise DataError(f"{path} is a folder of audio, not of latents. Encode it: {command}; then use {out}.")


class LatentStore:
    """The latents in a folder of shards: a table with one row for each augmentation of each clip.

    Attributes:
        path: Folder or URL.
        index: Content of `index.json`.
        shards: File names of the shards that are used.
        damaged: What is wrong with the shards that are left out, by file name.
        keys: Key of each row.
        clips: Clip of each row; rows of one clip differ in their augmentation.
        augmentations: "original", or how each row was augmented.
        split: (n,) "train" or "heldout".
        frames: (n,) length in latent frames.
        seconds: (n,) length in seconds.
        npy_offset: (n,) first byte of the latents in the shard.
        npy_size: (n,) size of the latents in bytes.
        json_offset: (n,) first byte of the record in the shard.
        json_size: (n,) size of the record in bytes.
        crc32: (n,) checksum of the latents.
        shard: (n,) index into `shards`.
    """

    frames: np.ndarray
    seconds: np.ndarray
    npy_offset: np.ndarray
    npy_size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    crc32: np.ndarray
    shard: np.ndarray

    def __init__(self, path: str | os.PathLike[str], *, verify: str = "size", allow_damaged: bool = False) -> None:
        """Open a folder of shards. Latents are checked as they are read, whatever `verify` says.

        Args:
            path: Folder, or any URL that fsspec opens (`memory://`, `http://`, `s3://`, `simplecache::https://…`).
            verify: What to check of the shards now: "size" (they exist and have the right size), "hash" (every byte,
                of silence.npy too), or "none".
            allow_damaged: Log damaged shards and leave them out, instead of raising an error.

        Raises:
            DataError: When there are no latents, or a shard is damaged.
        """
        self.path = os.fspath(path)
        if verify not in ("size", "hash", "none"):
            raise DataError(f"verify is {verify!r}; choose size, hash or none.")
        self._file_systems: dict[int, tuple[Any, str]] = {}
        file_system, root = self._open_file_system()
        self._root, self._is_local = root.rstrip("/"), isinstance(file_system, LocalFileSystem)
        self.index = parse_index(self._fetch(INDEX_FILE), self._join(INDEX_FILE))
        self.damaged: dict[str, str] = {}
        self.shards: list[str] = []
        self.keys: list[str] = []
        self.clips: list[str] = []
        self.augmentations: list[str] = []
        self._files: dict[tuple[int, int], int] = {}
        self._silence_CF: np.ndarray | None = None
        self._load(verify, allow_damaged)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_file_systems": {}}

    def list_rows(self, split: str) -> np.ndarray:
        """List the rows of one split.

        Args:
            split: "train" or "heldout".

        Returns:
            Row numbers in stored order.
        """
        return np.flatnonzero(self.split == split)

    def read_latents(self, row: int) -> np.ndarray:
        """Read the latents of one row. A `DataError` names shard and clip when they are damaged.

        Args:
            row: Row number.

        Returns:
            (C, F) float16.
        """
        return self._parse_latents(row, self._read(row, int(self.npy_offset[row]), int(self.npy_size[row])))

    def read_record(self, row: int) -> dict[str, Any]:
        """Read the record of one row.

        Args:
            row: Row number.

        Returns:
            Caption, tags, seconds, source and hashes.
        """
        return self._parse_record(row, self._read(row, int(self.json_offset[row]), int(self.json_size[row])))

    def read(self, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Read latents and record of one row at once.

        Args:
            row: Row number.

        Returns:
            (C, F) float16, and the record.
        """
        start, end = int(self.npy_offset[row]), int(self.json_offset[row] + self.json_size[row])
        content = self._read(row, start, end - start)
        latents_CF = self._parse_latents(row, content[: self.npy_size[row]])
        return latents_CF, self._parse_record(row, content[self.json_offset[row] - start :])

    def iterate_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Iterate over all records, from the listings: far quicker than reading each clip.

        Yields:
            (row number, record).
        """
        row = 0
        for shard in self.shards:
            for line in self._fetch(f"{shard.removesuffix('.tar')}.jsonl").splitlines():
                yield row, json.loads(line)["record"]
                row += 1

    def iterate_shard(self, number: int) -> Iterator[tuple[int, np.ndarray, dict[str, Any]]]:
        """Iterate over one shard, read from its first byte to its last. A `DataError` names what is damaged.

        Args:
            number: Index into `shards`.

        Yields:
            Row number, latents (C, F) float16, and the record of each clip.

        Raises:
            DataError: When the shard has other clips than its listing.
        """
        from webdataset.tariterators import group_by_keys, tar_file_expander

        rows = np.flatnonzero(self.shard == number).tolist()
        name = self._join(self.shards[number])
        with (
            translate_errors(f"cannot read {name}"),
            self._open_file_system()[0].open(f"{self._root}/{self.shards[number]}", "rb") as stream,
        ):
            samples = group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
            for row, sample in itertools.zip_longest(rows, samples):
                if row is None or sample is None or not {"npy", "json"} <= set(sample):
                    raise DataError(f"damaged shard {name}: it does not hold the {len(rows)} clips of its listing.")
                yield row, self._parse_latents(row, sample["npy"]), self._parse_record(row, sample["json"])

    def get_silence(self, frames: int) -> np.ndarray:
        """Get latents of silence.

        Args:
            frames: Number of frames.

        Returns:
            (C, frames) float16.
        """
        if self._silence_CF is None:
            content = self._fetch(SILENCE_FILE)
            try:
                self._silence_CF = np.load(io.BytesIO(content), allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise self._make_silence_error(f"it is not an array ({error})") from error
        silence_CF = self._silence_CF
        return silence_CF[:, np.arange(frames) % silence_CF.shape[1]]

    def get_shard_name(self, row: int) -> str:
        """Get the shard that contains a row.

        Args:
            row: Row number.

        Returns:
            Its file name.
        """
        return self.shards[self.shard[row]]

    def verify_shards(self) -> dict[str, str]:
        """Verify every byte of all shards and of the silence against `index.json`, and the listings against the shards.

        Returns:
            What is wrong, by file name; empty when everything is intact.
        """
        checked = {entry["file"]: self._find_fault(entry, "hash") for entry in self.index["shards"]}
        found = {name: fault for name, fault in checked.items() if fault}
        for row, listed in self.iterate_records():
            shard = self.get_shard_name(row)
            if shard not in found and not self._matches_listing(row, listed):
                found[shard] = f"its listing does not match its clip {self.keys[row]}"
        fault = self._find_silence_fault()
        return found | ({SILENCE_FILE: fault} if fault else {})

    def _find_silence_fault(self) -> str | None:
        if (silence := self.index.get("silence")) is None:
            return None
        try:
            is_intact = hashlib.sha256(self._fetch(SILENCE_FILE)).hexdigest() == silence.get("sha256")
        except DataError as error:
            return str(error)
        return None if is_intact else _WRONG_HASH

    def _make_silence_error(self, fault: str) -> DataError:
        return DataError(
            f"damaged {self._join(SILENCE_FILE)}: {fault}. Run the same sa3-encode command again to write it again."
        )

    def _matches_listing(self, row: int, listed: dict[str, Any]) -> bool:
        try:
            return self.read_record(row) == listed
        except DataError:
            return False

    def _load(self, verify: str, allow_damaged: bool) -> None:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_COLUMNS, "shard")}
        splits: list[np.ndarray] = []
        for entry in self.index["shards"]:
            fault = self._find_fault(entry, verify) or self._load_listing(entry, columns)
            if fault:
                self._refuse_shard(entry["file"], fault, allow_damaged)
                continue
            splits.append(np.full(entry["clips"], entry["split"]))
        if verify == "hash" and (fault := self._find_silence_fault()):
            raise self._make_silence_error(fault)
        for name, parts in columns.items():
            setattr(self, name, np.concatenate(parts) if parts else np.zeros(0, np.int64))
        self.split = np.concatenate(splits) if splits else np.zeros(0, "U1")

    def _load_listing(self, entry: dict[str, Any], columns: dict[str, list[np.ndarray]]) -> str | None:
        """Append one shard's clips to the columns; returns what is wrong with the listing, if anything."""
        try:
            lines = self._fetch(entry["listing"]).splitlines()
            rows = np.empty((len(lines), len(_COLUMNS)))
            names = []
            for number, line in enumerate(lines):
                fields = json.loads(line)
                record = fields["record"]
                rows[number] = [record["frames"], record["seconds"], record["crc32"], *(fields[n] for n in _OFFSETS)]
                names.append((record["key"], record["clip"], record["augmentation"]))
        except (DataError, ValueError, KeyError, TypeError) as error:
            return f"its listing {entry['listing']} is missing or damaged ({error})"
        if len(names) != entry["clips"]:
            return f"its listing has {len(names)} clips, index.json says {entry['clips']}"
        for name, values in zip(_COLUMNS, rows.T, strict=True):
            columns[name].append(values if name == "seconds" else values.astype(np.int64))
        columns["shard"].append(np.full(len(names), len(self.shards), np.int32))
        self.shards.append(entry["file"])
        # Equal names share one string: a million rows have to fit the memory.
        self.keys += [key for key, _, _ in names]
        self.clips += [key if clip == key else clip for key, clip, _ in names]
        self.augmentations += [sys.intern(augmentation) for _, _, augmentation in names]
        return None

    def _find_fault(self, entry: dict[str, Any], verify: str) -> str | None:
        if verify == "none":
            return None
        path = f"{self._root}/{entry['file']}"
        try:
            with translate_errors("cannot be read"):
                size = int(self._open_file_system()[0].info(path)["size"])
                if size != entry["bytes"]:
                    return f"has {size} bytes, index.json says {entry['bytes']}"
                if verify == "hash":
                    with self._open_file_system()[0].open(path, "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    return None if digest == entry["sha256"] else _WRONG_HASH
        except DataError as error:
            return str(error)
        return None

    def _refuse_shard(self, name: str, fault: str, allow_damaged: bool) -> None:
        message = f"damaged shard {self._join(name)}: {fault}"
        if not allow_damaged:
            raise DataError(
                f"{message}. Delete it and run the same sa3-encode command again (only its clips are encoded again), "
                f"or leave its clips out with allow_damaged=true."
            )
        self.damaged[name] = fault
        _logger.warning("Left out: %s", message)

    def _parse_latents(self, row: int, content: bytes) -> np.ndarray:
        if zlib.crc32(content) != self.crc32[row]:
            raise self._make_error(row, "its checksum does not match")
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        return array

    def _parse_record(self, row: int, content: bytes) -> dict[str, Any]:
        try:
            record = json.loads(content)
            key = record["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._make_error(row, "its record is not readable") from error
        if key != self.keys[row]:
            raise self._make_error(row, f"it is replaced by another record ({key})")
        return dict(record)

    def _make_error(self, row: int, fault: str) -> DataError:
        return DataError(
            f"clip {self.keys[row]} in shard {self._join(self.get_shard_name(row))} is damaged: {fault}. "
            f"List all damaged shards with: {format_command(['sa3-data', 'inspect', str(self.path), '--verify'])}"
        )

    def _read(self, row: int, start: int, size: int) -> bytes:
        number = int(self.shard[row])
        try:
            with translate_errors("cannot be read"):
                if self._is_local:
                    content = self._read_local(number, start, size)
                else:
                    path = f"{self._root}/{self.shards[number]}"
                    content = self._open_file_system()[0].cat_file(path, start=start, end=start + size)
        except DataError as error:
            raise self._make_error(row, str(error)) from error
        if len(content) > size:
            raise DataError(f"the server of {self.path} sends whole files only: use simplecache::{self.path} instead.")
        if len(content) < size:
            raise self._make_error(row, f"received {len(content)} of {size} bytes")
        return bytes(content)

    def _read_local(self, number: int, start: int, size: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows, where a file that stays open could not be replaced either
            return read_file(Path(self._root) / self.shards[number], start, size)
        return os.pread(self._get_descriptor(number), size, start)

    def _open_file_system(self) -> tuple[Any, str]:
        """The file system and the folder's path in it, one for each process: fsspec's do not survive a fork."""
        pid = os.getpid()
        if pid not in self._file_systems:
            with translate_errors(f"cannot open {self.path}"):
                self._file_systems[pid] = fsspec.core.url_to_fs(self.path)
        return self._file_systems[pid]

    def _get_descriptor(self, number: int) -> int:
        """An open file for a shard, one for each process (a forked worker must not share it)."""
        slot = (os.getpid(), number)
        if slot not in self._files:
            stat_file(Path(self._root) / self.shards[number])
            self._files[slot] = os.open(Path(self._root) / self.shards[number], os.O_RDONLY)
        return self._files[slot]

    def _fetch(self, name: str) -> bytes:
        try:
            with translate_errors(f"cannot read {self._join(name)}"):
                path = f"{self._root}/{name}"
                return read_file(path) if self._is_local else read_remote_file(self._open_file_system()[0], path)
        except DataError as error:
            if self._is_local and name == INDEX_FILE:
                check_not_audio(self.path)
            advice = "Give a folder of latent shards made by sa3-encode; if that was interrupted, run it again."
            raise DataError(f"{error}. {advice}") from error

    def _join(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"
