"""The adapter family as mathematics: from a weight and an adapter's tensors to the effective weight.

W is (out, in); a convolution's (out, in, taps) is flattened to (out, in·taps). s is alpha / rank × strength.
Shape suffixes: O rows (out), I columns (in, or in·taps), R rank.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sa3train.adapters.spec import KINDS, Kind
from sa3train.core.errors import AdapterError

EPSILON = 1e-12
"""Added to every norm, as the released models do."""


def flatten_weight(W: Tensor) -> Tensor:
    """(out, in) of a Linear's weight, or of a Conv1d's (out, in, taps)."""
    return W.reshape(W.shape[0], -1)


def row_norms(V_OI: Tensor) -> Tensor:
    """Norm of each row plus 1e-12, (O,)."""
    return torch.linalg.vector_norm(V_OI, dim=1) + EPSILON


def column_norms(V_OI: Tensor) -> Tensor:
    """Norm of each column plus 1e-12, (I,)."""
    return torch.linalg.vector_norm(V_OI, dim=0) + EPSILON


def effective_weight(kind: str, W: Tensor, params: Mapping[str, Tensor], strength_scale: float) -> Tensor:
    """W' of `kind` at s = `strength_scale`, in at least fp32 and in W's shape; differentiable in every tensor.

    lora W + sΔ; dora magnitude · V/‖V‖ with V = W + sΔ, per row or per column; bora H = magnitude_r · V/‖V‖row, then
    magnitude_c · H/‖H‖col. Δ = B·A, and for the -xs kinds U·M·Vᵀ, whose U and V are read from `params` too (see
    `basis`). `diff` adds s × the stored difference. `comfy-dora` divides by the norm of W itself. Legacy `dora` tells
    rows from columns by the magnitude's shape. The source of the formulae is the released implementation.
    """
    W_OI = flatten_weight(W).to(torch.promote_types(W.dtype, torch.float32))
    params = {name: tensor.to(W_OI.device, W_OI.dtype) for name, tensor in params.items()}
    if kind == "dora":
        kind = legacy_dora_kind(params["magnitude"])
    if kind == "diff":
        change = params.get("diff")  # absent where only the bias changes
        return (W_OI if change is None else W_OI + strength_scale * flatten_weight(change)).reshape(W.shape)
    if kind == "comfy-dora":
        return _comfy_dora(W_OI, params, strength_scale).reshape(W.shape)
    if kind not in KINDS:
        raise AdapterError(f"unknown adapter kind {kind!r}; choose one of {', '.join(KINDS)}.")
    V_OI = torch.addmm(W_OI, *_factors(KINDS[kind], params), alpha=strength_scale)
    return _renormalised(KINDS[kind], V_OI, params).reshape(W.shape)


def _factors(kind: Kind, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, A) with Δ = B·A."""
    if kind.xs:
        return params["U"] @ params["M_xs"], params["V"].T
    return params["lora_B"], params["lora_A"]


def _renormalised(kind: Kind, V_OI: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    if kind.rows:
        magnitude_O = params["magnitude_r" if kind.cols else "magnitude"].reshape(-1)
        V_OI = V_OI * (magnitude_O / row_norms(V_OI))[:, None]
    if kind.cols:
        magnitude_I = params["magnitude_c" if kind.rows else "magnitude"].reshape(-1)
        V_OI = V_OI * (magnitude_I / column_norms(V_OI))[None, :]
    return V_OI


def _comfy_dora(W_OI: Tensor, params: Mapping[str, Tensor], scale: float) -> Tensor:
    V_OI = torch.addmm(W_OI, params["lora_B"], params["lora_A"], alpha=scale)
    magnitude = params["magnitude"].reshape(-1)
    if params["magnitude"].shape[0] == W_OI.shape[0]:  # as ComfyUI tells them: (out, 1), else (1, in)
        return V_OI * (magnitude / row_norms(W_OI))[:, None]
    return V_OI * (magnitude / column_norms(W_OI))[None, :]


def legacy_dora_kind(magnitude: Tensor) -> str:
    """What a file of the old type `dora` is: magnitude (1, n) is per column; (n, 1) and (n,) are per row."""
    per_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1
    return "dora-cols" if per_column else "dora-rows"


def initial_parameters(kind: Kind, W: Tensor, rank: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Tensors at which the effective weight is W, fp32: A Kaiming-uniform (a = √5), B and M 0, magnitudes W's norms."""
    W_OI = flatten_weight(W.detach()).float()
    shapes = kind.shapes(W_OI.shape[0], W_OI.shape[1], rank)
    params: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name == "lora_A":
            bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = √5 over a fan-in of I
            A_RI = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            params[name] = A_RI.to(W.device)
        elif name.startswith("magnitude"):
            by_row = name == "magnitude_r" or (name == "magnitude" and kind.rows)
            params[name] = torch.linalg.vector_norm(W_OI, dim=1 if by_row else 0)
        else:
            params[name] = torch.zeros(shape, device=W.device)
    return params
