"""By how much the validation loss differs from the base model's, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Level of the intervals."""
SMALLEST = 0.0005
"""Smallest relative change that is one: what reads 0.0% is no gain, however sure."""


@dataclass(frozen=True)
class LossChange:
    """Relative difference of the mean of some clips from the base model's.

    Attributes:
        change: The difference, such as -0.1 for 10 % below the base.
        clips: Number of clips.
        margin: Half of the 95 % confidence interval, from the differences of single clips (Student's t for pairs);
            None for fewer than two.
    """

    change: float
    clips: int
    margin: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out 0, and the change does not read 0.0%."""
        return self.margin is not None and abs(self.change) > max(self.margin, SMALLEST)

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
            Text such as "10.0% lower than the base model's (±3.1%, 16 clips)".
        """
        if abs(self.change) < SMALLEST:
            change, link = "the same", "as"
        else:
            change, link = f"{abs(self.change):.1%} {'lower' if self.change < 0 else 'higher'}", "than"
        return f"{change} {f'{link} {base} ' if base else ''}({self.describe_sample()})"

    def describe_sample(self) -> str:
        """Describe what the change is measured on.

        Returns:
            Text such as "±3.1%, 16 clips", and whether that is too little to tell the change from 0.
        """
        if self.margin is None:
            return "1 clip: too few to tell"
        return f"±{self.margin:.1%}, {self.clips} clips{'' if self.is_significant else ': within noise'}"


def compare_clips(base_I: Sequence[float] | np.ndarray, other_I: Sequence[float] | np.ndarray) -> LossChange | None:
    """Compare two values of the same clips, relative to the first.

    Args:
        base_I: Values of the base.
        other_I: Values of the same clips with the adapter.

    Returns:
        The change of the mean, or None without clips or with a base of 0.
    """
    base_I, other_I = np.asarray(base_I, float), np.asarray(other_I, float)
    if not len(base_I) or not base_I.mean():
        return None
    scale = abs(base_I.mean())
    return LossChange(float((other_I - base_I).mean() / scale), len(base_I), compute_margin((other_I - base_I) / scale))


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
