"""By how much the validation loss differs from the base model's, and how sure that is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Level of the intervals."""


@dataclass(frozen=True)
class LossChange:
    """Relative difference of the mean loss over some clips from the base model's.

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
        """Whether the interval leaves out 0."""
        return self.margin is not None and abs(self.change) > self.margin

    def describe(self) -> str:
        """Describe the change in words.

        Returns:
            Text such as "10.0% lower (±3.1%, 16 clips)".
        """
        return f"{abs(self.change):.1%} {'lower' if self.change < 0 else 'higher'} ({self.describe_sample()})"

    def describe_sample(self) -> str:
        """Describe what the change is measured on.

        Returns:
            Text such as "±3.1%, 16 clips", and whether that is too little to tell the change from 0.
        """
        if self.margin is None:
            return "1 clip: too few to tell"
        return f"±{self.margin:.1%}, {self.clips} clips{'' if self.is_significant else ': within noise'}"


def compute_loss_change(validation: Mapping[str, Any], part: str) -> LossChange | None:
    """Compute the change of the last validation loss.

    Args:
        validation: Content of `validation.json`.
        part: `val` (held-out clips) or `train_eval` (training clips).

    Returns:
        The change, or None where there is none.
    """
    items = validation.get("items", {}).get(part, [])
    base_I, adapter_I = (np.array([item[name] for item in items]) for name in ("base", "adapter"))
    if not len(items) or not base_I.mean():
        return None
    margin = None
    if len(items) > 1:
        deviation = (adapter_I - base_I).std(ddof=1) / np.sqrt(len(items)) / base_I.mean()
        margin = float(stdtrit(len(items) - 1, (1 + CONFIDENCE) / 2) * deviation)
    return LossChange(float(adapter_I.mean() / base_I.mean() - 1), len(items), margin)
