"""The output of a generation, saved as an audio file with a sidecar for each item."""

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
from sa3train.core.errors import GenerationError, SA3Error
from sa3train.core.files import write_bytes, write_json
from sa3train.core.safetensors_file import hash_tensors
from sa3train.inference.sidecar import FORMAT, MADE_BY, is_sidecar

DEFAULT_SUFFIX = ".wav"
SAMPLE_RATE = 44100


@dataclass(frozen=True)
class GenerationOutput:
    """Generated audio.

    Attributes:
        audio: One float32 tensor (2, N_i) within ±1 per item, each with its own length.
        sample_rate: Samples per second.
        seeds: Seed of each item; None where the caller brought a torch generator.
        latents: Latents (B, C, T) on the CPU, where asked for.
        clipped_shares: Share of each item's samples that exceeded ±1 and were clipped.
        warnings: What the user should know.
        record: Content of the sidecar that all items share.
    """

    audio: list[Tensor]
    sample_rate: int
    seeds: list[int | None]
    latents: Tensor | None
    clipped_shares: list[float]
    warnings: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], subtype: str = "PCM_16", item: int | None = None) -> list[Path]:
        """Write the audio with a sidecar `.json` beside each file; a failed write leaves no partial file.

        Args:
            path: The file, `NAME_0.wav`, `NAME_1.wav` … for a batch. The suffix chooses the container (see
                `sa3train.audio.io.write_audio`), WAV without one.
            subtype: Encoding of the samples.
            item: Index of the only item to write, to `path` itself; None for all.

        Returns:
            The audio files.
        """
        if item is None:
            return self.save_at(list_output_paths(path, len(self.audio)), subtype)
        return self.save_at(list_output_paths(path, 1), subtype, [item])

    def save_at(self, paths: Sequence[Path], subtype: str = "PCM_16", items: Sequence[int] | None = None) -> list[Path]:
        """Write items to a path each.

        Args:
            paths: The audio files.
            subtype: Encoding of the samples.
            items: Indices of the items to write; None for all.

        Returns:
            The audio files.
        """
        chosen = range(len(self.audio)) if items is None else items
        contents = [self.encode_item(index, path.suffix, subtype) for index, path in zip(chosen, paths, strict=True)]
        for path in paths:
            check_output(path, subtype)
        for index, path, content in zip(chosen, paths, contents, strict=True):
            write_bytes(path, content)
            try:
                write_json(get_sidecar_path(path), self.build_sidecar(index, path.name, content, subtype))
            except SA3Error:
                path.unlink(missing_ok=True)
                raise
        return list(paths)

    def encode_item(self, item: int, suffix: str = DEFAULT_SUFFIX, subtype: str = "PCM_16") -> bytes:
        """Encode one item as an audio file.

        Args:
            item: Index of the item.
            suffix: Suffix of the container.
            subtype: Encoding of the samples.

        Returns:
            The file's bytes.
        """
        return encode_audio(self.audio[item], self.sample_rate, suffix, subtype, f"item {item}")

    def build_sidecar(self, item: int, name: str, content: bytes, subtype: str) -> dict[str, Any]:
        """Build the sidecar of one item.

        Args:
            item: Index of the item.
            name: Name of its audio file.
            content: The file's bytes.
            subtype: Encoding of the samples.

        Returns:
            Content of the sidecar.
        """
        return {
            "made_by": MADE_BY,
            "format": FORMAT,
            "file": name,
            "item": item,
            "sha256": hashlib.sha256(content).hexdigest(),
            "audio_sha256": hash_tensors((self.audio[item],)),
            "subtype": subtype,
            "seed": self.seeds[item],
            "seconds": self.audio[item].shape[1] / self.sample_rate,
            "sample_rate": self.sample_rate,
            "clipped_share": self.clipped_shares[item],
            "warnings": self.warnings,
            **self.record,
        }


def list_output_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    """List the audio files of several items.

    Args:
        path: The file asked for; without a suffix it becomes WAV.
        count: Number of items.

    Returns:
        `path` for one item, `NAME_0.wav`, `NAME_1.wav` … for several.
    """
    base = Path(path)
    if not base.suffix:
        base = base.with_name(base.name + DEFAULT_SUFFIX)
    return [base] if count == 1 else [base.with_name(f"{base.stem}_{index}{base.suffix}") for index in range(count)]


def get_sidecar_path(path: Path) -> Path:
    """Get the path of an audio file's sidecar.

    Args:
        path: The audio file.

    Returns:
        The same path with the suffix `.json`.
    """
    return path.with_suffix(".json")


def check_output(path: Path, subtype: str = "PCM_16") -> None:
    """Check that an audio file and its sidecar can be written, before the work that makes them.

    Args:
        path: The audio file.
        subtype: Encoding of the samples.

    Raises:
        AudioError: When the suffix and subtype do not go together.
        GenerationError: When the path is a folder, not writable, or its sidecar would overwrite another file.
    """
    encode_audio(torch.zeros(2, 1), SAMPLE_RATE, path.suffix, subtype, str(path))
    if path.is_dir():
        raise GenerationError(f"cannot write {path}: it is a folder. Give the name of a file.")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise GenerationError(f"cannot write {path}: {folder} is not a writable folder. Choose another with -o.")
    sidecar = get_sidecar_path(path)
    if sidecar.exists() and not _is_ours(sidecar):
        raise GenerationError(
            f"cannot write {path}: its sidecar would overwrite {sidecar}, which is no sidecar. Choose another name."
        )


def _is_ours(sidecar: Path) -> bool:
    try:
        return is_sidecar(json.loads(sidecar.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
