"""Gains of adapted layers of one shape, stacked, and their gradients: N layers in front.

The formulas are those of `weight_norms`, and for -xs types those of `weight_norms_xs`. Gains of columns are those of
the rows of Vᵀ = Wᵀ + s·AᵀBᵀ: for such layers "rows" means columns, O and I change places, and for -xs types U and V
change places and M is transposed. -xs types train M (R, R) alone; their A is Vᵀ and their B is U·M.
Shape suffixes: N layers, O rows (out), I columns (in), R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from sa3train.adapters.layers.frozen_weight import FrozenWeight, compute_product, compute_wide_product, split_bf16
from sa3train.adapters.layers.weight_norms import compute_gain_gradients, compute_root, compute_row_gain_gradients


@dataclass(frozen=True, eq=False)
class LayerState:
    """Parameters and frozen weight of one adapted layer.

    Attributes:
        A_RI: A; None for -xs types.
        B: B, or M for -xs types.
        magnitude: Magnitude of the rows or columns that have a gain.
        frozen: The frozen weight.
        scale: The scale s.
        by_rows: Whether the gain is of rows; False for columns.
        column_magnitude: Magnitude of the columns where rows have a gain too (bora).
    """

    A_RI: nn.Parameter | None
    B: nn.Parameter
    magnitude: nn.Parameter | None
    frozen: FrozenWeight
    scale: float
    by_rows: bool = True
    column_magnitude: nn.Parameter | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the type has, in the order of the fields."""
        given = (self.A_RI, self.B, self.magnitude, self.column_magnitude)
        return [each for each in given if each is not None]

    @property
    def stack_key(self) -> tuple[object, ...]:
        """What layers must have in common to be stacked."""
        weight, shapes = self.frozen.weight, tuple(each.shape for each in self.parameters)
        return (self.frozen.W_OI.shape, shapes, self.by_rows, self.scale, weight.dtype, weight.device)

    @property
    def state(self) -> tuple[object, ...]:
        """A value that changes when autograd's version counters see a parameter change."""
        return tuple((each.data_ptr(), each._version) for each in self.parameters)

    @property
    def W_OI(self) -> Tensor:
        """The weight whose rows have the gain."""
        return self.frozen.W_OI if self.by_rows else self.frozen.W_OI.T

    def squares(self) -> Tensor:
        """Return ‖W‖² of each row that has the gain.

        Returns:
            The squares, (O,).
        """
        return self.frozen.row_squares() if self.by_rows else self.frozen.column_squares()


def check_unchanged(layers: Sequence[LayerState], states: Sequence[object]) -> None:
    """Check that no parameter was changed between the forward and the backward pass.

    Args:
        layers: The layers.
        states: Their `state` in the forward pass.

    Raises:
        RuntimeError: If one was changed in place.
    """
    if [layer.state for layer in layers] != list(states):
        raise RuntimeError("An adapter was changed in place between a forward pass and its backward pass.")


def split_by_layer(*stacked: Tensor) -> list[Tensor]:
    """Split stacked gradients into those of each layer's parameters.

    Args:
        *stacked: Gradients of each parameter, layers in front.

    Returns:
        The gradients, layer by layer.
    """
    return [each for gradients in zip(*(part.unbind() for part in stacked), strict=True) for each in gradients]


def gather_parameters(layers: Sequence[LayerState], name: str) -> Tensor:
    """Gather one parameter of all layers.

    Args:
        layers: The layers.
        name: Field of `LayerState`, such as "magnitude".

    Returns:
        The parameters without gradients, layers in front.
    """
    return torch.stack([getattr(layer, name).detach() for layer in layers])


def gather_factors(layers: Sequence[LayerState]) -> tuple[Tensor, Tensor]:
    """Gather the factors of layers (not of -xs types).

    Args:
        layers: The layers.

    Returns:
        Factors (N, O, R) and (N, R, I) of the change of the weight whose rows have the gain.
    """
    A_NRI, B_NOR = gather_parameters(layers, "A_RI"), gather_parameters(layers, "B")
    return (B_NOR, A_NRI) if layers[0].by_rows else (A_NRI.mT, B_NOR.mT)


