"""The mathematics of the SA3 adapter family: from a weight and an adapter's tensors to the effective weight.

W is (out, in); a convolution's (out, in, taps) is flattened to (out, in·taps). s is alpha / rank × strength.
Shape suffixes: O rows (out), I columns (in, or in·taps), R rank.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.adapters.apply.products import OFT, expand_product, rotate_rows
from sa3train.adapters.spec import KINDS, AdapterKind
from sa3train.core.errors import AdapterError

EPSILON = 1e-12
"""Added to every norm, as the released models do."""

COMFY_EPSILON = torch.finfo(torch.float32).eps
"""Added to the norms of its DoRA by ComfyUI."""


def flatten_weight(W: Tensor) -> Tensor:
    """Flatten a weight to a matrix.

    Args:
        W: Weight of a Linear (out, in) or a Conv1d (out, in, taps).

    Returns:
        A view of shape (out, in) or (out, in·taps).
    """
    return W.reshape(W.shape[0], -1)


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
    return _renormalize(KINDS[adapter_type], V_OI, params).reshape(W.shape)


def _get_factors(kind: AdapterKind, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, A) with Δ = B·A."""
    if kind.is_xs:
        return params["U"] @ params["M_xs"], params["V"].T
    return params["lora_B"], params["lora_A"]


def _renormalize(kind: AdapterKind, V_OI: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    multiply = Tensor.mul if torch.is_grad_enabled() else Tensor.mul_  # a weight of medium has 75 MB
    if kind.scales_rows:
        V_OI = multiply(V_OI, _compute_gain(V_OI, params["magnitude_r" if kind.scales_columns else "magnitude"], dim=1))
    if kind.scales_columns:
        V_OI = multiply(V_OI, _compute_gain(V_OI, params["magnitude_c" if kind.scales_rows else "magnitude"], dim=0))
    return V_OI


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
