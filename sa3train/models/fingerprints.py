"""Weights known by their content: one digest per set of tensors, whatever file and precision they came in."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from sa3train.errors import SA3Error
from sa3train.files import cache_dir, write_text
from sa3train.log import get_logger

logger = get_logger(__name__)


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex SHA-256 over names, shapes and values rounded to bf16, so that fp32 and bf16 copies agree.

    Give the tensors in the order of their names. Rotary frequencies are left out: they are constants, not weights.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if name.endswith("inv_freq"):
            continue
        values = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{name}{list(values.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()


def remembered(path: Path, part: str, compute: Callable[[], str]) -> str:
    """`compute()`, kept in the cache for as long as the file at `path` has the same size and time."""
    real = path.resolve()
    state = real.stat()
    key = hashlib.sha256(f"{real}|{state.st_size}|{state.st_mtime_ns}|{part}|1".encode()).hexdigest()
    kept = cache_dir() / "fingerprints" / key
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    found = compute()
    try:
        write_text(kept, found)
    except SA3Error as error:
        logger.debug(f"fingerprint not kept: {error}")
    return found
