"""`index.json`: what a folder of latent shards contains, made by which autoencoder with which settings."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sa3train.core.config import build, setting
from sa3train.core.errors import ConfigError, DataError
from sa3train.core.files import hash_file, write_json
from sa3train.core.user_files import read_file
from sa3train.data.shards.shard_file import ShardEntry, get_listing_path, read_listing
from sa3train.data.sources.own_folders import INDEX_FILE

SILENCE_FILE = "silence.npy"

_FORMAT = "sa3train-latents"
_VERSION = 2
"""Raise it when shards or the index change in a way that older versions would misread."""
_OUTDATED = ".encode/outdated.json"
_SHARD = re.compile(r"[a-z]+-\d{3,}-\d{5,}\.tar")
_LARGEST = 10**15


@dataclass(frozen=True)
class _Model:
    name: str = setting(help="Model whose autoencoder made the latents.", text="filled")
    fingerprint: str = setting(help="Hash of its weights.", text="filled")
    sample_rate: int = setting(help="Of its audio.", unit="Hz", min=1, max=10**6)
    downsampling_ratio: int = setting(help="Samples per latent frame.", min=1, max=10**6)


@dataclass(frozen=True)
class _Shard:
    file: str = setting(help="File name.", text="filled")
    listing: str = setting(help="File name of its listing.", text="filled")
    split: Literal["train", "heldout"] = setting(help="Split of its clips.")
    clips: int = setting(help="Clips in it.", min=0, max=_LARGEST)
    frames: int = setting(help="Latent frames in it.", min=0, max=_LARGEST)
    seconds: float = setting(help="Length of its clips.", unit="seconds", min=0, max=_LARGEST)
    bytes: int = setting(help="Size of the file.", min=0, max=_LARGEST)
    sha256: str = setting(help="Hash of the file.", text="filled")


@dataclass(frozen=True)
class _Silence:
    file: Literal["silence.npy"] = setting(help="File name.")
    sha256: str = setting(help="Hash of the file.", text="filled")


@dataclass(frozen=True)
class _Index:
    clips: int = setting(help="All clips.", min=0, max=_LARGEST)
    frames: int = setting(help="All latent frames.", min=0, max=_LARGEST)
    seconds: float = setting(help="Length of all clips.", unit="seconds", min=0, max=_LARGEST)
    manifest: str = setting(help="Hash of all clips.", text="filled")
    splits: dict[str, dict[str, float]] = setting(help="The same counts by split.", min=0, max=_LARGEST)
    model: _Model = setting(help="Whose autoencoder made the latents.")
    shards: list[_Shard] = setting(help="The shards.", items=(0, 10**7))
    rejected: int = setting(help="Rejected clips.", min=0, max=_LARGEST)
    silence: _Silence | None = setting(help="Latents of silence.")


def list_shards(folder: Path) -> list[Path]:
    """List the finished shards of a folder, without those that a running encode replaces.

    Args:
        folder: Folder of shards.

    Returns:
        Paths in order of name.
    """
    outdated = list_outdated_shards(folder)
    return [path for path in sorted(folder.glob("*.tar")) if _SHARD.fullmatch(path.name) and path.name not in outdated]


def list_outdated_shards(folder: Path) -> list[str]:
    """List shards that stay until a new index is written, for the current index and for their latents.

    Args:
        folder: Folder of shards.

    Returns:
        File names.

    Raises:
        DataError: When the list is damaged.
    """
    try:
        names = json.loads(read_file(folder / _OUTDATED))
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise DataError(
            f"{folder / _OUTDATED} is damaged ({error}): delete it and {folder / INDEX_FILE}, and encode again."
        ) from error
    return [str(name) for name in names]


def mark_outdated(folder: Path, shards: Iterable[Path]) -> None:
    """Mark shards as outdated.

    Args:
        folder: Folder of shards.
        shards: Shards to mark in addition to those already marked.
    """
    write_json(folder / _OUTDATED, sorted({*list_outdated_shards(folder), *(shard.name for shard in shards)}))


def remove_outdated(folder: Path) -> None:
    """Remove the outdated shards, once an index without them is written.

    Args:
        folder: Folder of shards.
    """
    for name in list_outdated_shards(folder):
        (folder / name).unlink(missing_ok=True)
        get_listing_path(folder / name).unlink(missing_ok=True)
    (folder / _OUTDATED).unlink(missing_ok=True)


def build_index(folder: Path, settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Describe every finished shard of a folder and write `index.json`.

    The `manifest` hash covers the latents and record of every clip, however they are distributed over shards.

    Args:
        folder: Folder of shards.
        settings: What the latents depend on, including the `model` section.
        extra: Further keys.

    Returns:
        Content of `index.json`.
    """
    shards, digests = [], []
    for shard in list_shards(folder):
        entries = list(read_listing(shard))
        shards.append(_describe_shard(shard, entries))
        digests += [hashlib.sha256(f"{e.key} {e.digest} {e.record['crc32']}".encode()).digest() for e in entries]
    splits = _count_splits(shards)
    index = {
        "format": _FORMAT,
        "version": _VERSION,
        **_sum_counts(splits.values()),
        "manifest": hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
        "splits": splits,
        **settings,
        **extra,
        "shards": shards,
    }
    write_json(folder / INDEX_FILE, index)
    return index


