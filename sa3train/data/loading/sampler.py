"""Decide which clips make up each batch on every rank: an endless, resumable order that depends on a seed only.

`ClipStream` is the endless order of clips, as a pure function of a seed: any position can be computed, none is stored.
Each source's own order is a sequence of passes, each a fresh shuffle of its clips (repeated `repeats` times). Sources
are interleaved in cycles: without weights a cycle is one pass of every source; with weights it has the same length, and
source i gets the share weight_i. Prior sources (regularization) get `prior_share` of the cycle.

`BatchSampler` cuts that order into windows, sorts a window by length or packs it, and cuts it into batches for all
ranks. It holds the only position in the order.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sa3train.core.errors import ConfigError
from sa3train.core.log import get_logger

_logger = get_logger(__name__)

DRAWS_VERSION = 1
"""Version of what loading draws for a seed: the order here, and crops, augmentations and prompts in `loader` and
`prompts`. Raise it with any change to them: it is part of a run's identity, so that a run started with other draws is
not resumed with these."""


@dataclass(frozen=True)
class SourceSize:
    """What the order depends on in a source.

    Attributes:
        clips: Number of clips.
        repeats: How often each clip is drawn per pass.
        weight: Share of the source; None to go by its size.
        prior: Whether it is for regularization.
    """

    clips: int
    repeats: int = 1
    weight: float | None = None
    prior: bool = False


def count_clips_per_cycle(sources: Sequence[SourceSize], prior_share: float = 0.0) -> np.ndarray:
    """Count the clips drawn from each source in one cycle.

    Args:
        sources: Sizes of the sources.
        prior_share: Share of the cycle for prior sources.

    Returns:
        (n,) int64.

    Raises:
        ConfigError: When weights, priors and share are inconsistent.
    """
    sizes = np.array([source.clips * source.repeats for source in sources])
    prior = np.array([source.prior for source in sources])
    if not sizes.size or (sizes <= 0).any():
        raise ConfigError("every source needs at least one training clip and repeats of 1 or more.")
    if prior.all():
        raise ConfigError("every source has role prior: give at least one to train on.")
    if prior.any() != (prior_share > 0) or not 0 <= prior_share < 1:
        raise ConfigError(
            f"prior_share is {prior_share} with {prior.sum()} prior source(s): use a share between 0 and 1 together "
            f"with a source of role=prior."
        )
    counts = np.zeros(len(sources), dtype=np.int64)
    trained = int(sizes[~prior].sum())
    counts[~prior] = _distribute(trained, sizes, sources, ~prior)
    if prior.any():
        total = max(1, round(trained * prior_share / (1 - prior_share)))
        counts[prior] = _distribute(total, sizes, sources, prior, exact=False)
    return counts


def _distribute(
    total: int, sizes: np.ndarray, sources: Sequence[SourceSize], chosen: np.ndarray, exact: bool = True
) -> np.ndarray:
    """Distribute `total` clips over the chosen sources by weight, or by size where no weights are given."""
    weights = [source.weight for source, is_chosen in zip(sources, chosen, strict=True) if is_chosen]
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
    wanted = total * shares / shares.sum()
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[: total - counts.sum()]] += 1
    return counts


class ClipStream:
    """The endless order of clips.

    Attributes:
        sources: Sizes of the sources.
        seed: Seed of all shuffles.
        counts: (n,) clips of each source in one cycle.
        cycle: Length of a cycle in clips.
    """

    def __init__(self, sources: Sequence[SourceSize], seed: int, prior_share: float = 0.0) -> None:
        """Define an order.

        Args:
            sources: Sizes of the sources.
            seed: Seed of all shuffles.
            prior_share: Share of a cycle for prior sources.
        """
        self.sources, self.seed = list(sources), seed
        self.counts = count_clips_per_cycle(sources, prior_share)
        self.cycle = int(self.counts.sum())
        self._labels: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Take a stretch of the order.

        Args:
            start: First position.
            count: Number of positions.

        Returns:
            Index of the source, and of the clip in the source, each (count,) int64.
        """
        pieces = []
        while count > 0:
            cycle, position = divmod(start, self.cycle)
            length = min(count, self.cycle - position)
            pieces.append(self._take_from_cycle(cycle, position, length))
            start, count = start + length, count - length
        sources, clips = zip(*pieces, strict=True)
        return np.concatenate(sources), np.concatenate(clips)

    def _take_from_cycle(self, cycle: int, position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        labels, occurrence = self._interleave(cycle)
        sources = labels[position : position + length]
        nth = occurrence[position : position + length] + cycle * self.counts[sources]
        clips = np.empty(length, dtype=np.int64)
        for source in np.unique(sources):
            mine = sources == source
            clips[mine] = self._draw_clips(int(source), nth[mine])
        return sources, clips

    def _interleave(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a cycle: its source, and how often that source came before in the cycle."""
        if self._labels is None or self._labels[0] != cycle:
            labels = np.repeat(np.arange(len(self.counts)), self.counts)
            np.random.default_rng([self.seed, 1, cycle]).shuffle(labels)
            occurrence = np.empty(self.cycle, dtype=np.int64)
            for source, count in enumerate(self.counts):
                occurrence[labels == source] = np.arange(count)
            self._labels = (cycle, labels, occurrence)
        return self._labels[1], self._labels[2]

    def _draw_clips(self, source: int, nth: np.ndarray) -> np.ndarray:
        """The nth clips (ascending) of a source's own sequence of shuffled passes."""
        size = self.sources[source]
        length = size.clips * size.repeats
        clips = np.empty(len(nth), dtype=np.int64)
        for number in np.unique(nth // length):
            inside = nth // length == number
            clips[inside] = self._shuffle_pass(source, int(number), length)[nth[inside] % length] % size.clips
        return clips

    def _shuffle_pass(self, source: int, number: int, length: int) -> np.ndarray:
        cached = self._orders.get(source)
        if cached is None or cached[0] != number:
            cached = (number, np.random.default_rng([self.seed, 2, source, number]).permutation(length))
            self._orders[source] = cached
        return cached[1]


class SampleIndex(NamedTuple):
    """Which clip to load.

    Attributes:
        source: Index of the source.
        clip: Index of the clip in the source.
        frames: Length of the crop in latent frames.
        seed: Seed of everything drawn for this sample.
        longest: Longest crop of the batch on all ranks, in latent frames; 0 for the longest on this rank.
    """

    source: int
    clip: int
    frames: int
    seed: int
    longest: int = 0


BatchIndices = list[list[SampleIndex]]
"""The rows of a batch on one rank, each a list of samples (one, unless packed)."""


@dataclass(frozen=True)
class BatchShape:
    """How batches are cut.

    Attributes:
        batch_size: Rows per rank.
        world_size: Number of ranks.
        rank: This rank.
        pool: Number of batches that are sorted by length or packed at a time.
        pack_frames: Length of a packed row in latent frames; None for one clip per row, similar lengths together.
    """

    batch_size: int
    world_size: int = 1
    rank: int = 0
    pool: int = 32
    pack_frames: int | None = None

    @property
    def rows(self) -> int:
        """Rows of one batch on all ranks together."""
        return self.batch_size * self.world_size


class BatchSampler:
    """Batches of one rank in an endless order, and the position in it.

    Iterating draws batches from the position on, and may run ahead of it (a data loader prefetches). `advance` moves
    the position past the next drawn batch. After `load_state_dict`, iterating draws the batch that would have come.

    Attributes:
        shape: How batches are cut.
        window: Number of clips that are sorted or packed together: about one cycle, at most `shape.pool` batches of
            every rank; a multiple of the rows of a batch, so that no row is ever empty.
    """

    def __init__(
        self,
        stream: ClipStream,
        lengths: Sequence[np.ndarray],
        shape: BatchShape,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Start at the beginning of the order.

        Args:
            stream: The order of clips.
            lengths: Crop length in frames of each clip, for each source.
            shape: How batches are cut.
            identity: What a position depends on, the same on every rank; it is saved with the position.

        Raises:
            ConfigError: When a clip does not fit a packed row.
        """
        self.shape = shape
        self._stream, self._lengths, self._identity = stream, lengths, dict(identity or {})
        shares = stream.counts / stream.counts.sum()
        mean = sum(share * float(length.mean()) for share, length in zip(shares, lengths, strict=True))
        self._clips_per_row = 1.0 if shape.pack_frames is None else max(1.0, shape.pack_frames / mean)
        longest = max(int(length.max()) for length in lengths)
        if shape.pack_frames is not None and longest > shape.pack_frames:
            raise ConfigError(
                f"a clip of {longest} frames does not fit a packed row of pack_frames={shape.pack_frames}: "
                f"raise pack_frames, or set crop_seconds or crop_frames."
            )
        batches = max(1, min(int(shape.pool * self._clips_per_row), stream.cycle // shape.rows))
        self.window = shape.rows * batches
        self._window = self._batch = self._batches = self._in_epoch = 0
        self._resumed = False
        self._drawn: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        """Batches in an epoch: as many as draw about as many clips as a cycle has, at least 1."""
        return max(1, round(self._stream.cycle / (self.shape.rows * self._clips_per_row)))

    def __iter__(self) -> Iterator[BatchIndices]:
        window, first = self._window, self._batch
        drawn = self._drawn = deque()  # an earlier iteration that still runs ahead keeps its own
        while True:
            for number, rows in enumerate(self.plan_window(window)):
                if number >= first:
                    drawn.append((window, number + 1))
                    yield rows
            window, first = window + 1, 0

    def start_epoch(self) -> int:
        """Start an epoch, or continue the one that was resumed.

        Returns:
            Number of batches left in it.
        """
        if not self._resumed:
            self._in_epoch = 0
        self._resumed = False
        return len(self) - self._in_epoch % len(self)

    def advance(self) -> None:
        """Move the position past the next drawn batch."""
        self._window, self._batch = self._drawn.popleft()
        self._batches, self._in_epoch = self._batches + 1, self._in_epoch + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the same on every rank, and what it is a position in.

        Returns:
            Values for a checkpoint.
        """
        return {
            "window": self._window,
            "batch": self._batch,
            "batches": self._batches,
            "in_epoch": self._in_epoch,
            "identity": dict(self._identity),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position.

        If data, seed or batch shape have changed since, the position has no meaning: then the next window after about
        as many clips is used, with a warning that lists what changed.

        Args:
            state: What `state_dict` returned.
        """
        self._resumed = True
        self._window, self._batch, self._batches, self._in_epoch = (
            int(state[name]) for name in ("window", "batch", "batches", "in_epoch")
        )
        saved = dict(state["identity"])
        changed = [name for name in self._identity if saved.get(name) != self._identity[name]]
        if changed:
            clips = self._batches * int(saved.get("rows", 1))
            self._window, self._batch, self._in_epoch = -(-clips // self.window), 0, 0
            _logger.warning(
                "The data loader does not resume exactly: %s changed since the checkpoint. It continues after about as "
                "many clips in the new order.",
                ", ".join(f"{name} ({saved.get(name)} → {self._identity[name]})" for name in changed),
            )

    def plan_window(self, window: int) -> list[BatchIndices]:
        """Plan the batches of this rank in one window.

        Args:
            window: Number of the window.

        Returns:
            Its batches.
        """
        size, shape = self.window, self.shape
        sources, clips = self._stream.take(window * size, size)
        rng = np.random.default_rng([self._stream.seed, 3, window])
        seeds = rng.integers(0, 2**62, size)
        frames = np.empty(size, dtype=np.int64)
        for source, lengths in enumerate(self._lengths):
            frames[sources == source] = lengths[clips[sources == source]]
        samples = [SampleIndex(*map(int, fields)) for fields in zip(sources, clips, frames, seeds, strict=True)]
        if shape.pack_frames is None:
            ordered = [samples[index] for index in np.argsort(-frames, kind="stable")]
            batches = [ordered[start : start + shape.rows] for start in range(0, size, shape.rows)]
            groups = [[[sample._replace(longest=batch[0].frames)] for sample in batch] for batch in batches]
        else:
            rows = pack_clips(samples, shape.pack_frames, shape.rows)
            groups = [rows[start :: len(rows) // shape.rows] for start in range(len(rows) // shape.rows)]
        shuffled = [groups[index] for index in rng.permutation(len(groups))]
        return [group[shape.rank :: shape.world_size] for group in shuffled]


def pack_clips(samples: Sequence[SampleIndex], capacity: int, multiple: int) -> list[list[SampleIndex]]:
    """Pack clips into rows as evenly as possible: longest first, always into the emptiest row.

    Args:
        samples: Clips to pack.
        capacity: Length of a row in frames.
        multiple: The number of rows is a multiple of this; no row is empty when there are at least as many clips.

    Returns:
        Rows, fullest first.
    """
    longest_first = sorted(range(len(samples)), key=lambda index: (-samples[index].frames, index))
    total = sum(sample.frames for sample in samples)
    count = max(1, math.ceil(total / capacity / multiple)) * multiple
    while True:
        rows: list[list[SampleIndex]] = [[] for _ in range(count)]
        filled = np.zeros(count, dtype=np.int64)
        for index in longest_first:
            row = int(filled.argmin())
            if filled[row] + samples[index].frames > capacity:
                break
            rows[row].append(samples[index])
            filled[row] += samples[index].frames
        else:
            return sorted(rows, key=lambda row: -sum(sample.frames for sample in row))
        count += multiple
