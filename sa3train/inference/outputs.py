"""What a generation hands back, and how it is kept: an audio file with its sidecar for each item."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.audio.io import encode_audio
from sa3train.core.errors import RequestError, SA3Error
from sa3train.core.files import write_bytes, write_json
from sa3train.inference.sidecar import FORMAT, MADE_BY, is_record

DEFAULT_SUFFIX = ".wav"
SAMPLE_RATE = 44100


@dataclass(frozen=True)
class GenerationOutput:
    """Generated audio: one (2, N_i) float32 tensor within ±1 per item, each its own length.

    `latents` (B, C, T) where asked for. `clipped_shares`: the share of each item's samples that were louder than ±1 and
    were cut to it. `warnings` lists what a user should know. `record` is the sidecar's content that items share.
    """

    audio: list[Tensor]
    sample_rate: int
    seeds: list[int | None]
    latents: Tensor | None
    clipped_shares: list[float]
    warnings: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], subtype: str = "PCM_16", item: int | None = None) -> list[Path]:
        """Write the audio to `path`, or `NAME_0.wav`, `NAME_1.wav` … for a batch, and a sidecar `.json` beside each.

        The suffix says the container (see `sa3train.audio.io.write_audio`); without one it is WAV. `item` writes that
        item alone, to `path` itself. Returns the audio files. Raises `SA3Error` when they cannot be written; files
        appear whole or not at all.
        """
        if item is None:
            return self.save_at(output_paths(path, len(self.audio)), subtype)
        return self.save_at(output_paths(path, 1), subtype, [item])

    def save_at(
        self, places: Sequence[Path], subtype: str = "PCM_16", items: Sequence[int] | None = None
    ) -> list[Path]:
        """`save` of `items` (all of them, where None) to a place each."""
        chosen = range(len(self.audio)) if items is None else items
        contents = [self.encoded(index, place.suffix, subtype) for index, place in zip(chosen, places, strict=True)]
        for place in places:
            check_output(place, subtype)
        for index, place, content in zip(chosen, places, contents, strict=True):
            write_bytes(place, content)
            try:
                write_json(sidecar_path(place), self.sidecar(index, place.name, content, subtype))
            except SA3Error:
                place.unlink(missing_ok=True)
                raise
        return list(places)

    def encoded(self, item: int, suffix: str = DEFAULT_SUFFIX, subtype: str = "PCM_16") -> bytes:
        """The bytes of the audio file of one item."""
        return encode_audio(self.audio[item], self.sample_rate, suffix, subtype, f"item {item}")

    def sidecar(self, item: int, name: str, content: bytes, subtype: str) -> dict[str, Any]:
        """The sidecar of one item whose audio file is called `name` and holds `content`."""
        return {
            "made_by": MADE_BY,
            "format": FORMAT,
            "file": name,
            "item": item,
            "sha256": hashlib.sha256(content).hexdigest(),
            "audio_sha256": hashlib.sha256(self.audio[item].numpy().tobytes()).hexdigest(),
            "subtype": subtype,
            "seed": self.seeds[item],
            "seconds": self.audio[item].shape[1] / self.sample_rate,
            "sample_rate": self.sample_rate,
            "clipped_share": self.clipped_shares[item],
            "warnings": self.warnings,
            **self.record,
        }


def output_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    """Where `count` items go: `path` for one, `NAME_0.wav`, `NAME_1.wav` … for several."""
    base = Path(path)
    if not base.suffix:
        base = base.with_name(base.name + DEFAULT_SUFFIX)
    return [base] if count == 1 else [base.with_name(f"{base.stem}_{index}{base.suffix}") for index in range(count)]


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of the audio file `path` lies."""
    return path.with_suffix(".json")


def check_output(path: Path, subtype: str = "PCM_16") -> None:
    """Raise `SA3Error` when `path` or its sidecar could not be written, before any work is done for them."""
    encode_audio(torch.zeros(2, 1), SAMPLE_RATE, path.suffix, subtype, str(path))
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder. Give the name of a file.")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"cannot write {path}: {folder} is not a folder you may write to. Choose another with -o.")
    sidecar = sidecar_path(path)
    if sidecar.exists() and not _is_ours(sidecar):
        raise RequestError(
            f"cannot write {path}: its sidecar would overwrite {sidecar}, which is not one. Choose another name."
        )


def _is_ours(sidecar: Path) -> bool:
    try:
        return is_record(json.loads(sidecar.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
