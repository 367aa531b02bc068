"""Is a safetensors file what it says it is? Looked at before any library reads it, and no more than its header is read.

Layout: 8 bytes little-endian header length, JSON header, data. Format: https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3train.core.errors import AdapterError
from sa3train.core.log import get_logger

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DEPTH = 8
MAX_DIMENSIONS = 8
MAX_KEY = 512
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
_KEY = re.compile(r"[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors by key, and its metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of the safetensors file at `path`, after checking all that can be checked without reading the data.

    Raises `AdapterError`, saying what is wrong, for: a missing, empty or truncated file; a pickle or another format;
    a header longer than the file or 16 MiB; broken, deeply nested or repeated JSON; unknown dtypes; impossible shapes;
    offsets that overlap, leave holes or end elsewhere than the file; keys that are no module paths.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            _refuse_other_formats(file, start)
            if len(start) < 8:
                raise AdapterError(f"{file} is no safetensors file: it has only {size} bytes.")
            (length,) = struct.unpack("<Q", start)
            if length > size - 8 or length > MAX_HEADER:
                raise AdapterError(
                    f"{file} is damaged or no safetensors file: its header claims {length} bytes, and the file has "
                    f"{size} (a header may have {MAX_HEADER} at most). Download or save it again."
                )
            text = stream.read(length)
    except OSError as error:
        raise AdapterError(f"cannot read the adapter {file}: {error.strerror or error}.") from error
    return _checked(file, _parsed(file, text), size - 8 - length)


def parse_json(text: bytes | str, what: str, max_bytes: int = 2**20) -> Any:
    """JSON from an untrusted source: bounded in size and depth, without repeated keys. Raises `AdapterError`."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > max_bytes:
        raise AdapterError(f"{what} has {len(raw)} bytes of JSON, more than the {max_bytes} allowed.")
    depth = 0
    for token in _BRACKETS.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > MAX_DEPTH:
            raise AdapterError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is no readable JSON: {error}.") from error


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _refuse_other_formats(file: Path, start: bytes) -> None:
    """A torch pickle can run code when it is read; it is known by its first bytes, whatever the file is called.

    A header of, say, 640 bytes also starts with 0x80 0x02, but one below 4 GiB has zeros in its upper length bytes.
    """
    zipped = start.startswith(b"PK\x03\x04")
    pickled = len(start) == 8 and start[0] == 0x80 and 2 <= start[1] <= 5 and any(start[4:])
    if zipped or pickled:
        raise AdapterError(
            f"{file} is a pickle (.ckpt, .pt, .bin), which can carry code and is never loaded as an adapter. Convert "
            f"it with torch's weights-only reader: sa3-adapter convert {file.name} {file.stem}.safetensors"
        )


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise AdapterError(f"{file} is no safetensors file: its header is not a JSON object.")
    header = parse_json(text, f"the header of {file}", MAX_HEADER)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise AdapterError(f"{file} is damaged: its header does not list its tensors.")
    return header


def _checked(file: Path, header: dict[str, Any], data_bytes: int) -> Header:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{file} is damaged: its metadata is not a table of texts.")
    entries = {key: _entry(file, key, value) for key, value in header.items()}
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            trouble = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise AdapterError(f"{file} is damaged: {key} {trouble} (byte {entry.begin}, expected {position}).")
        position = entry.end
    if position != data_bytes:
        raise AdapterError(
            f"{file} is truncated or damaged: its header describes {position} bytes of tensors, and {data_bytes} are "
            f"there. Download or save it again."
        )
    return Header(entries, metadata)


def _entry(file: Path, key: str, value: Any) -> Entry:
    if len(key) > MAX_KEY or not _KEY.fullmatch(key) or any(part.startswith("__") for part in key.split(".")):
        raise AdapterError(f"{file} holds a tensor whose name is no module path: {key[:80]!r}.")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{file} is damaged: {key} must have dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise AdapterError(f"{file}: {key} has the unknown dtype {str(dtype)[:40]!r}.")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterError(f"{file}: {key} has the impossible shape {str(shape)[:80]}.")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterError(f"{file}: {key} has the impossible data offsets {str(offsets)[:80]}.")
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise AdapterError(
            f"{file}: {key} claims {dtype} {shape}, which is not the {offsets[1] - offsets[0]} bytes it is given."
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


logger = get_logger(__name__)


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of a file whose header has been checked. Only real numbers are accepted."""
    for key, entry in header.entries.items():
        if entry.dtype not in FLOATS:
            raise AdapterError(f"{path}: {key} is {entry.dtype}; an adapter holds real numbers (F16, BF16 or F32).")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in header.entries}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"cannot read {path}: {error}. The file is damaged; download or save it again.") from error


def storable(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU copies, fp32 and fp64 in `dtype`; a tensor too large for it stays fp32 and is named in the log."""
    stored = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu()
        if not torch.isfinite(value).all():
            raise AdapterError(f"{key} holds NaN or infinity, so the adapter is not written. The training diverged.")
        if dtype is not None and value.dtype in (torch.float32, torch.float64):
            cast = value.to(dtype)
            if torch.isfinite(cast).all():
                value = cast
            else:
                logger.warning("%s has values too large for %s and is kept in fp32", key, dtype)
        stored[key] = value.contiguous().clone()
    return stored
