"""`index.json`: what a folder of latent shards holds, made by which autoencoder with which settings."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3train.core.errors import DataError
from sa3train.core.files import sha256_of, write_json
from sa3train.data.shards.writer import Entry, listing_path, read_listing

FORMAT = "sa3train-latents"
VERSION = 1
INDEX = "index.json"
SILENCE = "silence.npy"


_OUTDATED = ".encode/outdated.json"
_SHARD = re.compile(r"[a-z]+-\d{3,}-\d{5,}\.tar")


def shard_files(folder: Path) -> list[Path]:
    """The finished shards of a folder, in order of name, without those that a run under way is replacing."""
    outdated = outdated_shards(folder)
    return [path for path in sorted(folder.glob("*.tar")) if _SHARD.fullmatch(path.name) and path.name not in outdated]


def outdated_shards(folder: Path) -> list[str]:
    """Names of shards that stay, for the index there is and for their latents, until a new index is written."""
    try:
        names = json.loads((folder / _OUTDATED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise DataError(
            f"{folder / _OUTDATED} is damaged ({error}): delete it and {folder / INDEX}, encode again."
        ) from error
    return [str(name) for name in names]


def mark_outdated(folder: Path, shards: Iterable[Path]) -> None:
    """Add to `outdated_shards`."""
    write_json(folder / _OUTDATED, sorted({*outdated_shards(folder), *(shard.name for shard in shards)}))


def remove_outdated(folder: Path) -> None:
    """Delete the outdated shards, once an index without them is written."""
    for name in outdated_shards(folder):
        (folder / name).unlink(missing_ok=True)
        listing_path(folder / name).unlink(missing_ok=True)
    (folder / _OUTDATED).unlink(missing_ok=True)


def split_of(shard: Path) -> str:
    """`train-000-00001.tar` → `train`."""
    return shard.name.rsplit("-", 2)[0]


def build_index(folder: Path, settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Describe every finished shard of `folder` and write `index.json`.

    `settings` is what the latents depend on (the `model` section among it); `extra` is added as it is. The `manifest`
    hash covers every clip's latent and record and does not depend on how they are spread over shards.
    """
    shards, digests = [], []
    splits: dict[str, dict[str, float]] = {}
    for shard in shard_files(folder):
        entries = list(read_listing(shard))
        described = _describe(shard, entries)
        shards.append(described)
        total = splits.setdefault(described["split"], {"clips": 0, "frames": 0, "seconds": 0.0})
        for name in total:
            total[name] = round(total[name] + described[name], 6)
        digests += [hashlib.sha256(f"{e.key} {e.digest} {e.record['crc32']}".encode()).digest() for e in entries]
    sums = {name: round(sum(split[name] for split in splits.values()), 6) for name in ("clips", "frames", "seconds")}
    index = {
        "format": FORMAT,
        "version": VERSION,
        **sums,
        "manifest": hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
        "splits": splits,
        **settings,
        **extra,
        "shards": shards,
    }
    write_json(folder / INDEX, index)
    return index


def _describe(shard: Path, entries: Iterable[Entry]) -> dict[str, Any]:
    records = [entry.record for entry in entries]
    return {
        "file": shard.name,
        "listing": listing_path(shard).name,
        "split": split_of(shard),
        "clips": len(records),
        "frames": sum(int(record["frames"]) for record in records),
        "seconds": round(sum(float(record["seconds"]) for record in records), 6),
        "bytes": shard.stat().st_size,
        "sha256": sha256_of(shard),
    }


def check_index(index: Any, where: str) -> dict[str, Any]:
    """`index` if it is one that this version reads; `DataError` otherwise."""
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{where} is not an index of latent shards. Make one with: sa3-encode source=DIR out=DIR")
    if index.get("version") != VERSION:
        raise DataError(
            f"{where} has index version {index.get('version')}, this sa3train reads version {VERSION}. "
            f"Encode the source again, or use the sa3train that made it ({index.get('made_by', 'unknown')})."
        )
    missing = [name for name in ("model", "shards", "splits", "manifest") if name not in index]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}: run the same sa3-encode command again to rewrite it.")
    return index


def parse_index(text: bytes, where: str) -> dict[str, Any]:
    """Read `index.json`'s bytes; `DataError` when they are damaged or of another format."""
    try:
        return check_index(json.loads(text), where)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where} is damaged ({error}): run the same sa3-encode command again to rewrite it."
        ) from error


def check_autoencoder(index: Mapping[str, Any], name: str, fingerprint: str, where: str) -> None:
    """Raise `DataError`, naming both models, unless the latents were made by the autoencoder with this fingerprint."""
    made_with = index["model"]
    if made_with["fingerprint"] != fingerprint:
        raise DataError(
            f"the latents in {where} were made by the autoencoder of '{made_with['name']}' "
            f"(weights {made_with['fingerprint'][:12]}), but '{name}' has another (weights {fingerprint[:12]}). "
            f"Encode again with model={name}, or train with model={made_with['name']}."
        )


@dataclass(frozen=True)
class DataSummary:
    """What an `index.json` says: clips and seconds of each split, and whose autoencoder made it."""

    clips: int
    seconds: float
    heldout: int
    heldout_seconds: float
    model: str
    rejected: int
    frames: int


def summarise(data: Path) -> DataSummary:
    """What lies in a folder of latents. Raises `DataError` when it holds none."""
    path = data / INDEX
    if not path.is_file():
        raise DataError(f"{data} holds no latents ({INDEX}): encode a folder of audio first, on the Data page.")
    index = parse_index(path.read_bytes(), str(path))
    train, heldout = (index["splits"].get(split, {}) for split in ("train", "heldout"))
    return DataSummary(
        int(train.get("clips", 0)),
        float(train.get("seconds", 0.0)),
        int(heldout.get("clips", 0)),
        float(heldout.get("seconds", 0.0)),
        str(index["model"].get("name", "")),
        int(index.get("rejected", 0)),
        int(train.get("frames", 0)),
    )
