"""The frozen bases of -xs adapter types: the top-r singular vectors of W, exact, with canonical signs, cached on disk.

The SVD is exact, not randomized: the top eigenvectors of the smaller Gram matrix in float64 (LAPACK syevr), and a full
float64 SVD where the weight's rank is too low for that. Each column of U has its entry of largest magnitude positive; V
flips along.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sa3train.adapters.apply.effective_weight import flatten_weight
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import get_cache_dir
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import hash_tensors, read_header, write_tensors

logger = get_logger(__name__)

SMALLEST_RATIO = 1e-5
"""Below this share of the largest singular value the Gram matrix no longer gives the small singular vectors exactly."""


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
