"""Numpy's .npz files of weights, read one array at a time and never as pickles: names, shapes, values, writing."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sa3train.core.errors import CheckpointError
from sa3train.core.files import replace_file

FLOATS = ("float16", "float32")
_ENDING = ".npy"
_LARGEST_GROWTH = 16  # of a compressed file: weights hardly compress, so one that grows more is none


@contextlib.contextmanager
def _explain(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy or download it again.") from error
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is not a complete .npz file ({error}). It may be truncated: download or copy it again."
        ) from error


def read_npz_shapes(path: Path, blobs: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Read names and shapes, and check that each array is as large as its header says.

    Args:
        path: The file.
        blobs: Names of arrays that hold bytes.

    Returns:
        Shapes by name, without those of `blobs`.

    Raises:
        CheckpointError: The file is missing, damaged, or has arrays that are no weights.
    """
    shapes, total = dict[str, tuple[int, ...]](), 0
    with _explain(path), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(_ENDING)
            with archive.open(member) as file:
                version = npy.read_magic(file)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read_header(file)
                length = file.tell() + math.prod(shape) * dtype.itemsize
            total += member.file_size
            if dtype.hasobject or length != member.file_size or total > _LARGEST_GROWTH * path.stat().st_size:
                raise ValueError(f"{name} is not the array that its header describes")
            if name not in blobs and dtype.name not in FLOATS:
                raise CheckpointError(f"{path}: {name} is {dtype}; weights must be float32 or float16.")
            if name not in blobs:
                shapes[name] = shape
    return shapes


def iterate_npz(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Iterate arrays of a file, of which only one is in memory.

    Args:
        path: The file, whose shapes have been read.
        names: Names of the arrays.

    Yields:
        Name and tensor; `CheckpointError` is raised for data that does not fit its checksum.
    """
    with _explain(path), np.load(path, allow_pickle=False) as arrays:
        for name in names:
            yield name, torch.from_numpy(np.ascontiguousarray(arrays[name]))


def read_npz_blob(path: Path, name: str) -> bytes:
    """Read an array of bytes.

    Args:
        path: The file.
        name: Name of the array.

    Returns:
        Its bytes; `CheckpointError` is raised where it is missing or damaged.
    """
    with _explain(path), np.load(path, allow_pickle=False) as arrays:
        return bytes(arrays[name].tobytes())


def write_npz(path: Path, tensors: Iterable[tuple[str, Tensor]], comment: str) -> None:
    """Write a file atomically, one array at a time and uncompressed.

    Args:
        path: The file.
        tensors: Names and tensors.
        comment: Text of at most 65 535 bytes for the archive's comment.
    """
    with replace_file(path) as staged, zipfile.ZipFile(staged, "w") as archive:
        archive.comment = comment.encode()[:65_535]
        for name, tensor in tensors:
            with archive.open(f"{name}{_ENDING}", "w", force_zip64=True) as file:
                npy.write_array(file, tensor.contiguous().numpy(), allow_pickle=False)
