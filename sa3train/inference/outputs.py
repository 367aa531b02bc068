"""The output of a generation, saved as an audio file with a sidecar for each item."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.audio.io import encode_audio
from sa3train.core.errors import GenerationError
from sa3train.core.files import (
    MADE_BY,
    check_target,
    format_json,
    is_sidecar,
    number_path,
    path_exists,
    relate_path,
    write_files,
)
from sa3train.core.log import get_logger
from sa3train.core.mapped import hash_bytes
from sa3train.core.safetensors_file import hash_tensors
from sa3train.core.user_files import read_file
from sa3train.inference.sidecar import FORMAT, list_inputs

logger = get_logger(__name__)

DEFAULT_SUFFIX = ".wav"
SAMPLE_RATE = 44100


@dataclass(frozen=True)
class GenerationOutput:
    """Generated audio.

    Attributes:
        audio: One float32 tensor (2, N_i) within ±1 per item, each with its own length. It is a list for one item too,
            so that code for one works for a batch: `output.audio[0]`.
        sample_rate: Samples per second.
        seeds: Seed of each item; None where the caller brought a torch generator.
        latents: Latents (B, C, T) on the CPU, where asked for.
        clipped_shares: Share of each item's samples that exceeded ±1 and were clipped.
        warnings: What the user should know.
        record: Content of the sidecar that all items share.
        measured: What was done to the level of each item, and how the end of a loop joins its start.
    """

    audio: list[Tensor]
    sample_rate: int
    seeds: list[int | None]
    latents: Tensor | None
    clipped_shares: list[float]
    warnings: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        seconds = ", ".join(f"{audio_CN.shape[1] / self.sample_rate:.2f} s" for audio_CN in self.audio)
        return f"GenerationOutput({seconds} at {self.sample_rate} Hz, seeds={self.seeds}, warnings={self.warnings})"

    def save(
        self, path: str | os.PathLike[str], subtype: str = "PCM_16", item: int | None = None, overwrite: bool = False
    ) -> list[Path]:
        """Write the audio, each file with its sidecar `NAME.wav.json`; a failed write leaves no partial file.

        Args:
            path: The file, `NAME_0.wav`, `NAME_1.wav` … for a batch. The suffix chooses the container (see
                `sa3train.audio.io.write_audio`), WAV without one. Where a file of that name exists, the new one becomes
                `NAME-2.wav`, or the next free number.
            subtype: Encoding of the samples.
            item: Index of the only item to write, to `path` itself; None for all.
            overwrite: Whether to replace existing audio and its sidecar instead.

        Returns:
            The audio files.
        """
        items = range(len(self.audio)) if item is None else [item]
        return self.save_at(choose_output_paths(path, len(items), overwrite), subtype, items, overwrite)

    def save_at(
        self,
        paths: Sequence[Path],
        subtype: str = "PCM_16",
        items: Sequence[int] | None = None,
        overwrite: bool = False,
    ) -> list[Path]:
        """Write items to a path each, or to the next free number of it.

        Args:
            paths: The audio files.
            subtype: Encoding of the samples.
            items: Indices of the items to write; None for all.
            overwrite: Whether to replace existing audio and its sidecar instead.

        Returns:
            The audio files.
        """
        chosen = range(len(self.audio)) if items is None else items
        contents = [self.encode_item(index, path.suffix, subtype) for index, path in zip(chosen, paths, strict=True)]
        for path in paths:
            check_output(path, subtype, list_inputs(self.record), overwrite)
        saved = []
        for index, path, content in zip(chosen, paths, contents, strict=True):

            def list_pair(number: int, path: Path = path) -> Sequence[Path]:
                numbered = number_path(path, number)
                return numbered, get_sidecar_path(numbered)

            def make_pair(pair: Sequence[Path], index: int = index, content: bytes = content) -> Sequence[bytes]:
                return content, format_json(self.build_sidecar(index, pair[0], content, subtype))

            saved.append(write_files(list_pair, make_pair, overwrite)[0])
            _say_number([path], saved[-1:])
        return saved

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

    def build_sidecar(self, item: int, path: Path, content: bytes, subtype: str) -> dict[str, Any]:
        """Build the sidecar of one item.

        Args:
            item: Index of the item.
            path: Its audio file.
            content: The file's bytes.
            subtype: Encoding of the samples.

        Returns:
            Content of the sidecar.
        """
        return {
            "made_by": MADE_BY,
            "format": FORMAT,
            "file": path.name,
            "directory": relate_path(".", path.parent),
            "item": item,
            "sha256": hash_bytes(content),
            "audio_sha256": hash_tensors((self.audio[item],)),
            "subtype": subtype,
            "seed": self.seeds[item],
            "seconds": self.audio[item].shape[1] / self.sample_rate,
            "sample_rate": self.sample_rate,
            "clipped_share": self.clipped_shares[item],
            "measured": self.measured[item] if self.measured else {},
            "warnings": self.warnings,
            **self.record,
        }


def describe_measured(measured: Mapping[str, float]) -> list[str]:
    """Describe what was done to the level of an item, and the seam of a loop.

    Args:
        measured: What a sidecar records of it.

    Returns:
        Facts such as "gain +3.2 dB to -14.0 LUFS"; none where nothing was asked for.
    """
    templates = {
        "gain_db": "gain {gain_db:+.1f} dB to {loudness_lufs:.1f} LUFS",
        "limited_db": "peaks limited by {limited_db:.1f} dB to {true_peak_db:.1f} dBTP",
        "missing_db": "{missing_db:.1f} dB quieter than asked: ask for less loudness, or for higher peaks",
        "seam_change_db": "seam {seam_change_db:.1f} dB (other joins {usual_change_db:.1f} dB)",
    }
    if measured.get("limited_db") == 0:
        templates["limited_db"] = "true peak {true_peak_db:.1f} dBTP, nothing to limit"
    silence = {"loudness_lufs": -math.inf, "true_peak_db": -math.inf}
    return [text.format(**silence | dict(measured)) for name, text in templates.items() if name in measured]


def list_output_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    """List the audio files of several items.

    Args:
        path: The file asked for; without a suffix it becomes WAV.
        count: Number of items.

    Returns:
        `path` for one item, `NAME_0.wav`, `NAME_1.wav` … for several.

    Raises:
        GenerationError: When it is a folder.
    """
    base = Path(path)
    if str(path).endswith(("/", os.sep)) or not base.name or (path_exists(base) and base.is_dir()):
        raise GenerationError(f"cannot write {path}: it is a folder. Give a file name, such as {base}/out.wav.")
    if not base.suffix:
        base = base.with_name(base.name + DEFAULT_SUFFIX)
    return [base] if count == 1 else [base.with_name(f"{base.stem}_{index}{base.suffix}") for index in range(count)]


def choose_output_paths(path: str | os.PathLike[str], count: int, overwrite: bool = False) -> list[Path]:
    """Choose the audio files of several items: `list_output_paths` under the first number at which none exists.

    A single file is left as asked for: it gets its number when it is written.

    Args:
        path: The file asked for.
        count: Number of items.
        overwrite: Whether existing files are to be replaced.

    Returns:
        The files.
    """
    asked = list_output_paths(path, count)
    for number in itertools.count(1):
        paths = asked if number == 1 else list_output_paths(number_path(Path(path), number), count)
        if overwrite or count == 1 or not any(map(os.path.lexists, [*paths, *map(get_sidecar_path, paths)])):
            _say_number(asked, paths)
            return paths
    raise AssertionError("numbers do not end")


def _say_number(asked: Sequence[Path], chosen: Sequence[Path]) -> None:
    if asked[0] != chosen[0]:
        existing = next((path for path in [*asked, *map(get_sidecar_path, asked)] if os.path.lexists(path)), asked[0])
        logger.warning("%s exists: saved as %s. --overwrite (overwrite=True) replaces it.", existing, chosen[0])


def get_sidecar_path(path: Path) -> Path:
    """Get the path of an audio file's sidecar.

    Args:
        path: The audio file.

    Returns:
        The same path with `.json` after its suffix.
    """
    return path.with_name(f"{path.name}.json")


def get_work_dir(path: Path) -> Path:
    """Get the folder that keeps the finished windows of a piece until its audio file is written.

    Args:
        path: The audio file.

    Returns:
        The same path with `.work` after its suffix.
    """
    return path.with_name(f"{path.name}.work")


def check_output(
    path: Path, subtype: str = "PCM_16", inputs: Iterable[str | os.PathLike[str]] = (), overwrite: bool = False
) -> None:
    """Check that an audio file and its sidecar can be written, before the work that makes them.

    Args:
        path: The audio file.
        subtype: Encoding of the samples.
        inputs: Files that are read, none of which may be replaced.
        overwrite: Whether existing files are to be replaced.

    Raises:
        AudioError: When the suffix and subtype do not go together.
        GenerationError: When the path is a folder, not writable, an input, or its sidecar would replace another file.
    """
    encode_audio(torch.zeros(2, 1), SAMPLE_RATE, path.suffix, subtype, str(path))
    sidecar, read = get_sidecar_path(path), list(inputs)
    for written in (path, sidecar):
        check_target(written, read, overwrite=True)
    try:
        if path.is_dir():
            raise GenerationError(f"cannot write {path}: it is a folder. Give the name of a file.")
        is_foreign = sidecar.exists() and overwrite and not _is_ours(sidecar)
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise GenerationError(f"cannot write {path}: {folder} is not a writable folder. Choose another with -o.")
    except OSError as error:  # such as a name that is too long
        raise GenerationError(f"cannot write {path}: {error.strerror}. Choose another name.") from error
    if is_foreign:
        raise GenerationError(
            f"cannot write {path}: its sidecar would replace {sidecar}, which is no sidecar. Choose another name."
        )


def _is_ours(sidecar: Path) -> bool:
    try:
        return is_sidecar(json.loads(read_file(sidecar)))
    except (OSError, ValueError):
        return False
