"""Merge and scale adapters with magnitudes exactly, where these are all by row or all by column.

With the gains g = magnitude / ‖W + sBA‖ of each row, W' = g ⊙ (W + sBA), so that

    W + Σ fᵢ (Wᵢ' − W) = q ⊙ W + P   with   q = 1 + Σ fᵢ (gᵢ − 1)   and   P = Σ fᵢ gᵢ ⊙ sᵢ BᵢAᵢ.

That is a dora-rows adapter: ranks add up, B = P_B / q, and the magnitudes are q · ‖W + BA‖. Columns likewise, and a
lora has gains of 1. Shape suffixes: O rows (out), I columns (in), N some of the rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import COMFY_EPSILON, EPSILON, flatten_weight
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.formats.native import build_spec
from sa3train.adapters.spec import BIAS_CHANGE, KINDS, get_layer_type
from sa3train.adapters.tools.base_weights import Weights, get_weight, require_weights
from sa3train.adapters.tools.edit import add_bias_changes
from sa3train.adapters.tools.history import merge_metadata
from sa3train.adapters.tools.low_rank import ErrorByLayer, Truncation, truncate_product

SMALLEST_GAIN = 1e-3
"""Below this |q| a row is made of the low-rank product alone, which no magnitude gives."""

_ROWS = 1024  # of a weight that are in float64 at once


def find_axis(adapters: Sequence[Adapter]) -> str | None:
    """Find along what the magnitudes of adapters lie.

    Args:
        adapters: The adapters.

    Returns:
        "rows", "cols", "" where none has any, or None where they cannot be merged exactly: both, or a layer that is no
        lora and no DoRA.
    """
    axes: set[str | None] = set()
    for adapter in adapters:
        for params in adapter.tensors.values():
            layer_type = get_layer_type(adapter.spec.adapter_type, params)
            kind = KINDS.get(layer_type)
            if params.keys() == {BIAS_CHANGE}:
                continue
            if layer_type == "comfy" and "lora_A" in params:
                axes.add("rows" if params["magnitude"].shape[0] == params["lora_B"].shape[0] else "cols")
            elif kind is None or kind.scales_both:
                axes.add(None)
            else:
                axes.add("rows" if kind.scales_rows else "cols" if kind.scales_columns else "")
    if None in axes or {"rows", "cols"} <= axes:
        return None
    return next((axis for axis in ("rows", "cols") if axis in axes), "")


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    weights: Weights | None,
    truncation: Truncation | None = None,
    tool: str = "merge",
) -> tuple[Adapter, ErrorByLayer] | None:
    """Combine adapters into one with magnitudes: W + Σ fᵢ (Wᵢ' − W).

    Args:
        adapters: The adapters, at least one with magnitudes.
        strengths: The strength of each, fᵢ.
        weights: The base model's weights.
        truncation: The rank of the result; None adds the ranks up, which is exact.
        tool: Name of the tool, for the history.

    Returns:
        The dora-rows or dora-cols adapter and what truncation loses; None where magnitudes cannot hold the sum.

    Raises:
        AdapterError: If `weights` are missing.
    """
    axis = find_axis(adapters)
    if not axis:
        return None
    error, layers = ErrorByLayer(), {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.tensors):
        active = [(a, f) for a, f in zip(adapters, strengths, strict=True) if path in a.tensors]
        W = get_weight(active[0][0], require_weights(active[0][0], weights, f"{tool.title()} of"), path)
        low_rank = [(a, f) for a, f in active if a.tensors[path].keys() != {BIAS_CHANGE}]
        combined = _combine_layer(path, low_rank, W, axis, truncation)
        if combined is None:
            return None
        layers[path], error.layers[path] = combined
        layers[path] |= add_bias_changes(path, active)
    ranks = {path: len(params["lora_A"]) for path, params in layers.items()}
    alone = adapters[0].spec if len(adapters) == 1 else None
    include, exclude = (alone.include, alone.exclude) if alone else (sorted(layers), None)
    spec = build_spec(f"dora-{axis}", ranks, include=include, exclude=exclude)
    metadata = merge_metadata(adapters, strengths, tool, **(truncation.describe() if truncation else {}))
    return Adapter(spec, layers, metadata, " + ".join(a.source for a in adapters)), error


def _combine_layer(
    path: str, active: Sequence[tuple[Adapter, float]], W: Tensor, axis: str, truncation: Truncation | None
) -> tuple[dict[str, Tensor], tuple[float, float]] | None:
    """Combine one layer, in float64: its tensors, with the squares of error and change; `active` may be empty."""
    W_OI = flatten_weight(W) if axis == "rows" else flatten_weight(W).T  # columns are the rows of the transposed weight
    q_O = torch.ones(len(W_OI), dtype=torch.float64, device=W.device)
    factors = [] if active else [(q_O.new_zeros(len(q_O), 1), q_O.new_zeros(1, W_OI.shape[1]))]
    for adapter, strength in active:
        B_OR, A_RI, gain_O = _get_part(adapter, path, W, W_OI, axis)
        q_O += strength * (gain_O - 1)
        factors.append((B_OR * (strength * gain_O).unsqueeze(1), A_RI))
    if q_O.abs().min() < SMALLEST_GAIN:
        return None
    B_OR, A_RI = torch.cat([B for B, _ in factors], 1), torch.cat([A for _, A in factors])
    total = float(_measure_rows(W_OI, B_OR, A_RI, q_O - 1).square().sum())
    lost = 0.0
    if truncation is not None:
        part = truncate_product(B_OR, A_RI, truncation)
        B_OR, A_RI, lost = part.B_OR, part.A_RI, part.error
    B_OR = B_OR / q_O.unsqueeze(1)
    magnitude = q_O * (_measure_rows(W_OI, B_OR, A_RI) + EPSILON)
    B_OR, A_RI = (B_OR, A_RI) if axis == "rows" else (A_RI.T, B_OR.T)
    tensors = {"lora_A": A_RI, "lora_B": B_OR, "magnitude": magnitude}
    return {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, (lost, total)


def _measure_rows(W_OI: Tensor, B_OR: Tensor, A_RI: Tensor, factor_O: Tensor | None = None) -> Tensor:
    """Norm of each row of factor ⊙ W + BA, a few rows at a time: a weight of medium in float64 has 150 MB."""
    found = []
    for start in range(0, len(W_OI), _ROWS):
        rows = slice(start, start + _ROWS)
        some_NI = W_OI[rows].to(torch.float64, copy=True)
        some_NI = some_NI if factor_O is None else some_NI.mul_(factor_O[rows].unsqueeze(1))
        found.append(torch.linalg.vector_norm(some_NI.addmm_(B_OR[rows], A_RI), dim=1))
    return torch.cat(found)


def _get_part(adapter: Adapter, path: str, W: Tensor, W_OI: Tensor, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """sB, A and the gain of each row at one layer, transposed where the axis is that of columns."""
    params = {name: tensor.double() for name, tensor in get_layer_adapter(adapter, path, W).params.items()}
    B, A = (params["U"] @ params["M_xs"], params["V"].T) if "M_xs" in params else (params["lora_B"], params["lora_A"])
    B = B * adapter.spec.get_scale(path)
    B, A = (B, A) if axis == "rows" else (A.T, B.T)
    if "magnitude" not in params:
        return B, A, torch.ones_like(B[:, 0])
    is_comfy = adapter.spec.adapter_type == "comfy"
    norm_O = _measure_rows(W_OI, torch.zeros_like(B) if is_comfy and axis == "rows" else B, A)
    return B, A, params["magnitude"].reshape(-1) / (norm_O + (COMFY_EPSILON if is_comfy else EPSILON))
