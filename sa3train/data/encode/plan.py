"""Plan an encode: settings, train/held-out split, and a record for every augmentation of every accepted clip.

Batches do not depend on what is already done, so that an interrupted run computes the same bits as an uninterrupted
one. The split is by content, so that the same sound is never on both sides and a clip stays where it is.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.core.errors import DataError
from sa3train.core.files import replace_path
from sa3train.core.log import get_logger
from sa3train.core.text import list_few
from sa3train.core.user_files import read_file
from sa3train.data.audit.audit import AuditIndex
from sa3train.data.audit.checks import make_finding
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.shards.index import list_outdated_shards, list_shards, mark_outdated
from sa3train.data.shards.shard_file import ShardEntry, hash_record, read_latents, read_listing, scan_shard
from sa3train.data.shards.writer import PART, STALE, finish_shard
from sa3train.data.sources.lists import LIST_LIMIT
from sa3train.data.sources.text import compose, decode_text

_logger = get_logger(__name__)

MIN_HELDOUT = 4
"""Sounds (near duplicates are one) held out at least, unless there are fewer than five times as many: one or two tell
little about the others."""

SHOWN_DROPPED = 10
"""Duplicates that the log names; `rejected.jsonl` has all."""

TRAIN, HELDOUT = SPLITS = ("train", "heldout")


def select_heldout(
    split: float | str, sources: Sequence[str], content: np.ndarray, groups: np.ndarray, accepted: np.ndarray
) -> np.ndarray:
    """Select the clips to hold out.

    Args:
        split: Share of the clips (a clip is held out if the hash of its content lies below it, so that clips added
            later move none), or the path of a list of sources, one per line.
        sources: Source of each clip.
        content: (n,) audio hashes.
        groups: (n,) index of the first clip that is or sounds the same; a group is never split. A share above 0 holds
            out at least `MIN_HELDOUT` groups, but no more than a fifth of them for that.
        accepted: (n,) bool, clips that are encoded.

    Returns:
        (n,) bool.
    """
    if isinstance(split, str):
        heldout = _match_list(split, sources)
    else:
        heldout = _draw_groups(split, content, groups, accepted)
    heldout_groups = np.zeros(len(sources), dtype=bool)
    heldout_groups[groups[heldout & accepted]] = True
    return np.asarray(heldout_groups[groups] & accepted)


def read_heldout_list(path: str) -> set[str]:
    """Read a list of clips to hold out.

    Args:
        path: Text file with one source per line.

    Returns:
        The sources.

    Raises:
        DataError: When the file cannot be read, or is empty.
    """
    try:
        lines = decode_text(read_file(path, limit=LIST_LIMIT))[0].splitlines()
    except (OSError, DataError) as error:
        raise DataError(f"cannot read the held-out list {path} ({error}): give a text file, or a share.") from error
    sources = {compose(line.strip().removeprefix("./")) for line in lines if line.strip()}
    if not sources:
        raise DataError(f"the held-out list {path} is empty: write sources, one per line, or set split=0.")
    return sources


def _draw_groups(share: float, content: np.ndarray, groups: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    heldout = np.zeros(len(content), dtype=bool)
    firsts = np.unique(groups[accepted])
    if share > 0 and len(firsts):
        draws = np.array([_hash_to_uniform(bytes(content[first])) for first in firsts])
        heldout[firsts[draws < share]] = True
        least = min(MIN_HELDOUT, len(firsts) // 5)
        if heldout.sum() < least:
            heldout[firsts[np.argsort(draws)[:least]]] = True
            _logger.info(
                "held out: %d of %d different sounds (%d clips; near duplicates are one sound), since split=%g draws "
                "fewer: at least %d, but at most a fifth",
                least, len(firsts), int((heldout[groups] & accepted).sum()), share, MIN_HELDOUT,
            )  # fmt: skip
    # A group is accepted through any of its clips, while its first may itself be rejected.
    return np.asarray(heldout[groups])


def _hash_to_uniform(content: bytes) -> float:
    return int.from_bytes(hashlib.sha256(b"split" + content).digest()[:8], "big") / 2**64


def _match_list(path: str, sources: Sequence[str]) -> np.ndarray:
    wanted = read_heldout_list(path)
    unknown = sorted(wanted.difference(map(compose, sources)))
    if unknown:
        raise DataError(
            f"the held-out list {path} names {len(unknown)} clip(s) that are not in the source, such as {unknown[0]}. "
            f"Write paths as they are within the source, one per line."
        )
    return np.array([compose(source) in wanted for source in sources], dtype=bool)


@dataclass(frozen=True)
class ClipGroup:
    """Clips that share their audio and are encoded once.

    Attributes:
        clips: Their audit indices.
    """

    clips: tuple[int, ...]


class EncodePlan:
    """What to encode of an audited source.

    Attributes:
        index: The audit.
        settings: Settings of the encode.
        basis: What every latent depends on besides its audio, as JSON.
        dropped: (n,) bool, duplicates of other clips that are not to be encoded.
        accepted: (n,) bool, clips to encode.
        heldout: (n,) bool, clips to hold out.
    """

    def __init__(self, index: AuditIndex, settings: EncodeSettings, basis: dict[str, Any]) -> None:
        """Plan an encode.

        Args:
            index: The audit.
            settings: Settings of the encode.
            basis: What every latent depends on besides its audio, as JSON.
        """
        self.index, self.settings, self.basis = index, settings, basis
        drops = settings.duplicates == "drop"
        self.dropped = ~index.rejected & (index.original != np.arange(len(index))) & drops
        self.accepted = ~index.rejected & ~self.dropped
        if numbers := np.flatnonzero(self.dropped).tolist():
            names = [f"{index.sources[number]} (as {index.sources[index.original[number]]})" for number in numbers]
            _logger.info("Dropped as duplicates: %s", list_few(names, SHOWN_DROPPED))
        self.heldout = select_heldout(settings.split, index.sources, index.content, index.find_groups(), self.accepted)

    def iterate_rejected(self) -> Iterator[dict[str, Any]]:
        """Iterate over the clips that are not encoded.

        Yields:
            Audit rows, with the reason among their findings.
        """
        for number in np.flatnonzero(~self.accepted).tolist():
            row = self.index.row(number)
            if self.dropped[number]:
                original = self.index.sources[self.index.original[number]]
                row["findings"].append(make_finding("dropped_duplicate", f"of {original}"))
            yield row

    def plan_records(self, index: int) -> list[dict[str, Any]]:
        """Plan the records of one clip.

        Args:
            index: Its audit index.

        Returns:
            A record for the original and each augmentation.
        """
        row = self.index.row(index)
        is_heldout = bool(self.heldout[index])
        clip = make_clip_key(row["source"])
        return [
            {
                "key": clip if augmentation == "original" else f"{clip}-{augmentation}",
                "clip": clip,
                "augmentation": augmentation,
                "split": HELDOUT if is_heldout else TRAIN,
                "caption": row["caption"],
                "tags": row["tags"],
                **({"beats": row["beats"]} if row.get("beats") else {}),
                "source": row["source"],
                "content_hash": row["content"],
                "latent_hash": self.hash_latents(row["content"], augmentation),
                "original": {name: row[name] for name in ("seconds", "sample_rate", "channels", "path") if name in row},
            }
            for augmentation in ("original", *(() if is_heldout else self.settings.augmentations))
        ]

    def hash_latents(self, content: str, augmentation: str) -> str:
        """Hash everything that latents depend on.

        Args:
            content: Hash of the audio.
            augmentation: "original" or an augmentation.

        Returns:
            Hex SHA-256.
        """
        return hashlib.sha256(json.dumps([self.basis, content, augmentation], sort_keys=True).encode()).hexdigest()

    def compute_digests(self) -> dict[str, str]:
        """Compute a digest of every planned record, to tell what has changed.

        Returns:
            Digest by key.
        """
        accepted = np.flatnonzero(self.accepted).tolist()
        return {record["key"]: hash_record(record) for index in accepted for record in self.plan_records(index)}

    def make_batches(self, seconds: float) -> list[list[ClipGroup]]:
        """Make batches of all clips, similar lengths together, longest first.

        Args:
            seconds: Most audio per batch, in seconds; a longer clip is a batch of its own.

        Returns:
            Batches of clips that share their audio.
        """
        versions = 1 + len(self.settings.augmentations)
        order = np.lexsort((self.index.content, -self.index.seconds))
        clips: dict[int, list[int]] = {}
        for index in order[self.accepted[order]].tolist():
            clips.setdefault(int(self.index.original[index]), []).append(index)
        batches: list[list[ClipGroup]] = []
        filled = seconds
        for original, indices in clips.items():
            length = versions * float(self.index.seconds[original])
            if filled + length > seconds or not batches:
                batches.append([])
                filled = 0.0
            batches[-1].append(ClipGroup(tuple(indices)))
            filled += length
        return batches


def make_clip_key(source: str) -> str:
    """Make a short, readable, unique key for a clip that suits WebDataset (no dots, no slashes).

    Args:
        source: Path of the clip within its source.

    Returns:
        The file's stem and a hash of the path.
    """
    stem = source.rpartition("/")[2].rpartition(".")[0]
    slug = re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_")[:40] or "clip"
    return f"{slug}-{hashlib.sha256(source.encode('utf-8', 'replace')).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class StoredLatents:
    """Latents of an earlier run.

    Attributes:
        shard: Path of the shard.
        entry: Record and position in the shard.
    """

    shard: str
    entry: ShardEntry

    def read(self) -> np.ndarray | None:
        """Read the latents.

        Returns:
            (C, F) float16; None when they are damaged.
        """
        return read_latents(Path(self.shard), self.entry)


def reconcile_shards(folder: Path, digests: dict[str, str], world_size: int) -> None:
    """Reconcile the shards of earlier runs with the plan, before any process writes.

    Shards that are damaged, or contain anything no longer planned or stored twice, are marked as outdated, such parts
    set aside. Parts of processes that do not exist this time are finished.

    Args:
        folder: Output folder.
        digests: Digest by key of every planned record.
        world_size: Number of processes this time.
    """
    seen: set[str] = set()
    outdated = []
    for path in [*list_shards(folder), *sorted(folder.glob(f"*{PART}"))]:
        is_part = path.name.endswith(PART)
        entries = scan_shard(path)[0] if is_part else list(read_listing(path))
        keys = [entry.key for entry in entries]
        is_current = all(digests.get(entry.key) == entry.digest for entry in entries)
        if is_current and not is_part and scan_shard(path)[0] != entries:
            is_current = False
            _logger.warning("Damaged shard %s: its intact clips are kept, the others are encoded again.", path)
        if not is_current or len(set(keys)) < len(keys) or not seen.isdisjoint(keys):
            if is_part:
                _set_aside(path)
            else:
                outdated.append(path)
            continue
        seen.update(keys)
        if is_part and int(path.name.rsplit("-", 2)[1]) >= world_size:
            finish_shard(path, None)
    if outdated:
        mark_outdated(folder, outdated)


def _set_aside(part: Path) -> None:
    base = part.name.removesuffix(PART)
    number = 0
    while (target := part.with_name(f"{base}-{number}{STALE}")).exists():
        number += 1
    replace_path(part, target)


def list_encoded_keys(folder: Path) -> set[str]:
    """List what is already encoded.

    Args:
        folder: Output folder.

    Returns:
        Keys of all records in shards and parts.
    """
    keys = {entry.key for shard in list_shards(folder) for entry in read_listing(shard)}
    return keys.union(entry.key for part in folder.glob(f"*{PART}") for entry in scan_shard(part)[0])


def find_reusable_latents(folder: Path, other: Path | None = None) -> dict[str, StoredLatents]:
    """Find latents of earlier runs that can be copied.

    Args:
        folder: Output folder, whose outdated shards are searched.
        other: Another folder of shards; None for none.

    Returns:
        Latents by their hash.
    """
    shards = [folder / name for name in list_outdated_shards(folder)] + (list_shards(other) if other else [])
    entries = [(shard, entry) for shard in filter(Path.exists, shards) for entry in read_listing(shard)]
    entries += [(part, entry) for part in folder.glob(f"*{STALE}") for entry in scan_shard(part)[0]]
    return {str(entry.record["latent_hash"]): StoredLatents(str(shard), entry) for shard, entry in entries}