def compute_products(layers: Sequence[LayerState], right_NRI: Tensor) -> Tensor:
    """Compute W·rightᵀ of each layer, as exact as `compute_product`.

    Args:
        layers: The layers.
        right_NRI: Right factors.

    Returns:
        Products, (N, O, R) fp32.
    """
    weights = [layer.W_OI for layer in layers]
    if weights[0].dtype == torch.float32:
        return torch.stack([W_OI @ right_RI.T for W_OI, right_RI in zip(weights, right_NRI, strict=True)])
    if weights[0].dtype != torch.bfloat16:
        return torch.stack(
            [compute_product(W_OI, right_RI.T) for W_OI, right_RI in zip(weights, right_NRI, strict=True)]
        )
    both_NSI = torch.cat(split_bf16(right_NRI), dim=1)
    stacked = torch.stack(
        [compute_wide_product(W_OI, both_SI.T) for W_OI, both_SI in zip(weights, both_NSI, strict=True)]
    )
    return stacked.unflatten(-1, (2, -1)).sum(dim=-2)


def compute_transposed_products(layers: Sequence[LayerState], left_NOR: Tensor, exact: bool = False) -> Tensor:
    """Compute leftᵀ·W of each layer.

    Args:
        layers: The layers.
        left_NOR: Left factors.
        exact: Whether to keep the left factors from being rounded to the weight's dtype.

    Returns:
        Products, (N, R, I) fp32.
    """
    dtype, left_NRO = layers[0].frozen.weight.dtype, left_NOR.mT
    two = exact and dtype == torch.bfloat16
    given = torch.cat(split_bf16(left_NRO), dim=1) if two else left_NRO.to(dtype)
    stacked = torch.stack([compute_wide_product(each, layer.W_OI) for each, layer in zip(given, layers, strict=True)])
    return stacked.unflatten(1, (2, -1)).sum(dim=1) if two else stacked


def compute_weighted_squares(layers: Sequence[LayerState], weights: Tensor, rows: bool = False) -> Tensor:
    """Compute weighted sums of squares of each layer, one weight at a time.

    Args:
        layers: The layers.
        weights: Weights w, (N, O), or (N, I) with `rows`.
        rows: Whether to sum over each row instead of each column.

    Returns:
        Σ_i w_i W_ij², (N, I), or with `rows` Σ_j w_j W_ij², (N, O).
    """
    found = []
    for layer, weights_ in zip(layers, weights, strict=True):
        squares_OI = layer.W_OI.float().square()
        found.append(torch.mv(squares_OI if rows else squares_OI.T, weights_))
    return torch.stack(found)


