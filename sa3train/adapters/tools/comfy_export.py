"""Turn adapters into what ComfyUI patches weights with, as small as they are.

ComfyUI's DoRA divides columns by the norms of V = W + sBA, so dora-cols is that with dora_scale = magnitude. It divides
rows by the norms of W, so dora-rows is that with dora_scale = magnitude · ‖W‖ / ‖V‖, which needs the base model once,
and is then exact at every strength. Types with frozen bases get these multiplied in. Shape suffixes: O rows, I columns.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import COMFY_EPSILON, EPSILON, flatten_weight
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.products import LOHA, LOKR, get_product_rank
from sa3train.adapters.formats.comfy_write import COMFYUI_VERSION
from sa3train.adapters.formats.native import build_spec
from sa3train.adapters.formats.peft import CONVOLUTIONS
from sa3train.adapters.formats.saving import convert_for_saving
from sa3train.adapters.spec import BIAS_CHANGE, CARRIED_BY, KINDS
from sa3train.adapters.tools.base_weights import Weights, get_weight, require_weights
from sa3train.adapters.tools.edit import convert_to_diff, expand_bases, has_own_bases
from sa3train.core.errors import MissingBaseError

AS_THEY_ARE = ("lora", "diff", "comfy")
"""Types that ComfyUI's files hold as they are."""


def make_for_comfy(
    adapter: Adapter, weights: Weights | None, dtype: torch.dtype | None, dense: bool, notes: list[str]
) -> Adapter:
    """Make the adapter that a ComfyUI file holds: small where that is exact, else full weight deltas.

    Args:
        adapter: The adapter.
        weights: The base model's weights.
        dtype: Dtype of the file.
        dense: Whether to make full weight deltas of any type.
        notes: Gets what was done.

    Returns:
        A lora, diff or comfy adapter.

    Raises:
        MissingBaseError: If `weights` are needed and missing.
    """
    name = adapter.spec.adapter_type
    is_exact = can_export(adapter)
    if weights is None and (dense or not is_exact or needs_base(adapter)):
        ways = (
            "with dora_scale for ComfyUI's own DoRA, or its bases multiplied in"
            if is_exact and not dense
            else "as full weight deltas, or approximated by a lora of rank=R (or explained_variance=SHARE)"
        )
        raise MissingBaseError(f"{name} is written for ComfyUI with its base model (model=NAME): {ways}.")
    if dense or not is_exact:
        assert weights is not None
        notes.append(f"{name} is exported as full weight deltas: exact up to rounding, for any version of ComfyUI")
        return convert_to_diff(adapter, weights)
    exported = export_to_comfy(adapter, weights, dtype)
    if name != exported.spec.adapter_type:
        notes.append(
            f"{name} is written as ComfyUI's {'lora' if exported.spec.adapter_type == 'lora' else 'own type of it'}, "
            f"exact up to rounding, for the rules of ComfyUI {COMFYUI_VERSION}; for others dense=True"
        )
    return exported


def can_export(adapter: Adapter) -> bool:
    """Check whether ComfyUI can play an adapter exactly from small factors.

    Args:
        adapter: The adapter.

    Returns:
        False where only full weight deltas are exact: bora, and most of PEFT's methods.
    """
    is_carried = "comfy" in CARRIED_BY[adapter.spec.adapter_type]
    if adapter.spec.adapter_type in ("loha", "lokr"):
        return is_carried and all(
            params.keys() <= {*LOHA, *LOKR} and all(tensor.ndim == 2 for tensor in params.values())
            for params in adapter.tensors.values()
        )
    return is_carried


def needs_base(adapter: Adapter) -> bool:
    """Check whether `export_to_comfy` needs the base model's weights.

    Args:
        adapter: An adapter that can be exported.

    Returns:
        Whether it does: for magnitudes by row, and for frozen bases that the adapter does not bring along.
    """
    kind = KINDS.get(adapter.spec.adapter_type)
    return kind is not None and (kind.scales_rows or (kind.is_xs and not has_own_bases(adapter)))


@torch.no_grad()
def export_to_comfy(adapter: Adapter, weights: Weights | None, dtype: torch.dtype | None) -> Adapter:
    """Export an adapter to ComfyUI's small form.

    Args:
        adapter: An adapter that can be exported.
        weights: The base model's weights, where they are needed.
        dtype: Dtype that the factors will be written in; the magnitudes make up for its rounding.

    Returns:
        A lora, diff or comfy adapter.

    Raises:
        MissingBaseError: If `weights` are needed and missing.
    """
    if adapter.spec.adapter_type in ("loha", "lokr"):
        return _export_products(adapter)
    if adapter.spec.adapter_type.endswith("-xs"):
        adapter = expand_bases(adapter, weights)
    if adapter.spec.adapter_type in AS_THEY_ARE:
        return adapter
    by_row = KINDS[adapter.spec.adapter_type].scales_rows
    if by_row:
        weights = require_weights(adapter, weights, "Exporting")
    layers = {}
    for path, params in adapter.tensors.items():
        W = None if weights is None else get_weight(adapter, weights, path)
        factors = convert_for_saving({name: params[name] for name in ("lora_A", "lora_B")}, dtype)
        layers[path] = dict(params) | factors
        taps = (1,) if (path.endswith(CONVOLUTIONS) if W is None else W.ndim > 2) else ()
        if by_row and W is not None:
            scale = adapter.spec.get_scale(path)
            layers[path]["magnitude"] = _compute_row_scale(W, layers[path], scale).reshape(-1, 1, *taps)
        elif len(factors["lora_B"]) > 1 and (W is None or W.shape[2:].numel() == 1):
            layers[path]["magnitude"] = params["magnitude"].float().reshape(1, -1, *taps)
        elif W is not None:  # ComfyUI takes one row for rows, and has one norm for all taps of a column
            change = get_layer_adapter(adapter, path, W).weight(W) - W.float()
            layers[path] = {"diff": change, **{name: x for name, x in params.items() if name == BIAS_CHANGE}}
        else:
            raise MissingBaseError(f"ComfyUI cannot tell rows from columns at {path}, of one row. Set model=NAME.")
    return replace(adapter, spec=replace(adapter.spec, adapter_type="comfy"), tensors=layers)


def _compute_row_scale(W: Tensor, params: Mapping[str, Tensor], scale: float) -> Tensor:
    W_OI = flatten_weight(W).float()
    V_OI = torch.addmm(W_OI, params["lora_B"].to(W_OI), params["lora_A"].to(W_OI), alpha=scale)
    norms_O, changed_O = (torch.linalg.vector_norm(each, dim=1) for each in (W_OI, V_OI))
    return (params["magnitude"].to(W_OI) * (norms_O + COMFY_EPSILON) / (changed_O + EPSILON)).cpu()


def _export_products(adapter: Adapter) -> Adapter:
    """LoHa and LoKr of PEFT are those of ComfyUI, which ignores alpha where there is no inner product."""
    spec, layers, ranks, alphas = adapter.spec, {}, {}, {}
    for path, params in adapter.tensors.items():
        rank, scale = get_product_rank(params), spec.get_scale(path)
        layers[path] = dict(params) if rank else {**params, "lokr_w1": params["lokr_w1"].float() * scale}
        ranks[path], alphas[path] = rank or 1, scale * rank if rank else 1.0
    exported = build_spec("comfy", ranks, alpha_pattern=alphas, include=spec.include, exclude=spec.exclude)
    return replace(adapter, spec=exported, tensors=layers)
