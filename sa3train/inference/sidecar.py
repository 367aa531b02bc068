"""The sidecar: a JSON beside each audio file with everything that reproduces its bytes and reveals changes."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch

from sa3train import __version__
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.core.config import Setting, build, check_settings, setting
from sa3train.core.device import get_device_name
from sa3train.core.errors import GenerationError, SA3Error
from sa3train.core.files import FOLDER_FILES, MADE_BY, hash_file, is_sidecar, path_exists, relate_path
from sa3train.core.text import shorten
from sa3train.core.user_files import read_file
from sa3train.inference.resolve import ResolvedSettings
from sa3train.inference.settings import AUDIO_SETTINGS, PER_ITEM_SETTINGS, GenerationSettings

FORMAT = 1
MAX_BYTES = 1 << 24
MAX_THREADS = 1024
_ANY = Setting("Any value.")
PACKAGES = ("torchaudio", "transformers", "soundfile")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe versions and hardware that the bytes of a result may depend on.

    Args:
        device: The device that computes.

    Returns:
        Versions, device, CPU capability and threads.
    """
    return {
        "sa3train": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
        "torch": torch.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "python": platform.python_version(),
        "device": get_device_name(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def describe_adapter(given: str | os.PathLike[str] | Adapter, adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter for the sidecar.

    Args:
        given: What the caller gave: a path, or the adapter itself.
        adapter: The loaded adapter.

    Returns:
        Path and SHA-256 (None for an adapter that is no file) and the fingerprint of its content.
    """
    path = adapter.source if isinstance(given, Adapter) else str(locate_adapter(os.fspath(given)))
    is_file = bool(path) and path_exists(path)
    return {
        "path": path if is_file else None,
        "sha256": hash_path(Path(path)) if is_file else None,
        "fingerprint": adapter.fingerprint,
    }


@dataclass(frozen=True)
class _Model:
    name: str
    source: str
    fingerprint: str
    autoencoder: str


@dataclass(frozen=True)
class _Input:
    path: str | None
    sha256: str


@dataclass(frozen=True)
class _Inputs:
    init_audio: _Input | None
    inpaint_audio: _Input | None


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    path: str | None
    sha256: str | None
    fingerprint: str
    strength: float | list[float]
    conditioner_strength: float | None
    interval: list[float] = setting(help="Noise levels at which it acts.", min=0, max=1, items=(2, 2))
    exclude_layers: list[str]
    allow_partial: bool

    def __post_init__(self) -> None:
        check_settings(self, "adapters", GenerationError)
        if isinstance(self.strength, list) and len(self.strength) != 2:
            raise GenerationError(f"adapters.strength={self.strength} must be a number, or two.")


@dataclass(frozen=True, kw_only=True)
class _Sidecar:
    """What a sidecar must hold; `made_by` and `format` are read before."""

    made_by: str
    format: int
    file: str
    item: int = setting(help="Index of the item in its batch.", min=0)
    sha256: str
    audio_sha256: str
    subtype: str
    seed: int | None
    directory: str
    seconds: float = setting(help="Length of the audio.", unit="seconds", min=0, max=3600)
    sample_rate: int = setting(help="Samples per second.", min=1)
    clipped_share: float = setting(help="Share of clipped samples.", min=0, max=1)
    measured: dict[str, float]
    warnings: list[str]
    model: _Model
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    settings: ResolvedSettings
    inputs: _Inputs
    adapters: list[_Adapter]
    environment: dict[str, str | int | bool]
    studio: dict[str, Any] | None

    def __post_init__(self) -> None:
        check_settings(self, error=GenerationError)
        if Path(self.file).name != self.file or not Path(self.file).suffix:
            raise GenerationError(f"file={self.file} must be the name of an audio file.")
        if self.item >= self.settings.batch_size:
            raise GenerationError(f"item={self.item} must be less than batch_size={self.settings.batch_size}.")
        for name in PER_ITEM_SETTINGS:
            values = getattr(self.settings, name)
            if values is not None and len(values) != self.settings.batch_size:
                raise GenerationError(f"{name} must have batch_size={self.settings.batch_size} values.")
        duration = self.settings.duration[self.item]
        if self.seed != self.settings.seed or abs(self.seconds - duration) > 1e-3:
            raise GenerationError(
                f"seed={self.seed} and seconds={self.seconds:g} differ from those of its settings, which are used: "
                f"seed={self.settings.seed} and duration={duration:g}."
            )
        threads = self.environment.get("threads")
        if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
            raise GenerationError(f"environment.threads={threads} must be from 1 to {MAX_THREADS}.")
        GenerationSettings.from_dict(self.settings.to_dict())  # checks the range of each


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read a sidecar.

    Args:
        path: The `.json`, or the audio that it lies beside.

    Returns:
        Its content, with every field present and of its type.

    Raises:
        GenerationError: When it is missing, unreadable, no sidecar, of another format, or a field is missing, of
            another type or out of range.
    """
    beside = path.with_name(f"{path.name}.json")
    if path.suffix.lower() != ".json" and (path.is_file() or beside.is_file()):
        path = beside
    try:
        content = read_file(path, limit=MAX_BYTES).decode("utf-8-sig")  # Windows editors add a byte order mark
        record = json.loads(content, object_pairs_hook=_collect)
    except FileNotFoundError as error:
        raise GenerationError(
            f"no such sidecar: {path}. Give the .json that sa3-generate wrote next to the audio."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise GenerationError(
            f"{path} cannot be read as a sidecar: {reason}. Give the .json that sa3-generate wrote next to the audio."
        ) from error
    if not is_sidecar(record):
        raise GenerationError(f"{path} is not a sidecar of sa3-generate: it lacks made_by={MADE_BY}.")
    if record.get("format") != FORMAT:
        raise GenerationError(
            f"{path} has format {shorten(repr(record.get('format')))}, but this version reads {FORMAT}. "
            "Update sa3train."
        )
    settings = record.get("settings")
    if isinstance(settings, dict):
        settings = dict.fromkeys(AUDIO_SETTINGS) | settings  # recorded as inputs
    try:
        _check_values(record)
        build(_Sidecar, {"studio": None, "directory": "", "measured": {}} | record | {"settings": settings})
    except SA3Error as error:
        raise GenerationError(f"{path}: {error} It was edited or damaged: restore it.") from error
    return dict(record)


def _collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"it has {shorten(repr(repeated))} twice")
    return dict(pairs)


def _check_values(value: Any, name: str = "") -> None:
    """Refuse numbers that are not finite and texts that are none, at any depth."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(item, f"{name}[{key}]" if isinstance(value, list) else f"{name}.{key}".lstrip("."))
    elif problem := _ANY.find_problem(value):
        raise GenerationError(f"{name}={shorten(repr(value))} must {problem}.")


def list_inputs(record: Mapping[str, Any], folder: Path = Path()) -> list[Path]:
    """List the files that a generation read.

    Args:
        record: Content of its sidecar.
        folder: The sidecar's folder.

    Returns:
        Its audio and adapters that are files and still exist.
    """
    entries = [*record.get("inputs", {}).values(), *record.get("adapters", [])]
    given = [entry["path"] for entry in entries if entry and entry["path"]]
    return [found[0] for path in given if (found := list_places(path, record, folder))]


def list_places(path: str, record: Mapping[str, Any], folder: Path) -> list[Path]:
    """List where a recorded path leads: from the working directory of then, that of now, and the sidecar's folder.

    Args:
        path: As it was given to the command.
        record: Content of the sidecar.
        folder: The sidecar's folder.

    Returns:
        Existing paths, the likeliest first; the last may be a file of that name next to the sidecar.
    """
    then = Path(relate_path(Path(os.path.realpath(folder), record.get("directory", ""))))
    found: list[Path] = []
    for each in dict.fromkeys((path, path.replace("\\", "/"))):  # the second: recorded on Windows
        found += filter(path_exists, (then / each, Path(each), folder / each, folder / Path(each).name))
    return found


def locate_input(recorded: Mapping[str, Any], record: Mapping[str, Any], folder: Path, role: str) -> Path:
    """Locate a recorded input, see `list_places`.

    Args:
        recorded: Path and SHA-256 in the sidecar.
        record: Content of the sidecar.
        folder: The sidecar's folder.
        role: What the file is, for messages.

    Returns:
        Path of the unchanged file.

    Raises:
        GenerationError: When it was no file, is missing, or has changed.
    """
    if not recorded.get("path"):
        raise GenerationError(
            f"{role} was given as an array, not as a file: this result cannot be generated again from its sidecar."
        )
    given = recorded["path"]
    candidates = list_places(given, record, folder)
    if not candidates:
        raise GenerationError(f"{role} {given} is missing. Restore it there or next to the sidecar.")
    for path in candidates:
        if hash_path(path) == recorded["sha256"]:
            return path
    raise GenerationError(
        f"{role} {candidates[0]} has changed: its SHA-256 is {hash_path(candidates[0])[:12]}…, but "
        f"{str(recorded['sha256'])[:12]}… was used. Restore the original file."
    )


def hash_path(path: Path) -> str:
    """Hash a file, or the files of an adapter folder together.

    Args:
        path: The file or folder.

    Returns:
        SHA-256 in hexadecimal.
    """
    if not path.is_dir():
        return hash_file(path)
    parts = [f"{name} {hash_file(path / name)}" for name in FOLDER_FILES if (path / name).exists()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
