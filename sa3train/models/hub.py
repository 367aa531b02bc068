"""Where a checkpoint's files come from: a folder, or a repository through huggingface_hub's cache and download.

The checkpoints known by name: where they come from, what they are, and which is whose twin.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sa3train.core.errors import CheckpointError
from sa3train.models.config import TextConfig

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Entry:
    """One named checkpoint. `sibling` is the base of a post-trained model or the other way round."""

    name: str
    kind: Literal["model", "autoencoder"]
    repo_id: str | None  # None: made on this machine
    licence: str
    sibling: str | None = None

    @property
    def page(self) -> str | None:
        """The hub page on which the licence is accepted."""
        return None if self.repo_id is None else f"{HUB}/{self.repo_id}"


_COMMUNITY = "Stability AI Community License"
_OWN = "Apache-2.0"


def _pair(name: str, repo_id: str | None, licence: str) -> list[Entry]:
    base = f"{name}-base"
    base_repo = None if repo_id is None else f"{repo_id}-base"
    return [
        Entry(name, "model", repo_id, licence, sibling=base),
        Entry(base, "model", base_repo, licence, sibling=name),
    ]


REGISTRY: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *_pair("nano", None, _OWN),
        *_pair("small-music", "stabilityai/stable-audio-3-small-music", _COMMUNITY),
        *_pair("small-sfx", "stabilityai/stable-audio-3-small-sfx", _COMMUNITY),
        *_pair("medium", "stabilityai/stable-audio-3-medium", _COMMUNITY),
        Entry("same-s", "autoencoder", "stabilityai/SAME-S", _COMMUNITY),
        Entry("same-l", "autoencoder", "stabilityai/SAME-L", _COMMUNITY),
    )
}


def find(name: str) -> Entry | None:
    """The entry called `name`, or whose repository is `name`; None when there is none."""
    if name in REGISTRY:
        return REGISTRY[name]
    return next((entry for entry in REGISTRY.values() if entry.repo_id is not None and entry.repo_id == name), None)


def unknown(name: str) -> CheckpointError:
    """The error for a name that is neither known nor a folder, with the nearest name and the list."""
    close = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.6)
    guess = f" Did you mean {close[0]}?" if close else ""
    return CheckpointError(
        f"there is no model called {name!r} and no folder of that name.{guess} "
        f"Known names: {', '.join(REGISTRY)}; or give a folder with model_config.json and model.safetensors."
    )


CONFIG_FILE = "model_config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class CheckpointFiles:
    """The two files of a checkpoint, the folder they are in, and the repository that folder mirrors, if any."""

    name: str
    folder: Path
    entry: Entry | None = None

    @property
    def config(self) -> Path:
        return self.folder / CONFIG_FILE

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE


def locate(name_or_path: str | os.PathLike[str]) -> CheckpointFiles:
    """Find a checkpoint by registry name (cache, then download) or folder.

    Raises `CheckpointError`: unknown name, not a folder, file missing, gated repository, no network.
    """
    name = os.fspath(name_or_path)
    entry = find(name)
    if entry is None:
        return _locate_folder(name)
    if entry.repo_id is None:
        from sa3train.models.nano import nano_folder

        return CheckpointFiles(entry.name, nano_folder(entry.name), entry)
    fetch(entry.repo_id, CONFIG_FILE)
    return CheckpointFiles(entry.name, fetch(entry.repo_id, WEIGHTS_FILE).parent, entry)


def _locate_folder(name: str) -> CheckpointFiles:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file. Give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}; "
            f"adapters are given with --lora, and pickles (.ckpt, .pt) are not read."
        )
    if not folder.is_dir():
        raise unknown(name)
    files = CheckpointFiles(folder.resolve().name, folder)
    missing = [path.name for path in (files.config, files.weights) if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {' and '.join(missing)} missing. "
            f"A checkpoint folder holds {CONFIG_FILE} and {WEIGHTS_FILE}, as the released repositories do."
        )
    return files


@dataclass(frozen=True)
class TextEncoderSource:
    """Places that may hold the text encoder, tried in order: folders, then (repository, subfolder) pairs."""

    folders: tuple[Path, ...]
    repositories: tuple[tuple[str, str], ...]

    def folder(self) -> Path:
        """The folder with tokenizer and weights; downloads it when it is nowhere here. Raises `CheckpointError`."""
        for folder in self.folders:
            if _is_complete(folder):
                return folder
        if not self.repositories:
            raise CheckpointError(
                f"the text encoder is not in {self.folders[0]}: config.json, model.safetensors and tokenizer.json "
                f"belong there. Copy that folder along with the checkpoint."
            )
        for repo_id, subfolder in self.repositories:
            cached = _cached_snapshot(repo_id)
            if cached is not None and _is_complete(cached / subfolder):
                return cached / subfolder
        problem: CheckpointError | None = None
        for repo_id, subfolder in self.repositories:
            try:
                folder = _download_folder(repo_id, subfolder)
            except CheckpointError as error:
                problem = problem or error
                continue
            if _is_complete(folder):
                return folder
        raise problem or CheckpointError(f"no text encoder in {self.repositories}")


def text_encoder_source(files: CheckpointFiles, config: TextConfig) -> TextEncoderSource:
    """Where `config`'s text encoder may be: beside the checkpoint, in its own repository, in the one it names."""
    if config.model_path is not None:
        return TextEncoderSource((files.folder / config.model_path,), ())
    subfolder = config.subfolder or ""
    own = files.entry.repo_id if files.entry is not None else None
    repositories = dict.fromkeys(repo for repo in (own, config.repo_id) if repo)
    return TextEncoderSource((files.folder / subfolder,), tuple((repo, subfolder) for repo in repositories))


