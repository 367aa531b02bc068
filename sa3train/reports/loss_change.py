"""By how much losses differ from the base model's, and how sure that is: the one rule of reports, picks and `sa3-eval`.

Losses of clips differ a lot (that of a clipped loop may be 25 times another's), so that one clip would decide over
their mean. So each clip is compared with itself, by the ratio of its losses: a change is that of the geometric mean,
and its interval that of the mean logarithm of the ratios.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

LEAST_LOSS = 1e-9
"""What a loss of 0 counts as, which has no logarithm: that of silence after round trips."""
MIN_CLIPS = 5
"""With fewer clips nothing can be told from chance: that all of four fall by chance alone, 2⁻⁴, is above 5 %."""
CONFIDENCE = 0.95
"""Level of the intervals."""
SMALLEST = 0.0005
"""Smallest relative change that is one: what reads 0.0% is no gain, however sure."""


@dataclass(frozen=True)
class LossChange:
    """Relative difference of the losses of some clips from the base model's.

    Attributes:
        change: The geometric mean of the ratios of the same clip, less 1: -0.1 for 10 % below the base.
        clips: Number of clips.
        margin: From there to the end of the 95 % confidence interval that is nearer to 0 (Student's t for pairs, of
            logarithms: `exp(mean ± t·s/√n)`); None for fewer than two.
    """

    change: float
    clips: int
    margin: float | None = None

    @property
    def is_able(self) -> bool:
        """Whether there are enough clips to tell a change from chance."""
        return self.margin is not None and self.clips >= MIN_CLIPS

    @property
    def is_significant(self) -> bool:
        """Whether there are enough clips, the interval leaves out 0, and the change does not read 0.0%."""
        return self.is_able and abs(self.change) > max(self.margin or 0.0, SMALLEST)

    def format(self) -> str:
        """Format the change with its sign.

        Returns:
            Text such as "-10.0%"; "0.0%" has no sign.
        """
        return "0.0%" if abs(self.change) < SMALLEST else f"{self.change:+.1%}"

    def describe(self, base: str = "") -> str:
        """Describe the change in words.

        Args:
            base: What it is compared with, such as "the base model's"; empty to leave it out.

        Returns:
            Text such as "10.0% lower per clip than the base model's (±3.1%, 16 clips)".
        """
        if abs(self.change) < SMALLEST:
            change, link = "the same", "as"
        else:
            change, link = f"{abs(self.change):.1%} {'lower' if self.change < 0 else 'higher'} per clip", "than"
        return f"{change} {f'{link} {base} ' if base else ''}({self.describe_sample()})"

    def describe_sample(self) -> str:
        """Describe what the change is measured on.

        Returns:
            Text such as "±3.1%, 16 clips", and whether that is too little to tell the change from 0.
        """
        doubt = ": within noise" if self.is_able else ": too few to tell"
        margin = "" if self.margin is None else f"±{self.margin:.1%}, "
        return f"{margin}{self.clips} clip{'s' * (self.clips != 1)}{'' if self.is_significant else doubt}"


def compare_clips(base_I: Sequence[float] | np.ndarray, other_I: Sequence[float] | np.ndarray) -> LossChange | None:
    """Compare two losses of the same clips, each clip with itself.

    Args:
        base_I: Losses of the base.
        other_I: Losses of the same clips with the adapter.

    Returns:
        The change, or None without clips.
    """
    if not len(base_I):
        return None
    logs_I = take_logs(other_I) - take_logs(base_I)
    mean, half = float(logs_I.mean()), compute_margin(logs_I)
    margin = None if half is None else float(np.abs(np.exp(mean - np.copysign(half, mean)) - np.exp(mean)))
    return LossChange(float(np.expm1(mean)), len(logs_I), margin)


def take_logs(losses: Any) -> np.ndarray:
    """Take the logarithms of losses, whose differences do not depend on how large the loss of a clip is.

    Args:
        losses: Losses, of any shape.

    Returns:
        Their logarithms.
    """
    return np.log(np.maximum(np.asarray(losses, float), LEAST_LOSS))


def compute_margin(differences_I: Sequence[float] | np.ndarray) -> float | None:
    """Compute half of the 95 % confidence interval of a mean (Student's t).

    Args:
        differences_I: The values, such as differences of pairs.

    Returns:
        The margin; None for fewer than two values.
    """
    count = len(differences_I)
    if count < 2:
        return None
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * np.std(differences_I, ddof=1) / np.sqrt(count))


def compute_loss_change(validation: Mapping[str, Any], part: str) -> LossChange | None:
    """Compute the change of the last validation loss.

    Args:
        validation: Content of `validation.json`.
        part: `val` (held-out clips) or `train_eval` (training clips).

    Returns:
        The change, or None where there is none.
    """
    items = validation.get("items", {}).get(part, [])
    return compare_clips(*([item[name] for item in items] for name in ("base", "adapter")))


def compute_change(base: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Compute the change of one validation from the base's.

    Args:
        base: A part of `base` in `validation.json`.
        row: The same part of a row of its `history`.

    Returns:
        The change, clip by clip; of the mean loss where losses of single clips are missing.
    """
    pair = (base, row)
    has_clips = all("by_clip" in each for each in pair)
    found = compare_clips(*(each["by_clip"] if has_clips else [each["loss"]] for each in pair))
    assert found is not None
    return found.change
