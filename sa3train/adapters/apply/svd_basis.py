"""The frozen bases of the -xs kinds: the top-r singular vectors of W, exact, with canonical signs, kept on disk.

The SVD is exact, not randomised: the top eigenvectors of the smaller Gram matrix in float64 (LAPACK syevr), and a full
float64 SVD where the weight's rank is too low for that. Each column of U has its entry of largest magnitude positive; V
flips along.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import cache_dir, write_tensors
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import read_header

logger = get_logger(__name__)

SMALLEST_RATIO = 1e-5
"""Below this share of the largest singular value the Gram matrix no longer gives the small singular vectors exactly."""


def singular_basis(W: Tensor, rank: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(U (out, rank), V (in, rank)) of `W` in fp32 on W's device, from the cache when this very weight was seen before.

    `dtype` is the precision whose rounding of W counts (the one the adapter was trained on); None takes W's own.
    Raises `AdapterError` when the rank is above what W has.
    """
    W_OI = flatten_weight(W.detach())
    if rank > min(W_OI.shape):
        raise AdapterError(
            f"rank {rank} is above the {min(W_OI.shape)} singular vectors of a {tuple(W_OI.shape)} weight."
        )
    W_OI = W_OI if dtype is None else W_OI.to(dtype)
    U_OR, V_IR = _cached(weight_hash(W_OI), rank, lambda: exact_basis(W_OI, rank))
    return U_OR.to(W.device), V_IR.to(W.device)


def weight_hash(W: Tensor) -> str:
    """SHA-256 of a weight's shape and of its values in fp32, so that the same values in another dtype are the same."""
    values = W.detach().float().cpu().contiguous()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def exact_basis(W_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The top-`rank` singular vectors of W with canonical signs, in fp32 on the CPU; computed in float64."""
    W = W_OI.detach().cpu().double()
    tall, size = W.shape[0] >= W.shape[1], min(W.shape)
    gram = W.T @ W if tall else W @ W.T
    import scipy.linalg  # half a second of start-up that only these kinds need

    values, vectors = scipy.linalg.eigh(gram.numpy(), subset_by_index=[size - rank, size - 1], driver="evr")
    short = torch.from_numpy(vectors).flip(1)  # eigh sorts upwards
    sigma = torch.from_numpy(values).flip(0).clamp_min(0).sqrt()
    if sigma[-1] <= SMALLEST_RATIO * sigma[0]:
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        return _canonical(U[:, :rank], Vh[:rank].T)
    long = (W @ short if tall else W.T @ short) / sigma
    return _canonical(long, short) if tall else _canonical(short, long)


def _canonical(U_OR: Tensor, V_IR: Tensor) -> tuple[Tensor, Tensor]:
    largest = U_OR.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(U_OR.gather(0, largest) < 0, -1.0, 1.0).to(U_OR.dtype)
    return (U_OR * sign).float().cpu().contiguous(), (V_IR * sign).float().cpu().contiguous()


def _cached(key: str, rank: int, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    path = cache_dir() / "svd" / key[:2] / f"{key}.safetensors"
    found = _stored(path, rank)
    if found is not None:
        return found
    U_OR, V_IR = compute()
    try:
        write_tensors(path, {"U": U_OR, "V": V_IR})
    except SA3Error as error:
        logger.warning("the singular vectors could not be kept for the next run: %s", error)
    return U_OR, V_IR


def _stored(path: Path, rank: int) -> tuple[Tensor, Tensor] | None:
    """The cached basis, or None when it is absent, damaged or of too low a rank."""
    if not path.is_file():
        return None
    try:
        read_header(path)
        tensors = load_file(path)
        U_OR, V_IR = tensors["U"], tensors["V"]
    except (SA3Error, SafetensorError, KeyError, OSError) as error:
        logger.warning("the cached singular vectors in %s are unusable and are computed again: %s", path, error)
        return None
    if U_OR.shape[1] < rank or not (torch.isfinite(U_OR).all() and torch.isfinite(V_IR).all()):
        return None
    return U_OR[:, :rank].contiguous(), V_IR[:, :rank].contiguous()
