"""Truncate weight changes to a low rank, in float64, and measure the truncation error.

Shape suffixes: O rows (out), I columns (in, or in·taps), R rank, K the smaller of O and I.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.spec import MAX_RANK
from sa3train.core.errors import AdapterError
from sa3train.core.text import compute_relative_norm, format_share, list_few

SHOWN = 1e-6
"""Smallest error that is shown as a number."""
LITTLE = 0.1
"""Relative error up to which a truncation needs no advice."""


@dataclass(frozen=True)
class Truncation:
    """The rank to truncate to. Construction raises `AdapterError` unless exactly one setting is given and in range.

    Attributes:
        rank: The rank, from 1 to 16384.
        explained_variance: The share of Σσ² to keep, in (0, 1]: each layer gets the smallest rank that reaches it.
    """

    rank: int | None = None
    explained_variance: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.explained_variance is None):
            raise AdapterError("Give either a rank or an explained variance.")
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise AdapterError(f"rank must be from 1 to {MAX_RANK}, not {self.rank}.")
        if self.explained_variance is not None and not 0 < self.explained_variance <= 1:
            raise AdapterError(f"explained_variance must be above 0 and at most 1, not {self.explained_variance}.")

    def choose_rank(self, squares_K: Tensor) -> int:
        """Choose the rank of one layer.

        Args:
            squares_K: Squared singular values in falling order.

        Returns:
            The rank, at least 1.
        """
        if self.rank is not None:
            return self.rank
        assert self.explained_variance is not None
        total = squares_K.sum()
        reached = torch.cumsum(squares_K, 0) >= self.explained_variance * total * (1 - 1e-12)
        return max(1, int((~reached).sum()) + 1) if total > 0 else 1

    def describe(self) -> dict[str, Any]:
        """Describe the setting for an adapter's history.

        Returns:
            The one setting that was given, by name.
        """
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class LowRankFactors:
    """A truncated change B·A.

    Attributes:
        B_OR: Left factor.
        A_RI: Right factor.
        error: Squared Frobenius norm of what was truncated.
        total: Squared Frobenius norm of the whole change.
        squares_K: Squared singular values of the whole change in falling order.
    """

    B_OR: Tensor
    A_RI: Tensor
    error: float
    total: float
    squares_K: Tensor


@dataclass
class ErrorByLayer:
    """How far written weight changes are from the original ones.

    Attributes:
        layers: (error², change²) by module path, in squared Frobenius norms.
        not_carried: What could not be carried over at all.
        lost_R: What each rank loses of all layers that were truncated, in squared Frobenius norms.
    """

    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    not_carried: list[str] = field(default_factory=list)
    lost_R: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), repr=False, compare=False)

    def add(self, path: str, part: LowRankFactors) -> None:
        """Add a truncated layer.

        Args:
            path: Its module path.
            part: What it was truncated to.
        """
        self.layers[path] = (part.error, part.total)
        tails_R = part.squares_K.cpu().flip(0).cumsum(0).flip(0)
        length = max(len(tails_R), len(self.lost_R))
        pads = (torch.nn.functional.pad(each, (0, length - len(each))) for each in (self.lost_R, tails_R))
        self.lost_R = torch.stack(list(pads)).sum(0)

    @property
    def advice(self) -> list[str]:
        """Which rank would lose little, where the one that was given loses more."""
        if not len(self.lost_R) or self.relative <= LITTLE:
            return []
        enough = int((self.lost_R > LITTLE**2 * self.lost_R[0]).sum())
        share = 1 - LITTLE**2
        return [
            f"explained variance {1 - self.relative**2:.1%}: rank={enough} would reach {share:.0%} (an error of "
            f"{LITTLE:.0%}), and explained_variance={share:g} that with the smallest rank in each layer"
        ]

    @property
    def warnings(self) -> list[str]:
        """What could not be carried over, in one line."""
        return [f"not carried over: {list_few(self.not_carried, 3)}"] if self.not_carried else []

    @property
    def relative(self) -> float:
        """‖error‖ / ‖change‖ over all layers."""
        error, total = (sum(pair[part] for pair in self.layers.values()) for part in (0, 1))
        return compute_relative_norm(error, total) if total > 0 else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest relative error, and that error."""
        found = {path: compute_relative_norm(*pair) for path, pair in self.layers.items() if pair[1] > 0}
        return max(found.items(), key=lambda item: item[1], default=("none", 0.0))

    @property
    def summary(self) -> str:
        """The errors in words."""
        path, worst = self.worst
        if worst < SHOWN:
            return f"below {format_share(SHOWN)} of the change" if worst else "none"
        return f"{format_share(self.relative)} of the change over all layers, at most {format_share(worst)} ({path})"


