"""The endless order in which clips are shown, as a pure function of a seed: any position can be computed, none stored.

A source's own order is a sequence of passes, each a fresh shuffle of its clips (each taken `repeats` times). Sources
are interleaved in cycles: without weights a cycle is one pass of every source; with weights it has the same number of
places and source i gets the share weight_i. Prior sources (regularisation) get `prior_share` of the places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sa3train.errors import ConfigError


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
