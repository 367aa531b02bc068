"""Lengths: bars at a tempo in samples, and the windows of a piece. Without torch, for `sa3-generate --help`."""

import itertools
import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from sa3train.core.errors import GenerationError

LONGEST_TURN = 43
"""Latent frames in which a window turns into the next one at most: 4 s in the released models."""
_METER = re.compile(r"([1-9]\d?)/(1|2|4|8|16|32|64)")


class Window(NamedTuple):
    """One window of a piece, in latent frames.

    Attributes:
        start: Where it begins.
        release: From where it is generated anew, though it repeats the window before it.
        new: Where it stops to repeat the window before it.
        stop: Where it ends.
    """

    start: int
    release: int
    new: int
    stop: int


def count_bar_samples(bars: int, bpm: float, meter: str, sample_rate: int) -> int:
    """Count the samples of bars, rounded once, over all of them.

    Args:
        bars: Bars.
        bpm: Quarter notes per minute, as audio workstations count whatever the meter.
        meter: Such as "4/4" or "6/8".
        sample_rate: Samples per second.

    Returns:
        Samples.

    Raises:
        GenerationError: When the meter cannot be read.
    """
    found = _METER.fullmatch(meter.strip())
    if found is None:
        raise GenerationError(f"meter={meter} must be two whole numbers such as 4/4 or 6/8, the second a note value.")
    quarters = bars * Fraction(4 * int(found[1]), int(found[2]))
    return round(quarters * 60 * sample_rate / Fraction(repr(float(bpm))))


def to_seconds(samples: int, sample_rate: int) -> float:
    """Convert samples to the seconds that count as exactly as many (`resolve.count_samples` rounds down).

    Args:
        samples: Samples.
        sample_rate: Samples per second.

    Returns:
        Seconds.
    """
    seconds = samples / sample_rate
    return seconds if int(seconds * sample_rate) == samples else math.nextafter(seconds, math.inf)


def plan_windows(frames: int, longest: int, overlap: int, cuts: Iterable[int] = ()) -> list[Window]:
    """Plan the windows of a piece: as few as there can be, of the same length between two cuts.

    Args:
        frames: Frames of the piece.
        longest: Frames of the longest window.
        overlap: Frames that a window repeats of what is before it, less than `longest`.
        cuts: Frames at which a window must begin to be new.

    Returns:
        Windows; each begins to be new where the one before ends. It is generated anew in the second half of what it
        repeats, or of what is new in the window before where that is less, and in `LONGEST_TURN` frames at most.
    """
    edges = [0]
    for start, stop in itertools.pairwise(sorted({0, frames, *(cut for cut in cuts if 0 < cut < frames)})):
        parts = -(-(stop - start) // (longest - overlap))
        edges += [start + (stop - start) * part // parts for part in range(1, parts + 1)]
    windows = []
    for before, new, stop in zip([0, *edges], edges, edges[1:], strict=False):
        start = max(0, new - overlap)
        turn = min((new - max(start, before)) // 2, LONGEST_TURN)
        windows.append(Window(start, new - turn, new, stop))
    return windows
