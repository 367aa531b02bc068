"""Weight files: names and shapes, reading straight to a device and dtype, writing, and fingerprints of weights."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3train.core.dtypes import SAFETENSORS_DTYPES
from sa3train.core.errors import CheckpointError, SA3Error
from sa3train.core.files import get_cache_dir, write_json, write_text
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import hash_tensors, write_tensors
from sa3train.core.text import list_few

logger = get_logger(__name__)

_RELEASE_AFTER = 256 * 1024**2  # bytes of a mapped file that may stay in memory while it is converted


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes.

    Args:
        path: Safetensors file.

    Returns:
        Shapes by name.

    Raises:
        CheckpointError: The file is missing, truncated, not safetensors, or has tensors of another dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            odd = {
                name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in SAFETENSORS_DTYPES
            }
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy or download it again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated: download or copy it again."
        ) from error
    if odd:
        name, dtype = next(iter(odd.items()))
        raise CheckpointError(f"{path}: {name} is {dtype}; weights must be F32, BF16 or F16. Use the released file.")
    return shapes


def iterate_tensors(
    path: Path, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Iterate tensors of a file.

    A CPU tensor that is in `dtype` already stays a view of the mapped file (copied only where written to), so loading
    costs no memory of its own. When converting, the mapping is released every 256 MiB, so only the result stays.

    Args:
        path: Safetensors file.
        names: Names of the tensors.
        device: Where they go.
        dtype: Their dtype.

    Yields:
        Name and tensor.
    """
    target = torch.device(device)
    pending = list(names)
    while pending:
        seen, done = 0, 0
        with safe_open(path, framework="pt") as file:
            for name in pending:
                tensor = file.get_tensor(name)
                converted = tensor.to(target).to(dtype)
                if converted is not tensor:
                    seen += tensor.nbytes
                del tensor
                yield name, converted
                done += 1
                if seen >= _RELEASE_AFTER:
                    break
        pending = pending[done:]


def check_tensor_names(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Check that a file has the tensors of the architecture that its config describes.

    Args:
        path: The file, for messages.
        found: Shapes by name in the file.
        expected: Shapes by name of the architecture.

    Raises:
        CheckpointError: They differ; the message lists how.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} (file {list(found[name])}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {list_few(names, 5)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is not the model that its model_config.json describes ({len(found)} tensors, "
            f"{len(expected)} expected). {'; '.join(problems)}. Take both files from one repository."
        )


def write_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write a checkpoint in the released layout: `model_config.json` and `model.safetensors`, each atomically.

    Args:
        folder: Target.
        config: Content of `model_config.json`.
        state: Tensors under released names.
        dtype: Dtype in the file. Rotary frequencies stay fp32.
    """
    stored = {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith("inv_freq") else dtype).contiguous().clone()
        for name, tensor in state.items()
    }
    write_tensors(folder / "model.safetensors", stored)
    write_json(folder / "model_config.json", config)


def compute_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Compute a fingerprint of names, shapes and values rounded to bf16, so that fp32 and bf16 copies agree.

    Args:
        tensors: Names and tensors, sorted by name. Rotary frequencies are skipped: they are constants, not weights.

    Returns:
        Hex SHA-256.
    """
    parts = (
        (f"{name}{list(tensor.shape)}", tensor.detach().to(device="cpu", dtype=torch.bfloat16))
        for name, tensor in tensors
        if not name.endswith("inv_freq")
    )
    return hash_tensors(itertools.chain.from_iterable(parts))


def cache_fingerprint(path: Path, part: str, compute: Callable[[], str]) -> str:
    """Cache a fingerprint for as long as a file has the same size and modification time.

    Args:
        path: The file.
        part: Which part of it the fingerprint is of.
        compute: Computes it where it is not cached.

    Returns:
        The fingerprint.
    """
    real = path.resolve()
    state = real.stat()
    key = hashlib.sha256(f"{real}|{state.st_size}|{state.st_mtime_ns}|{part}|1".encode()).hexdigest()
    cached = get_cache_dir() / "fingerprints" / key
    if cached.is_file():
        return cached.read_text(encoding="utf-8")
    found = compute()
    try:
        write_text(cached, found)
    except SA3Error as error:
        logger.debug(f"fingerprint not cached: {error}")
    return found
