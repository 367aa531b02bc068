"""PEFT adapters that started by taking a part out of the base model: made adapters of the whole base again.

PiSSA takes the largest r singular components out of W, OLoRA the part in the span of its first r columns, and the
factors start as that part P. Trained, the weight is (W − P) + s·BA, so on the whole base the change is s·BA − P, of
rank 2r at most. P follows from W: PiSSA's is its truncated SVD, OLoRA's is s·Q·R with the first r columns of Q and rows
of R, whatever the signs of the vectors. Other parts depend on random draws, on data or on a quantization, and are not
stored. Sources: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775; PEFT 0.21.2, `tuners/lora/layer.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.adapters.apply.svd_basis import compute_singular_basis
from sa3train.adapters.formats.native import build_spec
from sa3train.adapters.tools.low_rank import Truncation, truncate_product
from sa3train.core.errors import AdapterError
from sa3train.core.log import track_progress
from sa3train.core.text import format_command

TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the values of PEFT's init_lora_weights with which the base changes. Gaussian, orthogonal, EVA and MiCA
leave it as it is."""

PRECISION = 3e-7
"""Relative error of the decomposition that PEFT computed in fp32."""

LARGEST_ERROR = 0.01
"""Share of the change by which the part that was taken out may be uncertain."""

_USE_PEFT = (
    "Where it was trained, save it with PEFT's save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=INITIAL), where INITIAL is the adapter's folder from before training."
)


def get_initialization(config: Mapping[str, Any]) -> str | None:
    """Get the initialization of a PEFT LoRA, if it took a part out of the base.

    Args:
        config: The parsed adapter_config.json.

    Returns:
        PEFT's name of it, in lower case; None where the base stayed as it was.
    """
    name = str(config.get("init_lora_weights", True)).lower()
    return name[:40] if name.startswith(TAKES_FROM_BASE) else None


@torch.no_grad()
def subtract_initial(adapter: Adapter, initialization: str | None, weights: Mapping[str, Tensor] | None) -> Adapter:
    """Make an adapter of the whole base from one whose initialization took a part out of it.

    Args:
        adapter: The lora or dora-rows adapter as PEFT stored it.
        initialization: What `get_initialization` found; None returns the adapter as it is.
        weights: The base model's weights by module path.

    Returns:
        The adapter, of twice the rank.

    Raises:
        AdapterError: If the part cannot be computed again, or the weights are missing or others.
    """
    if initialization is None:
        return adapter
    compute = _METHODS.get(initialization)
    if compute is None:
        raise AdapterError(
            f"{adapter.source} started with init_lora_weights={initialization!r}, which took a part out of the base "
            f"model that is not stored in it. {_USE_PEFT}"
        )
    if weights is None:
        raise AdapterError(
            f"{adapter.source} started with init_lora_weights={initialization!r}, which took a part out of the base "
            "model. Convert it with the model it was trained on: "
            f"{format_command(['sa3-adapter', 'convert', adapter.source, 'NEW.safetensors', '--model', 'NAME'])}"
        )
    layers, ranks, squares = {}, {}, [0.0, 0.0]
    for path, params in track_progress(adapter.tensors.items(), "convert", len(adapter.tensors), unit="layer"):
        B_OR, A_RI, scale = params["lora_B"].double(), params["lora_A"].double(), adapter.spec.get_scale(path)
        if path not in weights or flatten_weight(weights[path]).shape != (B_OR.shape[0], A_RI.shape[1]):
            raise AdapterError(f"{adapter.source}: {path} does not fit the model. Give its base model.")
        W_OI = flatten_weight(weights[path].detach()).cpu().double()
        left_OR, right_RI, uncertainty = compute(W_OI, A_RI.shape[0], scale)
        ranks[path] = min(2 * A_RI.shape[0], *W_OI.shape)
        factors = torch.cat((B_OR * scale, -left_OR), 1), torch.cat((A_RI, right_RI))
        part = truncate_product(*factors, Truncation(ranks[path]))
        layers[path] = {**params, "lora_B": part.B_OR.float(), "lora_A": part.A_RI.float().contiguous()}
        squares = [squares[0] + uncertainty**2, squares[1] + part.total]
    if not squares[0] <= LARGEST_ERROR**2 * squares[1]:
        raise AdapterError(
            f"{adapter.source} started with init_lora_weights={initialization!r}, and what training changed cannot be "
            f"told from rounding in the part that was taken out of the base. {_USE_PEFT}"
        )
    old = adapter.spec
    spec = build_spec(old.adapter_type, ranks, dropout=old.dropout, include=old.include, exclude=old.exclude)
    return replace(adapter, spec=spec, tensors=layers)


def _compute_pissa(W_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, float]:
    """The largest singular components of W as factors, whatever the scale, and how uncertain their product is."""
    del scale  # PEFT divides the factors by it
    U_OK = compute_singular_basis(W_OI, min(rank + 1, *W_OI.shape))[0].double()
    components_KI = U_OK.T @ W_OI
    sigma_K = torch.linalg.vector_norm(components_KI, dim=1)
    gap = float(sigma_K[rank - 1] - sigma_K[rank]) if rank < len(sigma_K) else math.inf
    uncertainty = PRECISION * float(sigma_K[0] * sigma_K[:rank][-1]) / max(gap, 1e-300)
    return U_OK[:, :rank], components_KI[:rank], uncertainty


def _compute_olora(W_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, float]:
    """The part of W in the span of its first columns times the scale, which PEFT leaves in, likewise."""
    Q_OR = torch.linalg.qr(W_OI[:, :rank])[0]
    smallest = float(torch.linalg.svdvals(W_OI[:, :rank])[-1])
    uncertainty = PRECISION * abs(scale) * float(W_OI[:, :rank].norm() * W_OI.norm()) / max(smallest, 1e-300)
    return scale * Q_OR, Q_OR.T @ W_OI, uncertainty


_METHODS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor, float]]] = {
    "pissa": _compute_pissa,
    "olora": _compute_olora,
}
