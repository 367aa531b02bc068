"""What an encode has to make: a record for every take of every accepted clip, in batches that do not depend on what is
already done, so that an interrupted run computes the same bits as an uninterrupted one.

Train and held-out split by content, so that the same sound is never in both and a clip stays where it is.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.core.errors import ConfigError, DataError
from sa3train.core.log import get_logger
from sa3train.data.audit.audit import AuditIndex
from sa3train.data.audit.checks import ERROR, finding
from sa3train.data.encode.fixes import chosen_fixes
from sa3train.data.shards.index import mark_outdated, outdated_shards, shard_files
from sa3train.data.shards.writer import PART, STALE, Entry, finish_part, read_listing, record_digest, scan_latents

TRAIN, HELDOUT = "train", "heldout"


def held_out(
    split: float | str, sources: Sequence[str], content: np.ndarray, families: np.ndarray, accepted: np.ndarray
) -> np.ndarray:
    """Which accepted clips are held out: (n,) bool.

    `split` is a share (a clip is held out if the hash of its content lies below it, so that later clips move none), or
    the path of a list of sources, one a line. Clips of one family (`families`: the same or alike) go together. A share
    above 0 holds out at least one family of five or more. Raises `ConfigError` for a share outside [0, 1), `DataError`
    for a list that names what is not there.
    """
    held = np.zeros(len(sources), dtype=bool)
    if isinstance(split, str):
        held = _listed(split, sources)
    else:
        check_share(split)
        held = _drawn(split, content, families, accepted) if split > 0 else held
    chosen = np.zeros(len(sources), dtype=bool)
    chosen[families[held & accepted]] = True
    return np.asarray(chosen[families] & accepted)


def check_share(split: float) -> None:
    """Raise `ConfigError` for a share outside [0, 1)."""
    if not 0 <= split < 1:
        raise ConfigError(f"split is {split}; give the share to hold out, from 0 to below 1, or the path of a list.")


def read_list(path: str) -> set[str]:
    """The sources that a held-out list names. Raises `DataError` when it cannot be read, or names none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the held-out list {path} ({error}): give a text file, or a share.") from error
    named = {line.strip().removeprefix("./") for line in lines if line.strip()}
    if not named:
        raise DataError(f"the held-out list {path} names no clip: write sources, one a line, or give split=0.")
    return named


