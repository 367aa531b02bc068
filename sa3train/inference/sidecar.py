"""The JSON beside each generated file: all that is needed to make the same bytes again, and to notice changes."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import soundfile
import torch

from sa3train.adapters.adapter import Adapter
from sa3train.core.errors import RequestError
from sa3train.core.files import sha256_of

MADE_BY = "sa3train"
FORMAT = 1
KEYS = (
    *("file", "item", "sha256", "audio_sha256", "subtype", "settings", "model", "precision", "adapters", "inputs"),
    "environment",
)
PACKAGES = ("sa3train", "torch", "torchaudio", "transformers", "soundfile")
# The files of a PEFT folder that make up the adapter.
FOLDER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware on which the bytes of a result may depend."""
    packages = {name: _version(name) for name in PACKAGES}
    return {
        **packages,
        "torch": torch.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def adapter_record(given: str | os.PathLike[str] | Adapter, adapter: Adapter) -> dict[str, Any]:
    """Which adapter was used: its path and SHA-256 (None when it never was a file) and its content's fingerprint."""
    path = adapter.source if isinstance(given, Adapter) else os.fspath(given)
    known = bool(path) and Path(path).exists()
    return {
        "path": path if known else None,
        "sha256": hash_of(Path(path)) if known else None,
        "fingerprint": adapter.fingerprint,
    }


def read_record(path: Path) -> dict[str, Any]:
    """The sidecar at `path`. Raises `RequestError` when it is missing, not ours, or of a later format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(
            f"no such sidecar: {path}. Give the .json that sa3-generate wrote beside the audio."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path} cannot be read as a sidecar: {error}.") from error
    if not is_record(record):
        raise RequestError(f"{path} is not a sidecar of sa3-generate: it does not say made_by {MADE_BY!r}.")
    if record.get("format") != FORMAT:
        raise RequestError(f"{path} has format {record.get('format')}, and this sa3train reads {FORMAT}: update it.")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise RequestError(f"{path} is not whole: {', '.join(missing)} is missing.")
    return dict(record)


def is_record(content: Any) -> bool:
    """Whether `content` is a sidecar of ours."""
    return isinstance(content, dict) and content.get("made_by") == MADE_BY


def find_unchanged(recorded: dict[str, Any], folder: Path, role: str) -> Path:
    """Where the file of a record lies now: as recorded, else from the sidecar's folder, else beside the sidecar.

    Raises `RequestError` when it was given as an array, is not there, or its content is not what was used.
    """
    if not recorded.get("path"):
        raise RequestError(
            f"{role} was given as an array, not as a file: this result cannot be made again from its sidecar."
        )
    given = Path(recorded["path"])
    places = [place for place in (given, folder / given, folder / given.name) if place.exists()]
    if not places:
        raise RequestError(f"{role} {given} is not there any more: put it back, or beside the sidecar.")
    for place in places:
        if hash_of(place) == recorded["sha256"]:
            return place
    raise RequestError(
        f"{role} {places[0]} has changed since: its SHA-256 is {hash_of(places[0])[:12]}…, "
        f"and {recorded['sha256'][:12]}… was used. Put the file back as it was."
    )


def hash_of(path: Path) -> str:
    """SHA-256 of a file, or of a PEFT adapter folder's two files together."""
    if not path.is_dir():
        return sha256_of(path)
    parts = [f"{name} {sha256_of(path / name)}" for name in FOLDER_FILES if (path / name).exists()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
