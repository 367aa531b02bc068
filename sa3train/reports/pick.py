"""Pick the best of several adapters by their losses on the same clips, and say how sure that is.

Shapes: I clips, K candidates, R resamples.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sa3train.reports.loss_change import CONFIDENCE, SMALLEST, LossChange, compare_clips, take_logs

RESAMPLES = 10_000
ENUMERATED_CLIPS = 12
"""With so many clips or fewer, every combination of signs is tried."""


@dataclass(frozen=True)
class Pick:
    """The candidate of the lowest loss (geometric mean of clips), against the base and against the other candidates.

    Attributes:
        winner: Its index among the candidates.
        change: Its change against the base.
        p_value: How often chance alone would give a candidate that is so much better than the base, by a permutation
            test over all candidates.
        probability: Share of resampled sets of clips in which it is the best, the base being one of the candidates.
        equals: Indices of the other candidates whose difference from it is within noise.
    """

    winner: int
    change: LossChange
    p_value: float
    probability: float
    equals: tuple[int, ...]

    @property
    def beats_base(self) -> bool:
        """Whether it is better than the base beyond noise, by its interval and by chance alone."""
        return self.change.change < 0 and self.change.is_significant and self.p_value <= 1 - CONFIDENCE

    def describe(self) -> str:
        """Describe how sure the pick is.

        Returns:
            Text such as "loss 3.2% lower than the base's (±0.9%, 16 clips): p = 0.0001, and the best on 97% of …".
        """
        change = self.change.describe("the base's")
        if not self.change.is_able:
            return f"loss {change}"
        if self.beats_base:
            sure = f"p = {self.p_value:.2g}, and the best on {self.probability:.0%} of resampled sets of clips"
        elif abs(self.change.change) < SMALLEST:
            sure = "too little to count"
        elif self.p_value <= 1 - CONFIDENCE and self.change.change < 0:
            sure = f"p = {self.p_value:.2g}, but the interval reaches 0"
        else:
            sure = f"chance alone does as well, p = {self.p_value:.2g}"
        return f"loss {change}: {sure}"


def is_comparable(base_I: Sequence[float], losses_I: Sequence[float] | None) -> bool:
    """Tell whether losses can be compared with those of the base.

    Args:
        base_I: Loss of each clip with the base.
        losses_I: Those of a candidate; None where they are missing.

    Returns:
        Whether they are of as many clips (a run may be resumed with others) and all finite (it may have diverged).
    """
    if losses_I is None or len(losses_I) != len(base_I):
        return False
    return bool(np.isfinite(np.asarray(losses_I, float)).all())


def list_comparable(validation: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """List the validations whose losses can be compared with those of the base.

    Args:
        validation: Content of `validation.json`.
        part: `val` (held-out clips) or `train_eval` (training clips).

    Returns:
        Rows of its history, oldest first; all that have the part where the base has no losses of single clips.
    """
    base = validation.get("base", {}).get(part)
    rows = [row for row in validation.get("history", []) if part in row] if base else []
    if not base or "by_clip" not in base:
        return rows
    return [row for row in rows if is_comparable(base["by_clip"], row[part].get("by_clip"))]


def pick_best(base_I: Sequence[float], losses_KI: Sequence[Sequence[float]], seed: int = 0) -> Pick:
    """Pick the candidate of the lowest loss (geometric mean of clips).

    The test flips the signs of whole clips' differences from the base and takes the largest t of all candidates each
    time, so that it stays honest however many candidates there are (Westfall and Young 1993, "Resampling-Based Multiple
    Testing", single-step maxT). With fewer than `MIN_CLIPS` clips it can never be sure.

    Args:
        base_I: Loss of each clip with the base.
        losses_KI: Losses of each candidate on the same clips, comparable ones; at least one candidate and one clip.
        seed: Seed of the resampling.

    Returns:
        The pick.
    """
    base, losses = take_logs(base_I), take_logs(losses_KI)
    winner = int(losses.mean(axis=1).argmin())
    change = compare_clips(base_I, losses_KI[winner])
    assert change is not None
    rng, clips = np.random.default_rng(seed), len(base)
    gains_IK = (base - losses).T
    if clips <= ENUMERATED_CLIPS:
        signs_RI = np.array(list(itertools.product((1.0, -1.0), repeat=clips)))
    else:
        signs_RI = np.vstack([np.ones(clips), rng.choice((1.0, -1.0), (RESAMPLES - 1, clips))])
    t_RK = _compute_t(signs_RI @ gains_IK / clips, np.square(gains_IK).mean(axis=0))
    p_value = float((t_RK.max(axis=1) >= t_RK[0, winner] - 1e-9).mean())
    counts_RI = rng.multinomial(clips, np.full(clips, 1 / clips), size=RESAMPLES)
    best_R = (counts_RI @ np.vstack([base, losses]).T).argmin(axis=1)  # of equal ones the base, then the first
    others = ((index, compare_clips(losses_KI[winner], row)) for index, row in enumerate(losses_KI) if index != winner)
    equals = tuple(index for index, other in others if other is not None and not other.is_significant)
    return Pick(winner, change, p_value, float((best_R == winner + 1).mean()), equals)


def _compute_t(means_RK: np.ndarray, squares_K: np.ndarray) -> np.ndarray:
    """Means in units of √variance, up to a constant factor; 0 where all differences are 0."""
    variance_RK = np.maximum(squares_K - np.square(means_RK), 1e-9 * squares_K)
    return np.divide(means_RK, np.sqrt(variance_RK), out=np.zeros_like(means_RK), where=variance_RK > 0)