class Gains(Function):
    """magnitude / ‖V‖ of the rows of several layers of one shape, (N, O); differentiable in A, B and magnitude."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[LayerState], *parameters: Tensor) -> Tensor:
        product_NOR, norm_NO = _compute_row_norms(layers, *gather_factors(layers))
        gain_NO = gather_parameters(layers, "magnitude") / norm_NO
        # Not by save_for_backward: the first layer that asks may be in a checkpointed block, which would drop them.
        ctx.product_NOR, ctx.norm_NO = product_NOR.to(layers[0].frozen.weight.dtype), norm_NO
        ctx.layers, ctx.states = layers, [layer.state for layer in layers]
        return gain_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        layers = ctx.layers
        check_unchanged(layers, ctx.states)
        gain_NO = gather_parameters(layers, "magnitude") / ctx.norm_NO
        magnitude_NO, square_NO = compute_gain_gradients(grad_NO, gain_NO, ctx.norm_NO)
        left, right = _compute_row_gradients(layers, ctx.product_NOR, *gather_factors(layers), square_NO)
        A, B = (right, left) if layers[0].by_rows else (left.mT, right.mT)
        return None, *split_by_layer(A, B, magnitude_NO)


class BothGains(Function):
    """Bora's gains, (N, O) of rows and (N, I) of columns of H = g ⊙ V; differentiable in all four parameters."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[LayerState], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        scale, dtype = layers[0].scale, layers[0].frozen.weight.dtype
        B_NOR, A_NRI = gather_factors(layers)
        product_NOR, norm_NO = _compute_row_norms(layers, B_NOR, A_NRI)
        gain_NO = gather_parameters(layers, "magnitude") / norm_NO
        weights_NO = gain_NO.square()
        weighted_NOR = weights_NO[..., None] * B_NOR
        back_NRI = compute_transposed_products(layers, weighted_NOR, exact=True)
        sum_NRI = torch.baddbmm(back_NRI, B_NOR.mT @ weighted_NOR, A_NRI, beta=2 * scale, alpha=scale * scale)
        norm_NI = compute_root(compute_weighted_squares(layers, weights_NO), sum_NRI.mul_(A_NRI).sum(dim=1))
        ctx.product_NOR, ctx.back_NRI = product_NOR.to(dtype), back_NRI.to(dtype)
        ctx.norm_NO, ctx.norm_NI = norm_NO, norm_NI
        ctx.layers, ctx.states = layers, [layer.state for layer in layers]
        return gain_NO, gather_parameters(layers, "column_magnitude") / norm_NI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        # The steps are those of `weight_norms.compute_both_gradients`.
        layers, scale = ctx.layers, ctx.layers[0].scale
        check_unchanged(layers, ctx.states)
        B_NOR, A_NRI = gather_factors(layers)
        gain_NO = gather_parameters(layers, "magnitude") / ctx.norm_NO
        second_NI, square_NI = compute_gain_gradients(
            grad_NI, gather_parameters(layers, "column_magnitude") / ctx.norm_NI, ctx.norm_NI
        )
        weighted_NRI = A_NRI * square_NI[:, None]
        crossed_NOR = (B_NOR @ (weighted_NRI @ A_NRI.mT)).mul_(scale)
        P_NOR = compute_products(layers, weighted_NRI)
        through_NO = compute_weighted_squares(layers, square_NI, rows=True)
        through_NO += torch.add(P_NOR, crossed_NOR, alpha=0.5).mul_(B_NOR).sum(dim=-1).mul_(2 * scale)
        magnitude_NO, square_NO = compute_row_gain_gradients(grad_NO, through_NO, gain_NO, ctx.norm_NO)
        grad_B, grad_A = _compute_row_gradients(layers, ctx.product_NOR, B_NOR, A_NRI, square_NO)
        columns_NO1 = gain_NO.square()[..., None]
        back_NRI = ctx.back_NRI.float().mul_(square_NI[:, None])
        grad_A.add_(
            torch.baddbmm(back_NRI, B_NOR.mT @ (columns_NO1 * B_NOR), weighted_NRI, alpha=scale), alpha=2 * scale
        )
        grad_B.addcmul_(P_NOR.add_(crossed_NOR), columns_NO1, value=2 * scale)
        return None, *split_by_layer(grad_A, grad_B, magnitude_NO, second_NI)


def _compute_row_norms(layers: Sequence[LayerState], left_NOR: Tensor, right_NRI: Tensor) -> tuple[Tensor, Tensor]:
    """W·rightᵀ (N, O, R) and the norms of the rows of V (N, O), as `weight_norms.compute_row_norms`."""
    scale, product_NOR = layers[0].scale, compute_products(layers, right_NRI)
    gram_NRR = right_NRI @ right_NRI.mT
    sum_NOR = torch.baddbmm(product_NOR, left_NOR, gram_NRR, beta=2 * scale, alpha=scale * scale)
    base_NO = torch.stack([layer.squares() for layer in layers])
    return product_NOR, compute_root(base_NO, sum_NOR.mul_(left_NOR).sum(dim=-1))


