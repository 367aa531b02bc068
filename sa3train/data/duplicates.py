"""Which clips are the same audio, or sound the same, over a million of them."""

from collections.abc import Iterator

import numpy as np

NEAR_BITS = 18
"""Of 240 fingerprint bits, the most that may differ: other encodings of one sound differ in up to 10, two takes of the
same instrument in 45 or more (measured on datasets/sample).
"""

NEAR_SECONDS = 0.05
"""Relative difference of length up to which two clips may be the same."""

_WORD = 20
"""Bits of a hash word. Two fingerprints that differ in 18 bits still share one of the 12 words 96 times in 100."""

_CROWD = 64
"""In a hash bucket with more clips than this, each is compared with this many neighbours only."""


def exact_originals(content: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """For each clip, the number of the first clip with the same content; its own where not comparable."""
    originals = np.arange(len(content))
    chosen = np.flatnonzero(comparable)
    if chosen.size:
        _, first, inverse = np.unique(content[chosen], return_index=True, return_inverse=True)
        originals[chosen] = chosen[first[inverse]]
    return originals


def near_originals(prints: np.ndarray, seconds: np.ndarray, comparable: np.ndarray) -> np.ndarray:
    """For each clip, the first clip of those it sounds like, directly or through others; its own where alone."""
    parents = np.arange(len(prints))
    chosen = np.flatnonzero(comparable)
    if chosen.size < 2:
        return parents
    bits = np.unpackbits(prints[chosen], axis=1)
    weights = 1 << np.arange(_WORD, dtype=np.int64)
    for start in range(0, bits.shape[1], _WORD):
        words = bits[:, start : start + _WORD] @ weights
        for one, two in _pairs(words):
            near = _near(prints[chosen[one]], prints[chosen[two]], seconds[chosen[one]], seconds[chosen[two]])
            for first, second in zip(chosen[one[near]].tolist(), chosen[two[near]].tolist(), strict=True):
                _join(parents, first, second)
    return np.array([_root(parents, number) for number in range(len(parents))], dtype=np.int64)


def _pairs(words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places with equal words: neighbours at distance 1, 2, … in sorted order while any pair is equal."""
    order = np.argsort(words, kind="stable")
    ordered = words[order]
    for distance in range(1, min(_CROWD, len(words) - 1) + 1):
        equal = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not equal.size:
            break
        yield order[equal], order[equal + distance]


def _near(one: np.ndarray, two: np.ndarray, seconds_one: np.ndarray, seconds_two: np.ndarray) -> np.ndarray:
    differing = np.bitwise_count(one ^ two).sum(axis=1)
    lengths = np.abs(seconds_one - seconds_two) <= NEAR_SECONDS * np.maximum(seconds_one, seconds_two)
    return (differing <= NEAR_BITS) & lengths


def _root(parents: np.ndarray, number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = int(parents[number])
    return number


def _join(parents: np.ndarray, one: int, two: int) -> None:
    roots = sorted((_root(parents, one), _root(parents, two)))
    parents[roots[1]] = roots[0]
