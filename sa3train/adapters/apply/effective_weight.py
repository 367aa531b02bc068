"""The mathematics of the SA3 adapter family: from a weight and an adapter's tensors to the effective weight.

W is (out, in); a convolution's (out, in, taps) is flattened to (out, in·taps). s is alpha / rank × strength.
Shape suffixes: O rows (out), I columns (in, or in·taps), R rank.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sa3train.adapters.apply.products import OFT, expand_product, rotate_rows
from sa3train.adapters.spec import KINDS, AdapterKind
from sa3train.core.errors import AdapterError

EPSILON = 1e-12
"""Added to every norm, as the released models do."""

COMFY_EPSILON = torch.finfo(torch.float32).eps
"""Added to the norms of its DoRA by ComfyUI."""


BLOCK_VALUES = 2**18
"""Values of one fp32 block: 1 MiB."""

MIN_BLOCKS = 4
"""Least number of blocks of a weight, so that none is weight-sized."""


def flatten_weight(W: Tensor) -> Tensor:
    """Flatten a weight to a matrix.

    Args:
        W: Weight of a Linear (out, in) or a Conv1d (out, in, taps).

    Returns:
        A view of shape (out, in) or (out, in·taps).
    """
    return W.reshape(W.shape[0], -1)


def iterate_row_blocks(W_OI: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Iterate over a weight block by block of its rows.

    Block and buffer reuse the same memory each time: fresh memory would cost more than what is computed. On a GPU the
    whole weight is one block, since launches cost more there than passes over memory.

    Args:
        W_OI: The weight.

    Yields:
        The rows, the block (N, I) in fp32, and a buffer of its size; both are valid until the next.
    """
    rows, columns = W_OI.shape
    step = rows if W_OI.device.type != "cpu" else max(1, min(BLOCK_VALUES // columns, rows // MIN_BLOCKS))
    exact = W_OI.dtype == torch.float32
    buffer_NI = torch.empty(step, columns, device=W_OI.device)
    copy_NI = None if exact else torch.empty_like(buffer_NI)
    for start in range(0, rows, step):
        block_NI = W_OI[start : start + step]
        size = block_NI.shape[0]
        if copy_NI is not None:
            block_NI = copy_NI[:size].copy_(block_NI)
        yield slice(start, start + size), block_NI, buffer_NI[:size]


def compute_effective_weight(
    adapter_type: str, W: Tensor, params: Mapping[str, Tensor], strength_scale: float
) -> Tensor:
    """Compute the effective weight W' of an adapter; differentiable in every tensor of a type that can be trained.

    lora: W + sΔ. dora: magnitude · V/‖V‖ with V = W + sΔ, per row or per column. bora: H = magnitude_r · V/‖V‖row, then
    magnitude_c · H/‖H‖col. Δ = B·A, and for -xs types U·M·Vᵀ. diff: W + s × the stored delta. comfy: Δ may be one of
    `products`, and a magnitude divides columns by the norms of V, but rows by those of W. Sources: the released
    implementation; ComfyUI 0.33.0; docs/model.md, section 7.

    Args:
        adapter_type: One of `KINDS`, "diff", "comfy", or "dora" of old files, where the magnitude's shape tells rows
            from columns.
        W: The weight to adapt, (out, in) or (out, in, taps).
        params: The adapter's tensors by name, with U and V of -xs types (see `svd_basis`).
        strength_scale: s, that is alpha / rank × strength.

    Returns:
        W' in W's shape, in at least fp32.

    Raises:
        AdapterError: If the type is unknown.
    """
    W_OI = flatten_weight(W).to(torch.promote_types(W.dtype, torch.float32))
    params = {name: tensor.to(W_OI.device, W_OI.dtype) for name, tensor in params.items()}
    if adapter_type == "dora":
        adapter_type = detect_dora_type(params["magnitude"])
    if adapter_type == "diff":
        change = params.get("diff")  # absent where only the bias changes
        return (W_OI if change is None else W_OI + strength_scale * flatten_weight(change)).reshape(W.shape)
    if adapter_type == "comfy":
        return _compute_comfy(W_OI, params, strength_scale).reshape(W.shape)
    if adapter_type not in KINDS:
        raise AdapterError(f"Unknown adapter_type {adapter_type!r}. Choose one of {', '.join(KINDS)}.")
    V_OI = torch.addmm(W_OI, *_get_factors(KINDS[adapter_type], params), alpha=strength_scale)
    return _renormalize(KINDS[adapter_type], V_OI, params)[0].reshape(W.shape)


class FactoredWeight(NamedTuple):
    """An effective weight as parts: W' = gain_O ⊙ W ⊙ gain_I + B·A.

    Attributes:
        B_OR: Left factor.
        A_RI: Right factor.
        gain_O: Gain of each row, 1 for a type without.
        gain_I: Gain of each column, 1 for a type without.
    """

    B_OR: Tensor
    A_RI: Tensor
    gain_O: Tensor
    gain_I: Tensor


@torch.no_grad()
def compute_gains(
    kind: AdapterKind, W: Tensor, params: Mapping[str, Tensor], strength_scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the gains of the rows and columns of an effective weight.

    Args:
        kind: The adapter type.
        W: The weight to adapt.
        params: The adapter's tensors by name in fp32, with U and V of -xs types.
        strength_scale: s, that is alpha / rank × strength.

    Returns:
        (O,) and (I,) in fp32, 1 for a type without.
    """
    W_OI = flatten_weight(W)
    gain_O1 = gain_1I = torch.ones(1, 1, device=W.device)
    if kind.scales_rows or kind.scales_columns:
        V_OI = torch.addmm(W_OI.float(), *_get_factors(kind, params), alpha=strength_scale)
        _, gain_O1, gain_1I = _renormalize(kind, V_OI, params)
    return gain_O1[:, 0].expand(W_OI.shape[0]), gain_1I[0].expand(W_OI.shape[1])


@torch.no_grad()
def factor_effective_weight(
    kind: AdapterKind, params: Mapping[str, Tensor], strength_scale: float, gains: tuple[Tensor, Tensor]
) -> FactoredWeight:
    """Compute the parts of the effective weight that `compute_effective_weight` computes.

    Args:
        kind: The adapter type.
        params: The adapter's tensors by name in fp32, with U and V of -xs types.
        strength_scale: s, that is alpha / rank × strength.
        gains: The gains of `compute_gains`.

    Returns:
        The parts, fp32.
    """
    B_OR, A_RI = _get_factors(kind, params)
    return FactoredWeight(strength_scale * B_OR * gains[0][:, None], A_RI * gains[1], *gains)


def _get_factors(kind: AdapterKind, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, A) with Δ = B·A."""
    if kind.is_xs:
        return params["U"] @ params["M_xs"], params["V"].T
    return params["lora_B"], params["lora_A"]


def _renormalize(kind: AdapterKind, V_OI: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Renormalize rows and columns, and return the gains of both too."""
    multiply = Tensor.mul if torch.is_grad_enabled() else Tensor.mul_  # a weight of medium has 75 MB
    gain_O1 = gain_1I = V_OI.new_ones(1, 1)
    if kind.scales_rows:
        gain_O1 = _compute_gain(V_OI, params["magnitude_r" if kind.scales_columns else "magnitude"], dim=1)
        V_OI = multiply(V_OI, gain_O1)
    if kind.scales_columns:
        gain_1I = _compute_gain(V_OI, params["magnitude_c" if kind.scales_rows else "magnitude"], dim=0)
        V_OI = multiply(V_OI, gain_1I)
    return V_OI, gain_O1, gain_1I


def _compute_gain(reference_OI: Tensor, magnitude: Tensor, dim: int, epsilon: float = EPSILON) -> Tensor:
    """Magnitude / ‖reference‖, with the norms taken along `dim`: 1 for rows, 0 for columns."""
    norms = torch.linalg.vector_norm(reference_OI, dim=dim) + epsilon
    return (magnitude.reshape(-1) / norms).unsqueeze(dim)


def _compute_comfy(W_OI: Tensor, params: Mapping[str, Tensor], scale: float) -> Tensor:
    if OFT in params:
        return torch.lerp(W_OI, rotate_rows(W_OI, params[OFT]), scale)
    if "lora_A" in params:
        V_OI = torch.addmm(W_OI, params["lora_B"], params["lora_A"], alpha=scale)
    else:
        V_OI = torch.add(W_OI, expand_product(params), alpha=scale)
    if (magnitude := params.get("magnitude")) is None:
        return V_OI
    by_row = magnitude.shape[0] == W_OI.shape[0]  # as ComfyUI distinguishes them: (out, 1), else (1, in)
    return V_OI.mul_(_compute_gain(W_OI if by_row else V_OI, magnitude, 1 if by_row else 0, COMFY_EPSILON))


def detect_dora_type(magnitude: Tensor) -> str:
    """Detect the type of an old file whose type is "dora".

    Args:
        magnitude: A layer's magnitude: (1, n) is per column, (n, 1) and (n,) are per row.

    Returns:
        "dora-cols" or "dora-rows".
    """
    per_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
    return "dora-cols" if per_column else "dora-rows"


def init_parameters(kind: AdapterKind, W: Tensor, rank: int) -> dict[str, Tensor]:
    """Initialize an adapter's tensors so that the effective weight is W.

    Args:
        kind: The adapter type.
        W: The layer's weight.
        rank: Rank of the adapter.

    Returns:
        fp32 tensors on W's device by name: A Kaiming-uniform (a = √5), B and M zero, magnitudes W's norms.
    """
    W_OI = flatten_weight(W.detach()).float()
    shapes = kind.shapes(W_OI.shape[0], W_OI.shape[1], rank)
    params: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name == "lora_A":
            bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = √5 over a fan-in of I
            params[name] = torch.empty(shape).uniform_(-bound, bound).to(W.device)  # drawn on the CPU, of its generator
        elif name.startswith("magnitude"):
            by_row = name == "magnitude_r" or (name == "magnitude" and kind.scales_rows)
            params[name] = torch.linalg.vector_norm(W_OI, dim=1 if by_row else 0)
        else:
            params[name] = torch.zeros(shape, device=W.device)
    return params
