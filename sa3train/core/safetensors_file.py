"""Safetensors files: checking, reading and writing them, and hashing tensors.

The library checks that a header describes the file. Format: https://github.com/huggingface/safetensors.
"""

import codecs
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa3train.core.dtypes import DTYPES
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.files import replace_file
from sa3train.core.log import get_logger
from sa3train.core.mapped import BLOCK_BYTES, iterate_parts
from sa3train.core.text import format_command, shorten
from sa3train.core.user_files import check_content, read_file

logger = get_logger(__name__)

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DEPTH = 8
MAX_DIMENSIONS = 8
MAX_KEY = 512
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_KEY = re.compile(r"[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class SafetensorsHeader:
    """A checked header.

    Attributes:
        dtypes: Dtypes of the tensors by key, as the file names them.
        metadata: The file's metadata, texts by key.
    """

    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read the header of an adapter file and check all that can be checked without reading the data.

    Args:
        path: Safetensors file.

    Returns:
        The header.

    Raises:
        AdapterError: The file is missing, empty, truncated, a pickle or of another format; its header is above 16 MiB,
            repeats a key or does not describe its tensors; or their number, the name of one or its number of
            dimensions is not allowed.
    """
    file = Path(path)
    try:
        check_content(file)
        with file.open("rb") as stream:
            start = stream.read(8)
            _refuse_other_formats(file, start)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and length > MAX_HEADER:
                raise AdapterError(
                    f"{file} is damaged or not a safetensors file: its header claims {length} bytes, and at most "
                    f"{MAX_HEADER} are allowed. Download or save it again."
                )
            text = stream.read(min(length, MAX_HEADER))
        with safe_open(file, framework="np") as opened:  # maps it read-only, whatever its size
            header = parse_json(text, f"the header of {file}", MAX_HEADER)  # of repeated keys, safetensors keeps one
            if len(header) > MAX_TENSORS:
                raise AdapterError(f"{file} lists {len(header)} tensors, and no model has so many.")
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = opened.metadata() or {}
    except OSError as error:
        raise AdapterError(f"cannot read the adapter {file}: {error.strerror or error}.") from error
    except SafetensorError as error:
        reason = shorten(str(error).removeprefix("Error while deserializing header: "), 200)
        raise AdapterError(
            f"{file} is damaged, truncated or not a safetensors file ({reason}). Download or save it again."
        ) from error
    for key, part in parts.items():
        if len(key) > MAX_KEY or not _KEY.fullmatch(key) or any(name.startswith("__") for name in key.split(".")):
            raise AdapterError(f"{file} contains a tensor whose name is not a module path: {key[:80]!r}.")
        if len(part.get_shape()) > MAX_DIMENSIONS:
            raise AdapterError(f"{file}: {key} has {len(part.get_shape())} dimensions, and no weight has so many.")
    return SafetensorsHeader({key: part.get_dtype() for key, part in parts.items()}, metadata)


def parse_json(text: bytes | str, what: str, max_bytes: int = 2**20) -> Any:
    """Parse JSON from an untrusted source: bounded in size and depth, without repeated keys, NaN and infinity.

    Args:
        text: JSON.
        what: What it is, for messages ("the metadata of x.safetensors").
        max_bytes: Largest size accepted.

    Returns:
        The parsed value.

    Raises:
        AdapterError: It is too large, too deep, or not valid.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > max_bytes:
        raise AdapterError(f"{what} has {len(raw)} bytes of JSON, more than the {max_bytes} allowed.")
    depth = 0
    for token in _BRACKETS.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > MAX_DEPTH:
            raise AdapterError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_reject_repeated_keys, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not valid JSON: {error}.") from error


def read_json_object(file: Path, max_bytes: int, advice: str) -> dict[str, Any]:
    """Read a JSON file beside an adapter.

    Args:
        file: The file, in UTF-8 with or without a byte order mark.
        max_bytes: Largest size accepted.
        advice: What it may hold and what to do, for messages.

    Returns:
        The object; empty if it holds something else.

    Raises:
        AdapterError: It cannot be read or is not valid.
    """
    try:
        content = parse_json(read_file(file, limit=max_bytes).removeprefix(codecs.BOM_UTF8), "it", max_bytes)
    except (OSError, AdapterError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removesuffix(".")
        raise AdapterError(f"{file} cannot be read ({reason}). {advice}") from error
    return content if isinstance(content, dict) else {}


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _reject_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _refuse_other_formats(file: Path, start: bytes) -> None:
    """A torch pickle can run code when it is read; it is known by its first bytes, whatever the file is called.

    A header of, say, 640 bytes also starts with 0x80 0x02, but one below 4 GiB has zeros in its upper length bytes.
    """
    if start.startswith(b"GGUF"):
        raise AdapterError(
            f"{file} is a GGUF file, as llama.cpp and sa3.cpp use, which is not supported. Use the .safetensors file "
            f"that it was made from."
        )
    if file.suffix.lower() == ".npz":
        raise AdapterError(f"{file} is a NumPy archive. Save it as .safetensors; MLX does: mx.save_safetensors.")
    if start == b"version " or (start[:1] in (b"<", b"{") and any(start[4:])):
        raise AdapterError(
            f"{file} is a text, such as a web page, an error message or the pointer of Git LFS, instead of the file "
            f"itself. Download it again: with your token where one is needed, or by git lfs pull."
        )
    if start.startswith((b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM")):
        raise AdapterError(f"{file} is audio, not an adapter. Give the .safetensors file or the run folder of one.")
    zipped = start.startswith(b"PK\x03\x04")
    pickled = start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and (len(start) < 8 or any(start[4:]))
    if zipped or pickled:
        misnamed = file.suffix.lower() == ".safetensors"
        pickle = file.with_suffix(".ckpt") if misnamed else file
        raise AdapterError(
            f"{file} is a pickle (.ckpt, .pt, .bin), which can carry code and is never loaded as an adapter. "
            f"{f'Rename it to {pickle.name} and convert' if misnamed else 'Convert'} it with torch's weights-only "
            f"reader: {format_command(['sa3-adapter', 'convert', pickle, file.with_suffix('.safetensors')])}"
        )


def read_tensors(path: Path, header: SafetensorsHeader) -> dict[str, Tensor]:
    """Read the tensors of an adapter file.

    Args:
        path: Safetensors file.
        header: Its checked header.

    Returns:
        Tensors by key; those in 8 bits as F16, which holds all their values.

    Raises:
        AdapterError: A tensor other than an alpha is not of floating point, or the file cannot be read.
    """
    for key, dtype in header.dtypes.items():
        if dtype not in FLOAT_DTYPES and not key.endswith(".alpha"):
            raise AdapterError(f"{path}: {key} is {dtype}; an adapter must be F16, BF16, F32 or F64.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in header.dtypes}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"cannot read {path}: {error}. The file is damaged; download or save it again.") from error
    return {key: x.half() if x.is_floating_point() and x.itemsize == 1 else x for key, x in tensors.items()}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, with keys in sorted order so that equal content gives equal files.

    Args:
        path: Target.
        tensors: Tensors by key.
        metadata: Texts by key.

    Raises:
        SA3Error: The folder cannot be written or the disk is full.
    """
    with replace_file(path) as temporary:
        try:
            save_file(dict(sorted(tensors.items())), temporary, dict(sorted((metadata or {}).items())) or None)
        except SafetensorError as error:  # safetensors reports the system's errors as text
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(temporary)) from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a header, whose order safetensors draws anew in each process."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if metadata := header.get("__metadata__"):
            header["__metadata__"] = dict(sorted(metadata.items()))
            content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(content) > size:  # it would reach into the tensors
                raise SA3Error(
                    f"cannot write {path.name}: its header has {size} bytes, and {len(content)} when its metadata is "
                    f"sorted. Install the release of safetensors that constraints.txt names, then run again."
                )
            file.seek(8)
            file.write(content.ljust(size))


def write_tensor_stream(
    path: str | os.PathLike[str], keys: Iterable[str], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically, one tensor at a time, so that tensors made on the way need no memory.

    Args:
        path: Target.
        keys: Their keys.
        tensors: The tensors, of floating point on the CPU, in the order of the keys.
        metadata: Texts by key.

    Raises:
        SA3Error: The folder cannot be written or the disk is full.
    """
    names = {getattr(torch, dtype): code for dtype, code in DTYPES.values()} | {torch.float64: "F64"}
    listing: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    pending = list(keys)
    longest = {"dtype": "BF16", "shape": [10**8] * 3, "data_offsets": [10**11] * 2}  # of an entry
    room = len(json.dumps(listing | dict.fromkeys(pending, longest), separators=(",", ":")).encode())
    room += -room % 8
    with replace_file(path) as temporary, temporary.open("wb") as stream:
        stream.seek(8 + room)
        begin = 0
        for key, tensor in zip(pending, tensors, strict=True):
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            stream.write(data.data)
            listing[key] = {
                "dtype": names[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, begin := begin + data.size],
            }
        stream.seek(0)
        text = json.dumps(listing, separators=(",", ":")).encode()
        stream.write(struct.pack("<Q", room) + text.ljust(room))


def hash_tensors(parts: Iterable[str | Tensor]) -> str:
    """Hash texts and the bytes of tensors.

    Args:
        parts: Tensors, and texts such as their names and shapes, in a fixed order.

    Returns:
        Hex SHA-256.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        elif part.numel():
            for block in iterate_parts(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8), BLOCK_BYTES):
                digest.update(block.numpy().data)
    return digest.hexdigest()
