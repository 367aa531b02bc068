"""The frozen bases of -xs adapter types: the top-r singular vectors of W, exact, with canonical signs, cached on disk.

The SVD is exact, not randomized: the top eigenvectors of the smaller Gram matrix in float64 (LAPACK syevr), and a full
float64 SVD where the weight's rank is too low for that. Each column of U has its entry of largest magnitude positive; V
flips along. `attach_bases` takes them from the `svd_bases.pt` of the released trainer and Underfit instead.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sa3train.adapters.adapter import Adapter, get_checkpoint_name
from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.adapters.spec import BASES, KINDS
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import get_cache_dir
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import hash_tensors, read_header, write_tensors

logger = get_logger(__name__)

SMALLEST_RATIO = 1e-5
"""Below this share of the largest singular value the Gram matrix no longer gives the small singular vectors exactly."""

LARGEST_SKEW = 0.02
"""Of bases from elsewhere, which are stored in fp16: how far they may be from orthonormal, and from diagonalizing W."""


def get_singular_basis(W: Tensor, rank: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Get the top singular vectors of a weight, from the cache where possible.

    Args:
        W: The weight, (out, in) or (out, in, taps).
        rank: Number of singular vectors.
        dtype: Precision to round W to first, the one that the adapter was trained on; None keeps W's own.

    Returns:
        U (out, rank) and V (in, rank) in fp32 on W's device.

    Raises:
        AdapterError: If the rank is above the number of singular vectors.
    """
    W_OI = flatten_weight(W.detach())
    if rank > min(W_OI.shape):
        raise AdapterError(
            f"Rank {rank} is above the {min(W_OI.shape)} singular vectors of a {tuple(W_OI.shape)} weight."
        )
    W_OI = W_OI if dtype is None else W_OI.to(dtype)
    key = hash_weight(W_OI)
    path = get_cache_dir() / "svd" / key[:2] / f"{key}.safetensors"
    basis = _load(path, rank)
    if basis is None:
        basis = compute_singular_basis(W_OI, rank)
        try:
            write_tensors(path, dict(zip("UV", basis, strict=True)))
        except SA3Error as error:
            logger.warning("Could not cache the singular vectors for the next run: %s", error)
    return basis[0].to(W.device), basis[1].to(W.device)


def hash_weight(W: Tensor) -> str:
    """Hash a weight's shape and its values in fp32.

    Args:
        W: The weight; the same values in another dtype have the same hash.

    Returns:
        SHA-256 in hexadecimal.
    """
    values = W.detach().float().cpu().contiguous()
    return hash_tensors((str(tuple(values.shape)), values))


