"""Which clips make up each batch, for every rank, and the tensors of a batch.

Shapes: B rows, C latent channels, T latent frames. A *window* is a stretch of the endless order (`stream.ClipStream`)
that is sorted by length or packed, then cut into batches for all ranks; batches are numbered (window, place).

A batch is a dict. Without packing, row i is clip i:

- `latents_BCT` float32: the crop, and behind it the latents of silence;
- `padding_mask_BT` bool: True on the crop;
- `seconds_total_B` float32, `prompts`, `keys`: B each; `at_end_B` bool: the crop reaches the end of its clip, so that
  silence truly follows it;
- `seeds`: B numbers, one for each showing of a clip; whatever is drawn at random for it can start there.

T is the same on every rank.

Packed, the S clips of a batch share B rows: `prompts`, `keys`, `seeds`, `seconds_total_B` and `at_end_B` have S entries
each, and `segment_ids_BT` (int64) holds for each frame the number of its clip, 0 … S−1 in order of row and place, −1
for padding.

The endless order in which clips are shown, as a pure function of a seed: any position can be computed, none stored.

A source's own order is a sequence of passes, each a fresh shuffle of its clips (each taken `repeats` times). Sources
are interleaved in cycles: without weights a cycle is one pass of every source; with weights it has the same number of
places and source i gets the share weight_i. Prior sources (regularisation) get `prior_share` of the places.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sa3train.core.errors import ConfigError


@dataclass(frozen=True)
class SourceSize:
    """What the order needs to know of a source: number of clips, and how often or how much it is wanted."""

    clips: int
    repeats: int = 1
    weight: float | None = None
    prior: bool = False


def cycle_counts(sources: Sequence[SourceSize], prior_share: float = 0.0) -> np.ndarray:
    """Places of each source in one cycle. Raises `ConfigError` when weights, priors and share do not go together."""
    sizes = np.array([source.clips * source.repeats for source in sources])
    prior = np.array([source.prior for source in sources])
    if not sizes.size or (sizes <= 0).any():
        raise ConfigError("every source needs at least one training clip and repeats of 1 or more.")
    if prior.all():
        raise ConfigError("every source has role prior: give at least one to train on.")
    if prior.any() != (prior_share > 0) or not 0 <= prior_share < 1:
        raise ConfigError(
            f"prior_share is {prior_share} with {prior.sum()} prior source(s): a share between 0 and 1 and a source "
            f"with role=prior go together."
        )
    counts = np.zeros(len(sources), dtype=np.int64)
    trained = int(sizes[~prior].sum())
    counts[~prior] = _shared(trained, sizes, sources, ~prior)
    if prior.any():
        places = max(1, round(trained * prior_share / (1 - prior_share)))
        counts[prior] = _shared(places, sizes, sources, prior, exact=False)
    return counts


def _shared(
    places: int, sizes: np.ndarray, sources: Sequence[SourceSize], chosen: np.ndarray, exact: bool = True
) -> np.ndarray:
    weights = [source.weight for source, take in zip(sources, chosen, strict=True) if take]
    if all(weight is None for weight in weights):
        if exact:
            return np.asarray(sizes[chosen])
        shares = sizes[chosen].astype(float)
    elif any(weight is None or not weight > 0 for weight in weights):
        raise ConfigError(
            "give a weight above 0 to every source of a role, or to none (then sizes and repeats decide)."
        )
    else:
        shares = np.array(weights, dtype=float)
    wanted = places * shares / shares.sum()
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[: places - counts.sum()]] += 1
    return counts


class ClipStream:
    """`take(n, count)`: (source, clip) of the places n, n+1, … of the endless order."""

    def __init__(self, sources: Sequence[SourceSize], seed: int, prior_share: float = 0.0) -> None:
        self.sources, self.seed = list(sources), seed
        self.counts = cycle_counts(sources, prior_share)
        self.cycle = int(self.counts.sum())
        self._labels: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source numbers and clip numbers (both int64, `count` long) from place `start` on."""
        pieces = []
        while count > 0:
            cycle, place = divmod(start, self.cycle)
            length = min(count, self.cycle - place)
            pieces.append(self._piece(cycle, place, length))
            start, count = start + length, count - length
        sources, clips = zip(*pieces, strict=True)
        return np.concatenate(sources), np.concatenate(clips)

    def _piece(self, cycle: int, place: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        labels, occurrence = self._interleaved(cycle)
        sources = labels[place : place + length]
        nth = occurrence[place : place + length] + cycle * self.counts[sources]
        clips = np.empty(length, dtype=np.int64)
        for source in np.unique(sources):
            mine = sources == source
            clips[mine] = self._clips(int(source), nth[mine])
        return sources, clips

    def _interleaved(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a cycle: its source, and how many places of that source came before in the cycle."""
        if self._labels is None or self._labels[0] != cycle:
            labels = np.repeat(np.arange(len(self.counts)), self.counts)
            np.random.default_rng([self.seed, 1, cycle]).shuffle(labels)
            occurrence = np.empty(self.cycle, dtype=np.int64)
            for source, count in enumerate(self.counts):
                occurrence[labels == source] = np.arange(count)
            self._labels = (cycle, labels, occurrence)
        return self._labels[1], self._labels[2]

    def _clips(self, source: int, nth: np.ndarray) -> np.ndarray:
        """The nth clips (ascending) of a source's own sequence of shuffled passes."""
        size = self.sources[source]
        length = size.clips * size.repeats
        clips = np.empty(len(nth), dtype=np.int64)
        for number in np.unique(nth // length):
            inside = nth // length == number
            clips[inside] = self._order(source, int(number), length)[nth[inside] % length] % size.clips
        return clips

    def _order(self, source: int, number: int, length: int) -> np.ndarray:
        kept = self._orders.get(source)
        if kept is None or kept[0] != number:
            kept = (number, np.random.default_rng([self.seed, 2, source, number]).permutation(length))
            self._orders[source] = kept
        return kept[1]


SAMPLES_PER_FRAME = 4096


class Request(NamedTuple):
    """One clip to be shown: its source, its number there, the length of its crop in frames, its own random seed, and
    the frames of the longest crop in its batch on all ranks (0: of those in the batch at hand).
    """

    source: int
    clip: int
    frames: int
    seed: int
    longest: int = 0


@dataclass(frozen=True)
class Plan:
    """A window's batches of one rank: for each batch, its rows, each a list of requests (one, unless packed)."""

    batches: list[list[list[Request]]]


@dataclass(frozen=True)
class Shape:
    """How batches are cut. `pack_frames`: length of a packed row, or None for one clip a row, near-equal lengths."""

    batch_size: int
    world: int = 1
    rank: int = 0
    pool: int = 32
    pack_frames: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.pool < 1:
            raise ConfigError(f"batch_size is {self.batch_size} and pool {self.pool}; both must be 1 or more.")
        if self.pack_frames is not None and self.pack_frames < 1:
            raise ConfigError(f"pack_frames is {self.pack_frames}; it is the length of a row in latent frames.")

    @property
    def rows(self) -> int:
        """Rows of one batch on all ranks together."""
        return self.batch_size * self.world


class Planner:
    """Plans windows: takes clips from the stream, decides crop lengths, groups them for all ranks, keeps one rank's."""

    def __init__(self, stream: ClipStream, lengths: Sequence[np.ndarray], shape: Shape, seed: int) -> None:
        """`lengths[s][c]`: crop length in frames of clip c of source s."""
        self.stream, self.lengths, self.shape, self.seed = stream, lengths, shape, seed
        counts = stream.counts / stream.counts.sum()
        mean = sum(share * float(length.mean()) for share, length in zip(counts, lengths, strict=True))
        self._per_row = 1.0 if shape.pack_frames is None else max(1.0, shape.pack_frames / mean)
        longest = max(int(length.max()) for length in lengths)
        if shape.pack_frames is not None and longest > shape.pack_frames:
            raise ConfigError(
                f"a clip of {longest} frames does not fit a packed row of pack_frames={shape.pack_frames}: "
                f"raise pack_frames, or give crop_seconds or crop_frames."
            )

    @property
    def window(self) -> int:
        """Clips in a window: about one cycle of the stream, at most `pool` batches of every rank; a multiple of the
        rows of a batch, so that no row is ever empty.
        """
        rows = self.shape.rows
        return rows * max(1, min(int(self.shape.pool * self._per_row), self.stream.cycle // rows))

    def batches_per_cycle(self) -> int:
        """How many batches of one rank show about as many clips as a cycle has: the length of an epoch, at least 1."""
        return max(1, round(self.stream.cycle / (self.shape.rows * self._per_row)))

    def plan(self, window: int) -> Plan:
        """The batches of this rank in a window."""
        size, shape = self.window, self.shape
        sources, clips = self.stream.take(window * size, size)
        chance = np.random.default_rng([self.seed, 3, window])
        seeds = chance.integers(0, 2**62, size)
        frames = np.empty(size, dtype=np.int64)
        for source, lengths in enumerate(self.lengths):
            frames[sources == source] = lengths[clips[sources == source]]
        requests = [Request(*map(int, fields)) for fields in zip(sources, clips, frames, seeds, strict=True)]
        if shape.pack_frames is None:
            order = np.argsort(-frames, kind="stable")
            rows = [[requests[place]] for place in order]
            groups = [rows[start : start + shape.rows] for start in range(0, size, shape.rows)]
            groups = [[[one._replace(longest=group[0][0].frames)] for (one,) in group] for group in groups]
        else:
            rows = pack(requests, shape.pack_frames, shape.rows)
            groups = [rows[start :: len(rows) // shape.rows] for start in range(len(rows) // shape.rows)]
        shuffled = [groups[place] for place in chance.permutation(len(groups))]
        return Plan([group[shape.rank :: shape.world] for group in shuffled])


def pack(requests: Sequence[Request], capacity: int, multiple: int) -> list[list[Request]]:
    """Put clips into rows of at most `capacity` frames, as evenly as may be; the number of rows is a multiple of
    `multiple`, and no row is empty when there are at least that many clips.

    Longest clip first, always into the emptiest row; when one does not fit, more rows are taken.
    """
    longest_first = sorted(range(len(requests)), key=lambda place: (-requests[place].frames, place))
    total = sum(request.frames for request in requests)
    count = max(1, math.ceil(total / capacity / multiple)) * multiple
    while True:
        rows: list[list[Request]] = [[] for _ in range(count)]
        filled = np.zeros(count, dtype=np.int64)
        for place in longest_first:
            row = int(filled.argmin())
            if filled[row] + requests[place].frames > capacity:
                break
            rows[row].append(requests[place])
            filled[row] += requests[place].frames
        else:
            return sorted(rows, key=lambda row: -sum(request.frames for request in row))
        count += multiple


def crop_start(free: int, how: str, chance: random.Random, beats: Sequence[float] | None, frame_seconds: float) -> int:
    """First frame of a crop that can begin anywhere in 0 … `free`: `start`, `random`, or on a `beat` (seconds)."""
    if free <= 0 or how == "start":
        return 0
    if how == "beat" and beats:
        places = [frame for beat in beats if 0 <= (frame := round(beat / frame_seconds)) <= free]
        if places:
            return places[int(chance.random() * len(places))]
    return int(chance.random() * (free + 1))


def whole_seconds(seconds: float) -> float:
    """Seconds rounded up to whole ones, as the models were trained on; a hair of rounding error does not count."""
    return float(math.ceil(seconds - 1e-6))


def collate(
    rows: Sequence[Sequence[dict[str, Any]]], silence_CT: torch.Tensor, tail: int, packed: int | None, longest: int = 0
) -> Any:
    """Tensors of a batch from its rows of clips (each `latent_CT`, `prompt`, `key`, `seed`, `seconds_total`, `at_end`).

    `silence_CT` fills what no clip covers (repeated along T). Without packing, T is the longest clip, or `longest`
    where another rank has a longer one, plus `tail`.
    """
    clips = [clip for row in rows for clip in row]
    lengths = [[clip["latent_CT"].shape[1] for clip in row] for row in rows]
    frames = packed or max(longest, *(sum(row) for row in lengths)) + tail
    times = math.ceil(frames / silence_CT.shape[1])
    latents_BCT = silence_CT.float().repeat(1, times)[:, :frames].expand(len(rows), -1, -1).clone()
    segment_ids_BT = torch.full((len(rows), frames), -1, dtype=torch.int64)
    number = 0
    for row, clips_of_row in enumerate(rows):
        start = 0
        for clip in clips_of_row:
            end = start + clip["latent_CT"].shape[1]
            latents_BCT[row, :, start:end] = clip["latent_CT"]
            segment_ids_BT[row, start:end] = number
            start, number = end, number + 1
    batch = {
        "latents_BCT": latents_BCT,
        "padding_mask_BT": segment_ids_BT >= 0,
        "seconds_total_B": torch.tensor([clip["seconds_total"] for clip in clips], dtype=torch.float32),
        "at_end_B": torch.tensor([clip["at_end"] for clip in clips], dtype=torch.bool),
        "prompts": [clip["prompt"] for clip in clips],
        "keys": [clip["key"] for clip in clips],
        "seeds": [clip["seed"] for clip in clips],
    }
    return batch | ({"segment_ids_BT": segment_ids_BT} if packed else {})