def _compute_row_gradients(
    layers: Sequence[LayerState], product_NOR: Tensor, left_NOR: Tensor, right_NRI: Tensor, square_NO: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors through the squared norms of the rows, given those of the norms."""
    scale, weights_NO1 = layers[0].scale, square_NO[..., None] * (2 * layers[0].scale)
    weighted_NOR = weights_NO1 * left_NOR
    back_NRI = compute_transposed_products(layers, weighted_NOR)
    of_right_NRI = torch.baddbmm(back_NRI, left_NOR.mT @ weighted_NOR, right_NRI, alpha=scale)
    gram_NRR = right_NRI @ right_NRI.mT
    of_left_NOR = torch.baddbmm(product_NOR.float(), left_NOR, gram_NRR, alpha=scale).mul_(weights_NO1)
    return of_left_NOR, of_right_NRI


class ChangesXS(Function):
    """U·M of several layers of one shape, (N, O, R); differentiable in M."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[LayerState], *M_RR: Tensor) -> Tensor:
        ctx.layers = layers
        return _stack_U(layers) @ torch.stack([each.detach() for each in M_RR])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NOR: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_stack_U(ctx.layers).mT @ grad_NOR).unbind()


class GainsXS(Function):
    """magnitude / ‖V‖ of the rows of several layers of one shape, (N, O); differentiable in M and magnitude."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[LayerState], *parameters: Tensor) -> Tensor:
        norm_NO = _compute_row_norms_xs(layers, *_stack_bases(layers))
        ctx.norm_NO, ctx.layers, ctx.states = norm_NO, layers, [layer.state for layer in layers]
        return gather_parameters(layers, "magnitude") / norm_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        layers = ctx.layers
        check_unchanged(layers, ctx.states)
        magnitude_NO, square_NO = compute_gain_gradients(
            grad_NO, gather_parameters(layers, "magnitude") / ctx.norm_NO, ctx.norm_NO
        )
        M_NRR = _compute_row_gradients_xs(layers, *_stack_bases(layers), square_NO)
        M_NRR = M_NRR if layers[0].by_rows else M_NRR.mT
        return None, *split_by_layer(M_NRR, magnitude_NO)


class BothGainsXS(Function):
    """Gains of bora-xs, (N, O) of rows and (N, I) of columns of H = g ⊙ V; differentiable in all three parameters."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[LayerState], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        # The steps are those of `weight_norms_xs.compute_both_norms`.
        scale, (U_NOR, M_NRR, _) = layers[0].scale, _stack_bases(layers)
        V_NIR = _stack_V(layers)
        norm_NO = _compute_row_norms_xs(layers, *_stack_bases(layers))
        gain_NO = gather_parameters(layers, "magnitude") / norm_NO
        weights_NO = gain_NO.square()
        excess_NOR = U_NOR * (weights_NO - 1)[..., None]
        Y_NRI = compute_transposed_products(layers, excess_NOR, exact=True)
        Y_NRI.addcmul_(V_NIR.mT, _stack_singular_values(layers)[..., None])
        middle_NRR = M_NRR.mT @ (_stack_grams_of_U(layers) + U_NOR.mT @ excess_NOR) @ M_NRR
        sum_NIR = torch.baddbmm(V_NIR @ middle_NRR, Y_NRI.mT, M_NRR, beta=scale * scale, alpha=2 * scale)
        norm_NI = compute_root(compute_weighted_squares(layers, weights_NO), sum_NIR.mul_(V_NIR).sum(dim=-1))
        ctx.Y_NRI, ctx.norm_NO, ctx.norm_NI = Y_NRI.to(layers[0].frozen.weight.dtype), norm_NO, norm_NI
        ctx.layers, ctx.states = layers, [layer.state for layer in layers]
        return gain_NO, gather_parameters(layers, "column_magnitude") / norm_NI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        # The steps are those of `weight_norms_xs.compute_both_gradients`.
        layers, scale = ctx.layers, ctx.layers[0].scale
        check_unchanged(layers, ctx.states)
        (U_NOR, M_NRR, gram_of_V_NRR), V_NIR = _stack_bases(layers), _stack_V(layers)
        gain_NO = gather_parameters(layers, "magnitude") / ctx.norm_NO
        second_NI, square_NI = compute_gain_gradients(
            grad_NI, gather_parameters(layers, "column_magnitude") / ctx.norm_NI, ctx.norm_NI
        )
        weighted_NIR = V_NIR * square_NI[..., None]
        gram_NRR = weighted_NIR.mT @ V_NIR
        P_NOR = compute_products(layers, weighted_NIR.mT)
        sum_NOR = torch.baddbmm(
            U_NOR @ (M_NRR @ gram_NRR @ M_NRR.mT), P_NOR, M_NRR.mT, beta=scale * scale, alpha=2 * scale
        )
        through_NO = compute_weighted_squares(layers, square_NI, rows=True).add_(sum_NOR.mul_(U_NOR).sum(dim=-1))
        magnitude_NO, square_NO = compute_row_gain_gradients(grad_NO, through_NO, gain_NO, ctx.norm_NO)
        grad_M = _compute_row_gradients_xs(layers, U_NOR, M_NRR, gram_of_V_NRR, square_NO)
        weighted_gram_NRR = (U_NOR * gain_NO.square()[..., None]).mT @ U_NOR
        columns_NRR = torch.baddbmm(ctx.Y_NRI.float() @ weighted_NIR, weighted_gram_NRR @ M_NRR, gram_NRR, alpha=scale)
        return None, *split_by_layer(grad_M.add_(columns_NRR, alpha=2 * scale), magnitude_NO, second_NI)


