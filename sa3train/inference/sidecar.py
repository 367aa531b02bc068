"""The sidecar: a JSON beside each audio file with everything that reproduces its bytes and reveals changes."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import soundfile
import torch

from sa3train import __version__
from sa3train.adapters.adapter import Adapter
from sa3train.core.errors import GenerationError
from sa3train.core.files import hash_file

MADE_BY = "sa3train"
FORMAT = 1
KEYS = (
    *("file", "item", "sha256", "audio_sha256", "subtype", "settings", "model", "precision", "adapters", "inputs"),
    "environment",
)
PACKAGES = ("torchaudio", "transformers", "soundfile")
# The files of a PEFT folder that make up the adapter.
FOLDER_FILES = ("adapter_config.json", "adapter_model.safetensors")


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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
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
    path = adapter.source if isinstance(given, Adapter) else os.fspath(given)
    is_file = bool(path) and Path(path).exists()
    return {
        "path": path if is_file else None,
        "sha256": hash_path(Path(path)) if is_file else None,
        "fingerprint": adapter.fingerprint,
    }


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read a sidecar.

    Args:
        path: The `.json`.

    Returns:
        Its content.

    Raises:
        GenerationError: When it is missing, unreadable, incomplete, no sidecar, or of a later format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GenerationError(
            f"no such sidecar: {path}. Give the .json that sa3-generate wrote next to the audio."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GenerationError(f"{path} cannot be read as a sidecar: {error}.") from error
    if not is_sidecar(record):
        raise GenerationError(f"{path} is not a sidecar of sa3-generate: it lacks made_by={MADE_BY}.")
    if record.get("format") != FORMAT:
        raise GenerationError(
            f"{path} has format {record.get('format')}, but this version reads {FORMAT}. Update sa3train."
        )
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise GenerationError(f"{path} is incomplete: {', '.join(missing)} missing.")
    return dict(record)


def is_sidecar(content: Any) -> bool:
    """Check whether a JSON value is a sidecar.

    Args:
        content: The value.

    Returns:
        Whether it says that sa3train made it.
    """
    return isinstance(content, dict) and content.get("made_by") == MADE_BY


def locate_input(recorded: dict[str, Any], folder: Path, role: str) -> Path:
    """Locate a recorded input: at its path, relative to the sidecar's folder, or next to the sidecar.

    Args:
        recorded: Path and SHA-256 in the sidecar.
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
    given = Path(recorded["path"])
    candidates = [path for path in (given, folder / given, folder / given.name) if path.exists()]
    if not candidates:
        raise GenerationError(f"{role} {given} is missing. Restore it there or next to the sidecar.")
    for path in candidates:
        if hash_path(path) == recorded["sha256"]:
            return path
    raise GenerationError(
        f"{role} {candidates[0]} has changed: its SHA-256 is {hash_path(candidates[0])[:12]}…, but "
        f"{recorded['sha256'][:12]}… was used. Restore the original file."
    )


def hash_path(path: Path) -> str:
    """Hash a file, or the two files of a PEFT adapter folder together.

    Args:
        path: The file or folder.

    Returns:
        SHA-256 in hexadecimal.
    """
    if not path.is_dir():
        return hash_file(path)
    parts = [f"{name} {hash_file(path / name)}" for name in FOLDER_FILES if (path / name).exists()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