def _drawn(share: float, content: np.ndarray, families: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    heads = np.unique(families[accepted])
    draws = np.array([_uniform(bytes(content[head])) for head in heads])
    held = np.zeros(len(content), dtype=bool)
    held[heads[draws < share]] = True
    if len(heads) >= 5 and not held.any():
        held[heads[draws.argmin()]] = True
    # A family is accepted through any of its clips, while its head may itself be rejected.
    return np.asarray(held[families])


def _uniform(content: bytes) -> float:
    return int.from_bytes(hashlib.sha256(b"split" + content).digest()[:8], "big") / 2**64


def _listed(path: str, sources: Sequence[str]) -> np.ndarray:
    wanted = read_list(path)
    unknown = sorted(wanted - set(sources))
    if unknown:
        raise DataError(
            f"the held-out list {path} names {len(unknown)} clip(s) that are not in the source, such as {unknown[0]}. "
            f"Write paths as they are within the source, one a line."
        )
    return np.array([source in wanted for source in sources], dtype=bool)


_logger = get_logger(__name__)

VIEWS = ("polarity", "gain")
SPLITS = (TRAIN, HELDOUT)


@dataclass(frozen=True)
class EncodeSettings:
    """Choices of an encode.

    fix: mends (`dc`, `trim_silence`, `loudness`). views: further takes of each training clip (`polarity`: inverted,
    `gain`: 3 to 9 dB softer). split: share to hold out, or the path of a list. duplicates: `keep` or `drop`. captions:
    `required` or `optional`. max_rejected: the largest share of clips that may be rejected. batch_seconds: audio
    encoded at a time (None: by memory). reuse: another folder of shards whose latents may be taken over where they are
    equal. overwrite: replace latents made with other settings.
    """

    fix: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    split: float | str = 0.05
    duplicates: str = "keep"
    captions: str = "required"
    max_rejected: float = 0.1
    batch_seconds: float | None = None
    shard_bytes: int = 512_000_000
    threads: int = 2
    reuse: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        chosen_fixes(self.fix)
        unknown = [view for view in self.views if view not in VIEWS]
        if unknown:
            raise ConfigError(f"there is no view {', '.join(unknown)}; choose among {', '.join(VIEWS)}.")
        if self.duplicates not in ("keep", "drop"):
            raise ConfigError(f"duplicates is {self.duplicates!r}; choose keep or drop.")
        if not isinstance(self.split, str):
            check_share(self.split)
        if not 0 <= self.max_rejected <= 1:
            raise ConfigError(f"max_rejected is {self.max_rejected}; it is a share from 0 to 1.")
        if self.batch_seconds is not None and self.batch_seconds <= 0:
            raise ConfigError(f"batch_seconds is {self.batch_seconds}; give more than 0, or null for as memory allows.")
        if not 1_000_000 <= self.shard_bytes <= 512_000_000:
            raise ConfigError(f"shards of {self.shard_bytes} bytes: give from 1 000 000 to 512 000 000.")
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; give 1 or more.")


@dataclass(frozen=True)
class Task:
    """One distinct sound to encode: the clips (audit numbers) that share it."""

    clips: tuple[int, ...]


class EncodePlan:
    """What to make of an audited source. `basis`: what every latent depends on besides its audio (JSON-like)."""

    def __init__(self, index: AuditIndex, settings: EncodeSettings, basis: dict[str, Any]) -> None:
        self.index, self.settings, self.basis = index, settings, basis
        self.accepted = ~index.rejected
        if settings.duplicates == "drop":
            self.accepted &= index.original == np.arange(len(index))
        self.heldout = held_out(settings.split, index.sources, index.content, index.families(), self.accepted)

    def rejected(self) -> Iterator[dict[str, Any]]:
        """Audit rows of the clips that are not encoded, with the reason among their findings."""
        for number in np.flatnonzero(~self.accepted).tolist():
            row = self.index.row(number)
            if not any(found["severity"] == ERROR for found in row["findings"]):
                original = self.index.sources[self.index.original[number]]
                row["findings"].append(finding("dropped_duplicate", f"of {original}"))
            yield row

    def records(self, number: int) -> list[dict[str, Any]]:
        """The planned record of every take of one clip."""
        row = self.index.row(number)
        held = bool(self.heldout[number])
        views = ("original", *(() if held else self.settings.views))
        clip = clip_key(row["source"])
        return [
            {
                "key": clip if view == "original" else f"{clip}-{view}",
                "clip": clip,
                "view": view,
                "split": HELDOUT if held else TRAIN,
                "caption": row["caption"],
                "tags": row["tags"],
                **({"beats": row["beats"]} if row.get("beats") else {}),
                "source": row["source"],
                "content_hash": row["content"],
                "latent_hash": self.latent_key(row["content"], view),
                "original": {name: row[name] for name in ("seconds", "sample_rate", "channels")},
            }
            for view in views
        ]

    def latent_key(self, content: str, view: str) -> str:
        """A hash of all that a latent depends on."""
        return hashlib.sha256(json.dumps([self.basis, content, view], sort_keys=True).encode()).hexdigest()

    def digests(self) -> dict[str, str]:
        """Key → digest of every planned record."""
        accepted = np.flatnonzero(self.accepted).tolist()
        return {record["key"]: record_digest(record) for number in accepted for record in self.records(number)}

    def batches(self, seconds: float) -> list[list[Task]]:
        """All tasks in batches of up to `seconds` of audio, clips of like length together, longest first."""
        takes = 1 + len(self.settings.views)
        order = np.lexsort((self.index.content, -self.index.seconds))
        clips: dict[int, list[int]] = {}
        for number in order[self.accepted[order]].tolist():
            clips.setdefault(int(self.index.original[number]), []).append(number)
        batches: list[list[Task]] = []
        filled = seconds
        for original, numbers in clips.items():
            length = takes * float(self.index.seconds[original])
            if filled + length > seconds or not batches:
                batches.append([])
                filled = 0.0
            batches[-1].append(Task(tuple(numbers)))
            filled += length
        return batches


def clip_key(source: str) -> str:
    """A short, readable, unique name for a clip from its path, fit for WebDataset (no dots, no slashes)."""
    stem = source.rpartition("/")[2].rpartition(".")[0]
    slug = re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_")[:40] or "clip"
    return f"{slug}-{hashlib.sha256(source.encode('utf-8', 'replace')).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Kept:
    """A latent from an earlier run: where its array is, and what was recorded of it."""

    path: str
    entry: Entry


def reconcile(folder: Path, digests: dict[str, str], world: int) -> None:
    """Mark as outdated every shard that is damaged or holds anything no longer planned or held twice, set such parts
    aside, and finish the parts of processes that are not there this time. One process does this before any writes.
    """
    seen: set[str] = set()
    outdated = []
    for path in [*shard_files(folder), *sorted(folder.glob(f"*{PART}"))]:
        is_part = path.name.endswith(PART)
        entries = scan_latents(path)[0] if is_part else list(read_listing(path))
        keys = [entry.key for entry in entries]
        wanted = all(digests.get(entry.key) == entry.digest for entry in entries)
        if wanted and not is_part and scan_latents(path)[0] != entries:
            wanted = False
            _logger.warning("damaged shard %s: its whole clips are kept, the others are encoded anew.", path)
        if not wanted or len(set(keys)) < len(keys) or not seen.isdisjoint(keys):
            if is_part:
                _set_aside(path)
            else:
                outdated.append(path)
            continue
        seen.update(keys)
        if is_part and int(path.name.rsplit("-", 2)[1]) >= world:
            finish_part(path, None)
    if outdated:
        mark_outdated(folder, outdated)


def _set_aside(part: Path) -> None:
    base = part.name.removesuffix(PART)
    number = 0
    while (target := part.with_name(f"{base}-{number}{STALE}")).exists():
        number += 1
    part.replace(target)


def done_keys(folder: Path) -> set[str]:
    """Keys of every clip that is already in a shard or part."""
    keys = {entry.key for shard in shard_files(folder) for entry in read_listing(shard)}
    return keys.union(entry.key for part in folder.glob(f"*{PART}") for entry in scan_latents(part)[0])


def kept_latents(folder: Path, other: Path | None = None) -> dict[str, Kept]:
    """Latent key → where it is, for everything outdated in `folder` and every shard of another folder."""
    kept: dict[str, Kept] = {}
    shards = [folder / name for name in outdated_shards(folder)] + (shard_files(other) if other else [])
    for shard in filter(Path.exists, shards):
        kept |= {str(entry.record["latent_hash"]): Kept(str(shard), entry) for entry in read_listing(shard)}
    for part in folder.glob(f"*{STALE}"):
        kept |= {str(entry.record["latent_hash"]): Kept(str(part), entry) for entry in scan_latents(part)[0]}
    return kept