def _is_complete(folder: Path) -> bool:
    weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return weights and tokenizer and (folder / "config.json").is_file()


def fetch(repo_id: str, filename: str) -> Path:
    """One file of a repository, from the cache or else downloaded. Raises `CheckpointError` saying what to do."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repo_id, filename)
    if isinstance(cached, str):
        return Path(cached)
    return Path(_ask_hub(repo_id, filename, lambda: huggingface_hub.hf_hub_download(repo_id, filename)))


def _cached_snapshot(repo_id: str) -> Path | None:
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(repo_id, CONFIG_FILE)
    return Path(config).parent if isinstance(config, str) else None


def _download_folder(repo_id: str, subfolder: str) -> Path:
    import huggingface_hub

    pattern = f"{subfolder}/*" if subfolder else "*"
    download = lambda: huggingface_hub.snapshot_download(repo_id, allow_patterns=[pattern])  # noqa: E731
    return Path(_ask_hub(repo_id, pattern, download)) / subfolder


def _ask_hub(repo_id: str, what: str, download: Callable[[], str]) -> str:
    """Run one download; what the hub may answer becomes a `CheckpointError` with the remedy."""
    import httpx
    from huggingface_hub import errors

    page = f"{HUB}/{repo_id}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN to a token of that account)"
    try:
        return download()
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its licence at {page}, then {log_in} and run again. "
            f"If you have the files already, give their folder instead of the name."
        ) from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise CheckpointError(
            f"the hub does not show {repo_id}: it may be private or gated, or the token may be wrong. "
            f"See {page}, then {log_in}, or give a local folder."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no {what}. See {page}, or give a local folder.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError) as error:
        raise CheckpointError(
            f"{what} of {repo_id} is not in the cache and the hub cannot be reached{_offline_note()}. "
            f"Connect and run again, or give a local folder. Usable without a network: {', '.join(cached_names())}."
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"downloading {what} of {repo_id} failed: {error}. Try again later, free some disk space if it is full, "
            f"or give a local folder."
        ) from error


def _offline_note() -> str:
    from huggingface_hub import constants

    return " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""


def cached_names() -> list[str]:
    """Registry names that load without a network."""
    import huggingface_hub

    return [
        entry.name
        for entry in REGISTRY.values()
        if entry.repo_id is None
        or all(
            isinstance(huggingface_hub.try_to_load_from_cache(entry.repo_id, name), str)
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
    ]
