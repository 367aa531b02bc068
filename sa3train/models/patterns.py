"""Who sees whom: the token patterns of attention.

Shape legend: B batch, L query tokens, M key tokens.

- `None`: every query sees every key of its batch row.
- `Padded`: keys past an item's real length are never seen.
- `Packed`: one row of several sequences laid end to end; none sees another.
- `Window`: like `Packed`, and only keys at distance <= radius. Linear in memory and time.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Padded:
    """True = real. Real tokens come first in every row (the varlen kernels rely on it)."""

    key_mask_BM: Tensor

    @functools.cached_property
    def bounds(self) -> Tensor:
        """Cumulative token counts (2B + 1,) int32 that make each row's real part and its rest two sequences."""
        rows, length = self.key_mask_BM.shape
        real_B = self.key_mask_BM.sum(dim=1)
        starts_B = torch.arange(rows, device=real_B.device) * length
        bounds = torch.stack((starts_B, starts_B + real_B), dim=1).flatten()
        return torch.cat((bounds, bounds.new_full((1,), rows * length))).to(torch.int32)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row. Waits for the device."""
        return self.key_mask_BM.sum(dim=1).tolist()


@dataclass(frozen=True)
class Packed:
    """Lengths of the sequences that make up the one query row and the one key row."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Lengths of the sequences that make up the one row, and how far each token sees to both sides."""

    lengths: tuple[int, ...]
    radius: int


Pattern = Padded | Packed | Window | None
