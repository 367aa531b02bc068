"""Reading safetensors files: what is in them, and their tensors straight to a device and dtype.

Weights known by their content: one digest per set of tensors, whatever file and precision they came in.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3train.core.errors import CheckpointError, SA3Error
from sa3train.core.files import cache_dir, write_json, write_tensors, write_text
from sa3train.core.log import get_logger

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RELEASE_AFTER = 256 * 1024**2  # bytes of a mapped file that may stay in memory while it is converted


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the file. Raises `CheckpointError` when it is missing, cut short or no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            odd = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in _DTYPES}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy or download it again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). It may be cut short: download or copy it again."
        ) from error
    if odd:
        name, dtype = next(iter(odd.items()))
        raise CheckpointError(f"{path}: {name} is {dtype}; weights must be F32, BF16 or F16. Use the released file.")
    return shapes


def read_tensors(
    path: Path, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield each named tensor on `device` in `dtype`.

    A CPU tensor already in `dtype` stays a view of the mapped file (copied only where written to), so loading costs no
    memory of its own; when converting, the mapping is given back every 256 MiB, so only the result stays.
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


def check_names(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` listing what differs between a file and the architecture its config describes."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} (file {list(found[name])}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not hold the model its model_config.json describes ({len(found)} tensors, "
            f"{len(expected)} expected). {'; '.join(problems)}. Take both files from one repository."
        )


def write_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write a checkpoint in the released layout: `model_config.json` and `model.safetensors` in `dtype`.

    Rotary frequencies stay fp32. Each file appears whole or not at all. Raises `SA3Error` when the folder cannot be
    written.
    """
    stored = {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith("inv_freq") else dtype).contiguous().clone()
        for name, tensor in state.items()
    }
    write_tensors(folder / "model.safetensors", stored)
    write_json(folder / "model_config.json", config)


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