def _compute_row_norms_xs(layers: Sequence[LayerState], U_NOR: Tensor, M_NRR: Tensor, gram_of_V_NRR: Tensor) -> Tensor:
    """Norms of the rows of V, (N, O), as `weight_norms_xs.compute_row_norms`."""
    scale, middle_NRR = layers[0].scale, M_NRR @ gram_of_V_NRR
    middle_NRR.mul_(scale * scale).diagonal(dim1=1, dim2=2).add_(_stack_singular_values(layers), alpha=2 * scale)
    base_NO = torch.stack([layer.squares() for layer in layers])
    return compute_root(base_NO, (U_NOR @ (middle_NRR @ M_NRR.mT)).mul_(U_NOR).sum(dim=-1))


def _compute_row_gradients_xs(
    layers: Sequence[LayerState], U_NOR: Tensor, M_NRR: Tensor, gram_of_V_NRR: Tensor, square_NO: Tensor
) -> Tensor:
    """Gradient of M through the squared norms of the rows, given those of the norms."""
    scale, middle_NRR = layers[0].scale, M_NRR @ gram_of_V_NRR
    middle_NRR.mul_(scale).diagonal(dim1=1, dim2=2).add_(_stack_singular_values(layers))
    return ((U_NOR * square_NO[..., None]).mT @ U_NOR @ middle_NRR).mul_(2 * scale)


def _stack_bases(layers: Sequence[LayerState]) -> tuple[Tensor, Tensor, Tensor]:
    """U, M and VᵀV of the weight whose rows have the gain."""
    M_NRR = gather_parameters(layers, "B")
    if layers[0].by_rows:
        return _stack_U(layers), M_NRR, torch.stack([layer.frozen.gram_of_V() for layer in layers])
    return _stack_V(layers), M_NRR.mT, _stack_grams_of_U(layers)


def _stack_U(layers: Sequence[LayerState]) -> Tensor:
    return torch.stack([layer.frozen.bases[0] for layer in layers])


def _stack_V(layers: Sequence[LayerState]) -> Tensor:
    return torch.stack([layer.frozen.bases[1] for layer in layers])


def _stack_singular_values(layers: Sequence[LayerState]) -> Tensor:
    return torch.stack([layer.frozen.singular_values() for layer in layers])


def _stack_grams_of_U(layers: Sequence[LayerState]) -> Tensor:
    return torch.stack([layer.frozen.gram_of_U() for layer in layers])