def compute_singular_basis(W_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the top singular vectors of a matrix in float64, with canonical signs.

    Args:
        W_OI: The matrix.
        rank: Number of singular vectors.

    Returns:
        U (O, rank) and V (I, rank) in fp32 on the CPU.
    """
    W = W_OI.detach().cpu().double()
    tall, size = W.shape[0] >= W.shape[1], min(W.shape)
    gram = W.T @ W if tall else W @ W.T
    import scipy.linalg  # half a second of start-up that only -xs types need

    values, vectors = scipy.linalg.eigh(gram.numpy(), subset_by_index=[size - rank, size - 1], driver="evr")
    short = torch.from_numpy(vectors).flip(1)  # eigh sorts upwards
    sigma = torch.from_numpy(values).flip(0).clamp_min(0).sqrt()
    if sigma[-1] <= SMALLEST_RATIO * sigma[0]:
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        return _fix_signs(U[:, :rank], Vh[:rank].T)
    long = (W @ short if tall else W.T @ short) / sigma
    return _fix_signs(long, short) if tall else _fix_signs(short, long)


def _fix_signs(U_OR: Tensor, V_IR: Tensor) -> tuple[Tensor, Tensor]:
    largest = U_OR.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(U_OR.gather(0, largest) < 0, -1.0, 1.0).to(U_OR.dtype)
    return (U_OR * sign).float().cpu().contiguous(), (V_IR * sign).float().cpu().contiguous()


def _load(path: Path, rank: int) -> tuple[Tensor, Tensor] | None:
    """Load the cached basis; None when it is absent, damaged or of too low a rank."""
    if not path.is_file():
        return None
    try:
        read_header(path)
        tensors = load_file(path)
        U_OR, V_IR = tensors["U"], tensors["V"]
    except (SA3Error, SafetensorError, KeyError, OSError) as error:
        logger.warning("The cached singular vectors in %s are unusable (%s); recomputing them", path, error)
        return None
    if U_OR.shape[1] < rank or not (torch.isfinite(U_OR).all() and torch.isfinite(V_IR).all()):
        return None
    return U_OR[:, :rank].contiguous(), V_IR[:, :rank].contiguous()


def attach_bases(
    adapter: Adapter, path: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None
) -> Adapter:
    """Give an adapter of an -xs type the bases of `svd_bases.pt`, with which it was trained.

    Args:
        adapter: The adapter, without bases of its own.
        path: What the released trainer's `svd_bases_path` names; read by torch's weights-only reader.
        weights: Weights of the base model by module path, to check that the bases are theirs.

    Returns:
        The adapter with U and V.

    Raises:
        AdapterError: The file cannot be read, or its bases are not those of the adapter's layers.
    """
    kind = KINDS.get(adapter.spec.adapter_type)
    if kind is None or not kind.is_xs or any("U" in params for params in adapter.tensors.values()):
        raise AdapterError(f"{path} has no effect: {adapter.source} is no -xs type, or has bases of its own.")
    bases, tensors = _read_bases(path), {}
    for layer, params in adapter.tensors.items():
        key = f"{get_checkpoint_name(layer)}.weight"
        basis, rank = bases.get(key), adapter.spec.get_rank(layer)
        if not isinstance(basis, Mapping) or not all(isinstance(basis.get(name), Tensor) for name in BASES):
            raise AdapterError(f"{path} has no bases of {key}: it is of another model than {adapter.source}.")
        U_OR, V_IR = (basis[name][:, :rank].float().contiguous() for name in BASES)
        if problem := _find_misfit(U_OR, V_IR, rank, params, None if weights is None else weights[layer]):
            raise AdapterError(f"{path}: the bases of {key} {problem}. Take those of the model that it was trained on.")
        tensors[layer] = {**params, "U": U_OR, "V": V_IR}
    return replace(adapter, tensors=tensors)


def _read_bases(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(
            f"{path} is refused: torch's weights-only reader cannot read it ({reason[:200]}). Leave it out: the bases "
            f"are computed from the base model."
        ) from error
    if not isinstance(content, Mapping):
        raise AdapterError(f"{path} holds no bases by layer, but {type(content).__name__}.")
    return content


def _find_misfit(U_OR: Tensor, V_IR: Tensor, rank: int, params: Mapping[str, Tensor], W: Tensor | None) -> str | None:
    """Why bases are not those of a layer; None where they fit."""
    sizes = {"magnitude_r": len(U_OR), "magnitude_c": len(V_IR)}
    if U_OR.shape[1] < rank or V_IR.shape[1] < rank:
        return f"have {min(U_OR.shape[1], V_IR.shape[1])} vectors, fewer than the rank {rank}"
    if any(name in params and params[name].numel() != size for name, size in sizes.items()):
        return f"are of a layer of shape {(len(U_OR), len(V_IR))}"
    identity = torch.eye(rank)
    if not max(float((basis.T @ basis - identity).abs().max()) for basis in (U_OR, V_IR)) < LARGEST_SKEW:
        return "are not orthonormal"
    if W is None:
        return None
    W_OI = flatten_weight(W.detach()).float().cpu()
    if W_OI.shape != (len(U_OR), len(V_IR)):
        return f"are of a layer of shape {(len(U_OR), len(V_IR))}, not {tuple(W_OI.shape)}"
    product_RR = U_OR.T @ W_OI @ V_IR  # the singular values
    off = product_RR - torch.diag(product_RR.diagonal())
    return None if float(off.norm() / product_RR.norm()) < LARGEST_SKEW else "are not those of this model's weight"