Product = tuple[Tensor, Tensor | None]
"""A change as its factors (B, A), or as a full matrix (change, None)."""


def truncate_product(B_OR: Tensor, A_RI: Tensor, truncation: Truncation) -> LowRankFactors:
    """Truncate B·A by an SVD that never builds the product.

    Args:
        B_OR: Left factor.
        A_RI: Right factor.
        truncation: The rank to truncate to; factors of lower rank are padded with zeros.

    Returns:
        The best factors of that rank.

    Raises:
        AdapterError: If a factor holds NaN or infinity.
    """
    _check_finite(B_OR, A_RI)
    Q_OK, left = torch.linalg.qr(B_OR.double())
    Q_IK, right = torch.linalg.qr(A_RI.double().T)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    rank = truncation.choose_rank(S.square())
    B, A = _pad(Q_OK @ (U * S.sqrt())[:, :rank], (Q_IK @ (Vh.T * S.sqrt())[:, :rank]).T, rank)
    return LowRankFactors(B, A, float(S[rank:].square().sum()), float(S.square().sum()), S.square())


def truncate_matrix(D_OI: Tensor, truncation: Truncation) -> LowRankFactors:
    """Truncate a full matrix by the eigenvectors of its smaller Gram matrix.

    Args:
        D_OI: The change.
        truncation: The rank to truncate to.

    Returns:
        The best factors of that rank.

    Raises:
        AdapterError: If the change holds NaN or infinity.
    """
    _check_finite(D_OI)
    D = D_OI.double()
    tall = D.shape[0] >= D.shape[1]
    values, vectors = torch.linalg.eigh(D.T @ D if tall else D @ D.T)
    squares, Q = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = truncation.choose_rank(squares)
    Q = Q[:, :rank]
    long = D @ Q if tall else D.T @ Q
    root = torch.linalg.vector_norm(long, dim=0).sqrt()  # halves of σ on both sides keep F16 away from its limits
    scaled, unit = long / root.clamp_min(1e-150), Q * root
    B, A = _pad(*((scaled, unit.T) if tall else (unit, scaled.T)), rank)
    return LowRankFactors(B, A, float((D - B @ A).square().sum()), float(D.square().sum()), squares)


def compute_inner_product(first: Product, second: Product) -> float:
    """Compute ⟨X, Y⟩ of two changes of one shape; of factors neither product is built.

    Args:
        first: X.
        second: Y.

    Returns:
        Σ X_ij Y_ij.
    """
    (B, A), (D, C) = first, second
    if A is not None and C is not None:
        return float(((B.T @ D) * (A @ C.T)).sum())
    return float(((B if A is None else B @ A) * (D if C is None else D @ C)).sum())


def _check_finite(*tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise AdapterError(
            "The change holds NaN or infinity, so it cannot be truncated. The adapter's training diverged. Use an "
            "earlier checkpoint, or see which file it is with sa3-adapter inspect."
        )


def _pad(B_OR: Tensor, A_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - B_OR.shape[1]
    if missing <= 0:
        return B_OR, A_RI
    B_padded = torch.cat((B_OR, B_OR.new_zeros(B_OR.shape[0], missing)), 1)
    return B_padded, torch.cat((A_RI, A_RI.new_zeros(missing, A_RI.shape[1])))
