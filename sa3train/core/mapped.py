"""Long data in temporary files that are mapped into memory: pages that were used are given back, part by part.

So neither the anonymous nor the resident memory of a process grows with the length of what it holds. Windows and macOS
keep such pages while there is room.
"""

import contextlib
import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING
from weakref import WeakValueDictionary

from sa3train.core.errors import SA3Error

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 1 << 22
_MAPS = WeakValueDictionary[int, mmap.mmap]()
"""The map of a tensor's storage, by its address."""
_LARGE_FILES = Path("/var/tmp")
"""Where Linux keeps large temporary files: /tmp is in memory on many systems (file-hierarchy(7) of systemd)."""


@contextlib.contextmanager
def open_temporary(folder: Path | None = None) -> Iterator[IO[bytes]]:
    """Open an unbuffered temporary file for long data.

    Args:
        folder: Where to put it; None for TMPDIR, TEMP or TMP where one is set, then /var/tmp, then the system's folder.

    Yields:
        The file, which has no name and goes away when it is neither open nor mapped.

    Raises:
        SA3Error: The disk is full, or the folder cannot be written.
    """
    is_chosen = any(map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))) or not os.access(_LARGE_FILES, os.W_OK)
    place = folder or (Path(tempfile.gettempdir()) if is_chosen else _LARGE_FILES)
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            yield file
    except OSError as error:
        raise SA3Error(
            f"cannot write a temporary file in {place}: {error.strerror or error}. Nothing was left behind. Free disk "
            f"space or {'choose' if folder else 'set TMPDIR to'} a folder you may write to, then run again."
        ) from error


def map_tensor(shape: tuple[int, ...], folder: Path | None = None) -> "Tensor":
    """Map a temporary file into memory as a tensor; it goes away with the tensor.

    Args:
        shape: Shape.
        folder: As in `open_temporary`.

    Returns:
        A float32 tensor of zeros.

    Raises:
        SA3Error: The disk has no room for it, or the folder cannot be written.
    """
    import torch

    size = math.prod(shape) * torch.float32.itemsize
    with open_temporary(folder) as file:
        if hasattr(os, "posix_fallocate"):  # a page without room on the disk would end the process when it is written
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
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
