"""A frozen weight in training, and what depends on it alone. Shape suffixes: O rows (out), I columns (in), R rank."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sa3train.adapters.products import column_squares, row_squares, times
from sa3train.adapters.weights import flatten_weight


@dataclass(eq=False)
class Frozen:
    """A frozen weight. What depends on it alone is computed on first use, and again when the weight has changed.

    `U_OR` and `V_IR` are the frozen bases of the -xs kinds, W's own singular vectors, or None.
    """

    weight: Tensor
    U_OR: Tensor | None = None
    V_IR: Tensor | None = None
    _state: tuple[object, ...] = ()
    _known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def W_OI(self) -> Tensor:
        """The weight, flattened."""
        return flatten_weight(self.weight.detach())

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """U and V; only the -xs kinds have them."""
        if self.U_OR is None or self.V_IR is None:
            raise RuntimeError("this layer has no frozen bases")
        return self.U_OR, self.V_IR

    def row_squares(self) -> Tensor:
        """‖W‖² of each row, (O,)."""
        return self._kept("rows", lambda: row_squares(self.W_OI))

    def column_squares(self) -> Tensor:
        """‖W‖² of each column, (I,)."""
        return self._kept("columns", lambda: column_squares(self.W_OI))

    def singular_values(self) -> Tensor:
        """σ (R,), with which WV = U·σ and WᵀU = V·σ."""
        U_OR, V_IR = self.bases
        return self._kept("sigma", lambda: (times(self.W_OI, V_IR) * U_OR).sum(dim=0))

    def gram_of_U(self) -> Tensor:
        """UᵀU, (R, R): the identity, but for rounding."""
        return self._kept("UU", lambda: self.bases[0].T @ self.bases[0])

    def gram_of_V(self) -> Tensor:
        """VᵀV, (R, R)."""
        return self._kept("VV", lambda: self.bases[1].T @ self.bases[1])

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(tensor.nbytes for tensor in self._known.values())

    def _kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        weight = self.weight  # its storage may be elsewhere each time (quantised, sharded), with the same values
        state = (weight._version, weight.dtype, weight.device)
        if state != self._state:
            self._state, self._known = state, {}
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]