def _get_split(name: str) -> str:
    return name.rsplit("-", 2)[0]  # train-000-00001.tar


def _describe_shard(shard: Path, entries: Iterable[ShardEntry]) -> dict[str, Any]:
    records = [entry.record for entry in entries]
    return {
        "file": shard.name,
        "listing": get_listing_path(shard).name,
        "split": _get_split(shard.name),
        "clips": len(records),
        "frames": sum(int(record["frames"]) for record in records),
        "seconds": round(sum(float(record["seconds"]) for record in records), 6),
        "bytes": shard.stat().st_size,
        "sha256": hash_file(shard),
    }


def _count_splits(shards: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    of_split: dict[str, list[Mapping[str, Any]]] = {}
    for shard in shards:
        of_split.setdefault(shard["split"], []).append(shard)
    return {split: _sum_counts(those) for split, those in of_split.items()}


def _sum_counts(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    those = list(parts)
    return {name: round(sum(part[name] for part in those), 6) for name in ("clips", "frames", "seconds")}


def parse_index(text: bytes, path: str) -> dict[str, Any]:
    """Parse the content of `index.json`.

    Args:
        text: The file's bytes.
        path: Its path or URL, for messages.

    Returns:
        The index.

    Raises:
        DataError: When it is damaged, has a wrong value or was written by another version.
    """
    again = "run the same sa3-encode command again to rewrite it."
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): {again}") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise DataError(f"{path} is not an index of latent shards. Make one with: sa3-encode source=DIR out=DIR")
    if index.get("version") != _VERSION:
        raise DataError(
            f"{path} has index version {index.get('version')!r}, this sa3train reads version {_VERSION}. "
            f"Encode the source again, or use the sa3train that wrote it ({index.get('made_by', 'unknown')})."
        )
    try:
        content = build(_Index, {"rejected": 0, "silence": None, **index}, ignore_unknown=True)
    except ConfigError as error:
        raise DataError(f"{path} is damaged: {error} {again.capitalize()}") from error
    if len({shard.file for shard in content.shards}) < len(content.shards):
        raise DataError(f"{path} is damaged: it names a shard twice. {again.capitalize()}")
    splits = _count_splits(map(asdict, content.shards))
    for name, stated, counted in (
        *((f"splits.{split}", content.splits.get(split), splits.get(split)) for split in {**splits, **content.splits}),
        ("clips, frames and seconds", asdict(content), _sum_counts(splits.values())),
    ):
        if not _agrees(stated or {}, counted or {}):
            raise DataError(f"{path} is damaged: {name} are not those of its shards. {again.capitalize()}")
    for shard in content.shards:
        if (
            not _SHARD.fullmatch(shard.file)
            or shard.listing != get_listing_path(Path(shard.file)).name
            or shard.split != _get_split(shard.file)
        ):
            raise DataError(
                f"{path} is damaged: {shard.file} or {shard.listing} is no shard of {shard.split}. {again.capitalize()}"
            )
    return {**index, "shards": [asdict(shard) for shard in content.shards]}


def _agrees(stated: Mapping[str, Any], counted: Mapping[str, float]) -> bool:
    return bool(counted) and all(math.isclose(stated.get(name, -1), counted[name], abs_tol=0.01) for name in counted)


def check_autoencoder(index: Mapping[str, Any], name: str, fingerprint: str, path: str) -> None:
    """Check that latents were made by an autoencoder.

    Args:
        index: Content of `index.json`.
        name: Name of the model to use.
        fingerprint: Fingerprint of its autoencoder.
        path: Path or URL of the latents, for messages.

    Raises:
        DataError: When another autoencoder made them, naming both models.
    """
    made_with = index["model"]
    if made_with["fingerprint"] != fingerprint:
        raise DataError(
            f"the latents in {path} were made by the autoencoder of '{made_with['name']}' "
            f"(weights {made_with['fingerprint'][:12]}), but '{name}' has another (weights {fingerprint[:12]}). "
            f"Encode again with model={name}, or train with model={made_with['name']}."
        )


@dataclass(frozen=True)
class DataSummary:
    """A summary of an `index.json`.

    Attributes:
        clips: Number of training latents.
        seconds: Their length in seconds.
        heldout: Number of held-out latents.
        model: Name of the model whose autoencoder made them.
        rejected: Number of rejected clips.
        frames: Number of training frames.
    """

    clips: int
    seconds: float
    heldout: int
    model: str
    rejected: int
    frames: int


def summarize_data(data: Path) -> DataSummary:
    """Summarize a folder of latents.

    Args:
        data: Folder of shards.

    Returns:
        The summary.

    Raises:
        DataError: When it contains no latents.
    """
    path = data / INDEX_FILE
    if not path.is_file():
        raise DataError(f"{data} contains no latents ({INDEX_FILE}): encode a folder of audio first, on the Data page.")
    index = parse_index(path.read_bytes(), str(path))
    train, heldout = (index["splits"].get(split, {}) for split in ("train", "heldout"))
    return DataSummary(
        int(train.get("clips", 0)),
        float(train.get("seconds", 0.0)),
        int(heldout.get("clips", 0)),
        str(index["model"].get("name", "")),
        int(index.get("rejected", 0)),
        int(train.get("frames", 0)),
    )
