"""Long data in temporary files that are mapped into memory: pages that were used are given back, part by part.

So neither the anonymous nor the resident memory of a process grows with the length of what it holds. Windows and macOS
keep such pages while there is room.
"""

import hashlib
import math
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 1 << 22
_MAPS = WeakValueDictionary[int, mmap.mmap]()
"""The map of a tensor's storage, by its address."""


def map_tensor(shape: tuple[int, ...], folder: Path | None = None) -> "Tensor":
    """Map a temporary file into memory as a tensor; it goes away with the tensor.

    Args:
        shape: Shape.
        folder: Where to put the file; None for the system's folder of temporary files.

    Returns:
        A float32 tensor of zeros.
    """
    import torch

    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(math.prod(shape) * torch.float32.itemsize)
        mapped = mmap.mmap(file.fileno(), 0)
    tensor = torch.frombuffer(mapped, dtype=torch.float32).view(shape)
    _MAPS[tensor.untyped_storage().data_ptr()] = mapped
    return tensor


def release_pages(data: "Tensor | mmap.mmap | bytes") -> None:
    """Give back the pages of mapped data; they are read from the file again when they are needed.

    Args:
        data: Any part of a tensor of `map_tensor`, or a map; nothing happens to other data.
    """
    mapped = data if isinstance(data, mmap.mmap | bytes) else _MAPS.get(data.untyped_storage().data_ptr())
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def iterate_parts(tensor: "Tensor", size: int) -> "Iterator[Tensor]":
    """Iterate over a tensor's last dimension, giving back the pages of each part.

    Args:
        tensor: The tensor, mapped or not.
        size: Elements of a part in the last dimension.

    Yields:
        Views of it.
    """
    for part in tensor.split(size, dim=-1):
        yield part
        release_pages(tensor)


def iterate_bytes(content: mmap.mmap | bytes) -> Iterator[memoryview]:
    """Iterate over the content of a file, giving back the pages of each part.

    Args:
        content: Bytes, or a map.

    Yields:
        Views of it.
    """
    view = memoryview(content)
    for start in range(0, len(view), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]
        release_pages(content)


def hash_bytes(content: mmap.mmap | bytes) -> str:
    """Hash the content of a file.

    Args:
        content: Bytes, or a map.

    Returns:
        Hex SHA-256.
    """
    digest = hashlib.sha256()
    for part in iterate_bytes(content):
        digest.update(part)
    return digest.hexdigest()
