"""Changes of weights cut down to a low rank, in float64, with what is lost.

Shape suffixes: O rows (out), I columns (in, or in·taps), R rank, K the smaller of O and I.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa3train.core.errors import AdapterError


@dataclass(frozen=True)
class Cut:
    """How far to cut: to a `rank`, or to the smallest rank that keeps the share `energy` of Σσ². Exactly one is given.

    Raises `AdapterError` otherwise, and for a value out of range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise AdapterError("say how far to cut, in one way: a rank, or a share of the energy.")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"a rank must be at least 1, not {self.rank}.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"a share of the energy must be above 0 and at most 1, not {self.energy}.")

    def kept(self, squares: Tensor) -> int:
        """How many of the squared singular values, falling, are kept; at least 1."""
        if self.rank is not None:
            return self.rank
        assert self.energy is not None
        total = squares.sum()
        reached = torch.cumsum(squares, 0) >= self.energy * total * (1 - 1e-12)
        return max(1, int((~reached).sum()) + 1) if total > 0 else 1


@dataclass(frozen=True)
class LowRank:
    """A change B·A (B (O,R), A (R,I)), the squared norm it lost, and the squared norm of the whole."""

    B_OR: Tensor
    A_RI: Tensor
    lost: float
    total: float


@dataclass
class Loss:
    """(lost², total²) by layer, in squared Frobenius norms, and what could not be carried at all."""

    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """‖change lost‖ / ‖change‖ over all layers."""
        return _root_of_ratio(
            sum(lost for lost, _ in self.layers.values()), sum(all_ for _, all_ in self.layers.values())
        )

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest relative loss, and that loss."""
        found = {path: _root_of_ratio(*pair) for path, pair in self.layers.items()}
        return max(found.items(), key=lambda item: item[1], default=("none", 0.0))


def cut_product(B_OR: Tensor, A_RI: Tensor, cut: Cut) -> LowRank:
    """B·A cut by an SVD that never builds the product."""
    Q_OK, left = torch.linalg.qr(B_OR.double())
    Q_IK, right = torch.linalg.qr(A_RI.double().T)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    rank = cut.kept(S.square())
    B, A = _padded(Q_OK @ (U * S.sqrt())[:, :rank], (Q_IK @ (Vh.T * S.sqrt())[:, :rank]).T, rank)
    return LowRank(B, A, float(S[rank:].square().sum()), float(S.square().sum()))


def cut_matrix(D_OI: Tensor, cut: Cut) -> LowRank:
    """A whole matrix cut to the best of a low rank, by the eigenvectors of its smaller Gram matrix."""
    D = D_OI.double()
    tall = D.shape[0] >= D.shape[1]
    values, vectors = torch.linalg.eigh(D.T @ D if tall else D @ D.T)
    squares, Q = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = cut.kept(squares)
    Q = Q[:, :rank]
    long = D @ Q if tall else D.T @ Q
    root = torch.linalg.vector_norm(long, dim=0).sqrt()  # halves of σ on both sides keep F16 away from its limits
    scaled, unit = long / root.clamp_min(1e-150), Q * root
    B, A = _padded(*((scaled, unit.T) if tall else (unit, scaled.T)), rank)
    return LowRank(B, A, float((D - B @ A).square().sum()), float(D.square().sum()))


Product = tuple[Tensor, Tensor | None]
"""A change as its factors (B, A), or whole as (change, None)."""


def inner_product(first: Product, second: Product) -> float:
    """⟨X, Y⟩ of two changes; where both are factors, neither product is built."""
    (B, A), (D, C) = first, second
    if A is not None and C is not None:
        return float(((B.T @ D) * (A @ C.T)).sum())
    return float(((B if A is None else B @ A) * (D if C is None else D @ C)).sum())


def shape_of(product: Product) -> tuple[int, int]:
    """(out, in) of a change."""
    B, A = product
    return B.shape[0], (B if A is None else A).shape[1]


def _padded(B_OR: Tensor, A_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - B_OR.shape[1]
    if missing <= 0:
        return B_OR, A_RI
    return torch.cat((B_OR, B_OR.new_zeros(B_OR.shape[0], missing)), 1), torch.cat(
        (A_RI, A_RI.new_zeros(missing, A_RI.shape[1]))
    )


def _root_of_ratio(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total > 0 else 0.0
