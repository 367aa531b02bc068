"""SentencePiece's models of Gemma's kind as a `tokenizer.json`: BPE over characters, with bytes for unknown ones.

The file is a protocol buffer (sentencepiece_model.proto): field 1 is repeated and holds piece (1), score (2), type (3).
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sa3train.core.errors import CheckpointError

_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
_LONGEST_PIECE = 1000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        value |= (data[at] & 127) << shift
        if data[at] < 128:
            return value, at + 1
        at, shift = at + 1, shift + 7
    raise ValueError("a number of more than 64 bits")


def _iterate_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (_BYTES, _FIXED32, _FIXED64):
            raise ValueError(f"wire type {kind}")
        length, at = _read_varint(data, at) if kind == _BYTES else ({_FIXED32: 4, _FIXED64: 8}[kind], at)
        if at + length > len(data):
            raise ValueError("a field is longer than the data")
        yield key >> 3, data[at : at + length]
        at += length


def _list_pieces(data: bytes) -> list[tuple[str, float, int]]:
    pieces: list[tuple[str, float, int]] = []
    for field, content in _iterate_fields(memoryview(data)):
        if field == 1 and isinstance(content, memoryview):
            values = dict(_iterate_fields(content))
            (score,) = struct.unpack("<f", values.get(2, bytes(4)))  # type: ignore[arg-type]
            pieces.append((bytes(values[1]).decode(), score, int(values.get(3, _NORMAL))))
    if any(len(piece) > _LONGEST_PIECE for piece, _, _ in pieces):
        raise ValueError(f"a piece of more than {_LONGEST_PIECE} characters")
    return pieces


def convert_tokenizer(data: bytes, target: Path, source: str) -> None:
    """Convert a model.

    Pieces merge in the order of their scores, as in SentencePiece; symbols defined by the user are found first.

    Args:
        data: The serialized model.
        target: `tokenizer.json` to write.
        source: Name of the file, for messages.

    Raises:
        CheckpointError: It is no model of SentencePiece, or has no pieces.
    """
    try:
        pieces = _list_pieces(data)
        ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
        unknown = next(piece for piece, _, kind in pieces if kind == _UNKNOWN)
    except (IndexError, KeyError, ValueError, TypeError, StopIteration, struct.error) as error:
        raise CheckpointError(
            f"{source}: the tokenizer is no model of SentencePiece ({error!r}). Copy it again."
        ) from error
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score, kind in pieces
        if kind == _NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: (merge[0], ids[merge[1]], ids[merge[2]]))
    model = BPE(ids, [merge[1:] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece, _, kind in pieces if kind == _USER_DEFINED])
    tokenizer.save(str(target))
