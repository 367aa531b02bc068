"""Where a checkpoint's files come from: the registry of names, folders, and huggingface_hub's cache and download."""

import contextlib
import difflib
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sa3train.core.errors import CheckpointError
from sa3train.core.files import hash_file, path_exists
from sa3train.models.config import TextConfig

HUB = "https://huggingface.co"
CONFIG_FILE = "model_config.json"
WEIGHTS_FILE = "model.safetensors"
PIPELINE_FILE = "model_index.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """One named checkpoint.

    Attributes:
        name: Registry name.
        kind: Whole model or stand-alone autoencoder.
        repo_id: Repository on the hub; None where it ships with the package.
        license: Name of the license.
        sibling: Registry name of the base of a post-trained model, or the other way round.
        learning_rate: Peak rate that suits its adapters, where it is not that of the recipes.
    """

    name: str
    kind: Literal["model", "autoencoder"]
    repo_id: str | None
    license: str
    sibling: str | None = None
    learning_rate: float | None = None

    @property
    def page(self) -> str | None:
        """Page on the hub where the license is accepted."""
        return None if self.repo_id is None else f"{HUB}/{self.repo_id}"


_COMMUNITY = "Stability AI Community License"
_OWN = "Apache-2.0"


def _pair(name: str, repo_id: str | None, license: str, learning_rate: float | None = None) -> list[CheckpointInfo]:
    base = f"{name}-base"
    base_repo = None if repo_id is None else f"{repo_id}-base"
    return [
        CheckpointInfo(name, "model", repo_id, license, base, learning_rate),
        CheckpointInfo(base, "model", base_repo, license, name, learning_rate),
    ]


REGISTRY: dict[str, CheckpointInfo] = {
    info.name: info
    for info in (
        *_pair("nano", None, _OWN, learning_rate=1e-3),
        *_pair("small-music", "stabilityai/stable-audio-3-small-music", _COMMUNITY),
        *_pair("small-sfx", "stabilityai/stable-audio-3-small-sfx", _COMMUNITY),
        *_pair("medium", "stabilityai/stable-audio-3-medium", _COMMUNITY),
        CheckpointInfo("same-s", "autoencoder", "stabilityai/SAME-S", _COMMUNITY),
        CheckpointInfo("same-l", "autoencoder", "stabilityai/SAME-L", _COMMUNITY),
    )
}


def find_checkpoint(name: str) -> CheckpointInfo | None:
    """Find a checkpoint in the registry.

    Args:
        name: Registry name or repository.

    Returns:
        The checkpoint, or None.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    return next((info for info in REGISTRY.values() if info.repo_id is not None and info.repo_id == name), None)


def explain_unknown_name(name: str) -> CheckpointError:
    """Explain that a name is neither known nor a folder, with the closest name and the list.

    Args:
        name: What was given.

    Returns:
        The error to raise.
    """
    close = difflib.get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.6)
    guess = f" Did you mean {close[0]}?" if close else ""
    return CheckpointError(
        f"no model called '{name}' and no folder of that name.{guess} "
        f"Known names: {', '.join(REGISTRY)}; or give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a folder or "
        f"repository of diffusers with {PIPELINE_FILE}."
    )


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
        name: Registry name, or the name of the folder.
        folder: Folder that contains them.
        info: Registry entry; None for a folder of the user's.
    """

    name: str
    folder: Path
    info: CheckpointInfo | None = None

    @property
    def is_pipeline(self) -> bool:
        """Whether they are in the layout of diffusers."""
        return (self.folder / PIPELINE_FILE).is_file() and not self.weights.is_file()

    @property
    def config(self) -> Path:
        """Path of `model_config.json`, or of diffusers' `model_index.json`."""
        return self.folder / (PIPELINE_FILE if self.is_pipeline else CONFIG_FILE)

    @property
    def weights(self) -> Path:
        """Path of `model.safetensors`, which the released layout has."""
        return self.folder / WEIGHTS_FILE


def locate_checkpoint(name_or_path: str | os.PathLike[str]) -> CheckpointFiles:
    """Locate the files of a checkpoint, in the cache or by downloading them.

    Args:
        name_or_path: Registry name, folder, or repository in the layout of diffusers.

    Returns:
        The files.

    Raises:
        CheckpointError: The name is unknown, a file is missing, the repository is gated, or there is no network.
    """
    name = os.fspath(name_or_path)
    info = check_checkpoint(name)
    if info is None:
        return _fetch_pipeline(name) if _is_repository(name) else _locate_folder(name)
    if info.repo_id is None:
        from sa3train.models.nano import ensure_nano_folder

        return CheckpointFiles(info.name, ensure_nano_folder(info.name), info)
    return CheckpointFiles(info.name, fetch_file(info.repo_id, WEIGHTS_FILE).parent, info)


def check_checkpoint(name: str) -> CheckpointInfo | None:
    """Check that a checkpoint can be had, before anything large is imported or downloaded.

    Args:
        name: Registry name, folder, or repository in the layout of diffusers.

    Returns:
        Its registry entry; None for another.

    Raises:
        CheckpointError: As `locate_checkpoint` does.
    """
    info = find_checkpoint(name)
    if info is None and not _is_repository(name):
        _locate_folder(name)
    elif info is not None and info.repo_id is not None:
        fetch_file(info.repo_id, CONFIG_FILE)
    return info


def _is_repository(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not path_exists(Path(name))


def _locate_folder(name: str) -> CheckpointFiles:
    folder = Path(name)
    with contextlib.suppress(RuntimeError):  # the home of nobody
        folder = folder.expanduser()
    if not name or not path_exists(folder):
        raise explain_unknown_name(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file. Give the folder that contains {CONFIG_FILE} and {WEIGHTS_FILE}; "
            f"adapters are given with --lora, and pickles (.ckpt, .pt) are not read."
        )
    files = CheckpointFiles(folder.resolve().name, folder)
    missing = [path.name for path in (files.config, files.weights) if not path.is_file()]
    if missing and not files.is_pipeline:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {' and '.join(missing)} missing. A checkpoint folder contains "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, as the released repositories do, or diffusers' {PIPELINE_FILE}."
        )
    return files


def _fetch_pipeline(repo_id: str) -> CheckpointFiles:
    """Fetch a repository in the layout of diffusers, which is known by its `model_index.json`."""
    import huggingface_hub

    patterns = [PIPELINE_FILE, CONFIG_FILE, "*/*.json", "*/*.safetensors", "*/*.model"]
    download = functools.partial(huggingface_hub.snapshot_download, repo_id, allow_patterns=patterns)
    try:
        folder = fetch_file(repo_id, PIPELINE_FILE).parent
        weights = (f"{part}/*.safetensors" for part in ("transformer", "duration_embedder", "vae", "text_encoder"))
        if not all(any(folder.glob(pattern)) for pattern in (*weights, "tokenizer/tokenizer.*", "scheduler/*.json")):
            folder = Path(_download(repo_id, "*", PIPELINE_FILE, download))
    except CheckpointError as error:
        raise CheckpointError(f"{explain_unknown_name(repo_id)} As a repository of the hub: {error}") from error
    return CheckpointFiles(repo_id, folder)


@dataclass(frozen=True)
class TextEncoderSource:
    """Where the text encoder may be, tried in order.

    Attributes:
        folders: Folders.
        repositories: Then pairs of repository and subfolder.
        tokenizer: Folder of the tokenizer, where it has one of its own.
    """

    folders: tuple[Path, ...]
    repositories: tuple[tuple[str, str], ...]
    tokenizer: Path | None = None

    def tokenizer_folder(self) -> Path:
        """Find the folder with the tokenizer. `CheckpointError` is raised as by `folder`.

        Returns:
            The folder.
        """
        return self.tokenizer or self.folder()

    def folder(self) -> Path:
        """Find the folder with the weights and, unless it has its own, the tokenizer, downloading it where needed.

        Returns:
            The folder.

        Raises:
            CheckpointError: It is nowhere, or the download failed.
        """
        for folder in self.folders:
            if _is_complete(folder, self.tokenizer):
                return folder
        if not self.repositories:
            raise CheckpointError(
                f"the text encoder is not in {self.folders[0]}: config.json, model.safetensors and tokenizer.json "
                f"belong there. Copy that folder together with the checkpoint."
            )
        import huggingface_hub

        for repo_id, subfolder in self.repositories:
            config = huggingface_hub.try_to_load_from_cache(repo_id, CONFIG_FILE)
            if isinstance(config, str) and _is_complete(folder := Path(config).parent / subfolder):
                return folder
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


def find_text_encoder(files: CheckpointFiles, config: TextConfig) -> TextEncoderSource:
    """Find where a text encoder may be: beside the checkpoint, in its repository, or in the one that the config names.

    Args:
        files: The checkpoint.
        config: Its prompt conditioner.

    Returns:
        The candidates.
    """
    if files.is_pipeline:
        return TextEncoderSource((files.folder / "text_encoder",), (), files.folder / "tokenizer")
    if config.model_path is not None:
        return TextEncoderSource((files.folder / config.model_path,), ())
    subfolder = config.subfolder or ""
    own = files.info.repo_id if files.info is not None else None
    repositories = dict.fromkeys(repo for repo in (own, config.repo_id) if repo)
    return TextEncoderSource((files.folder / subfolder,), tuple((repo, subfolder) for repo in repositories))


def _is_complete(folder: Path, tokenizer: Path | None = None) -> bool:
    has_weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    has_tokenizer = any(((tokenizer or folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return has_weights and has_tokenizer and (folder / "config.json").is_file()


def fetch_file(repo_id: str, filename: str) -> Path:
    """Fetch one file of a repository, from the cache or by downloading it.

    Args:
        repo_id: Repository.
        filename: Name of the file.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: The download failed, or delivered something else than the hub announced.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repo_id, filename)
    if isinstance(cached, str):
        return Path(cached)
    path = Path(_download(repo_id, filename, filename, lambda: huggingface_hub.hf_hub_download(repo_id, filename)))
    stored = path.resolve()  # named by its SHA-256, where the hub keeps a large file
    if re.fullmatch("[0-9a-f]{64}", stored.name) and hash_file(stored) != stored.name:
        stored.unlink()
        raise CheckpointError(
            f"{filename} of {repo_id} arrived damaged: its SHA-256 is not the one that the hub announced. It was "
            f"removed; run the same command again to download it once more."
        )
    return path


def _download_folder(repo_id: str, subfolder: str) -> Path:
    import huggingface_hub

    prefix = f"{subfolder}/" if subfolder else ""
    download = lambda: huggingface_hub.snapshot_download(repo_id, allow_patterns=[f"{prefix}*"])  # noqa: E731
    return Path(_download(repo_id, f"{prefix}*", f"{prefix}config.json", download)) / subfolder


def _download(repo_id: str, what: str, probe: str, download: Callable[[], str]) -> str:
    """Run one download; every failure becomes a `CheckpointError` that says what to do.

    The hub repeats a request without an answer six times, for up to 100 s, and waits as long as a busy server tells it
    to. So the file `probe` is asked for once first, and whoever started the command hears of a failure at once.
    """
    import huggingface_hub
    from huggingface_hub import constants

    try:
        url = huggingface_hub.hf_hub_url(repo_id, probe)
        huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return download()
    except Exception as error:  # the HTTP library and hf_xet raise classes that the hub neither documents nor keeps
        raise _explain_failure(repo_id, what, error) from error


def _explain_failure(repo_id: str, what: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # the HTTP library that this version of the hub uses

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    page, status = f"{HUB}/{repo_id}", getattr(getattr(cause, "response", None), "status_code", None)
    log_in = "log in with `hf auth login` (or set HF_TOKEN to a token of that account)"
    at_hand = f"Models at hand without the hub: {', '.join(list_cached_names())}."
    if isinstance(cause, errors.GatedRepoError):
        return CheckpointError(
            f"{repo_id} is gated: accept its license at {page}, then {log_in} and run again. "
            f"If you have the files already, give their folder instead of the name."
        )
    no_access = errors.RepositoryNotFoundError | errors.DisabledRepoError | UnicodeEncodeError  # the last: of the token
    if isinstance(cause, no_access) or status in (401, 403):
        return CheckpointError(
            f"the hub does not show {repo_id}: it may be private or gated, or the token may be wrong. "
            f"See {page}, then {log_in}, or give a local folder."
        )
    if status == 404:
        return CheckpointError(f"{repo_id} has no {what}. See {page}, or give a local folder.")
    if status == 429:
        return CheckpointError(
            f"the hub has received too many requests from here. Wait some minutes, or {log_in}, then run the same "
            f"command again; complete files are kept. {at_hand}"
        )
    no_answer = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.ConnectError, httpx.ProxyError)
    if isinstance(cause, (*no_answer, httpx.ConnectTimeout, httpx.UnsupportedProtocol)):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{cause}".partition("\n")[0]
        return CheckpointError(
            f"{what} of {repo_id} is not in the cache and the hub cannot be reached ({reason}). "
            f"Connect and run again, or give a local folder. {at_hand}"
        )
    reason = f"{cause}".strip().partition("\n")[0].rstrip(".") or type(cause).__name__
    return CheckpointError(
        f"downloading {what} of {repo_id} failed: {reason}. Check the connection and the free disk space, then run "
        f"the same command again; complete files are kept. Or give a local folder. {at_hand}"
    )


def list_cached_names() -> list[str]:
    """List the checkpoints that load without a network.

    Returns:
        Registry names.
    """
    return [info.name for info in REGISTRY.values() if info.repo_id is None or _find_cached(info.repo_id)]


def _find_cached(repo_id: str) -> Path | None:
    """The weights of a repository in the cache, where they and the config are."""
    import huggingface_hub

    found = [huggingface_hub.try_to_load_from_cache(repo_id, name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return Path(found[1]) if isinstance(found[0], str) and isinstance(found[1], str) else None


def list_checkpoints() -> dict[str, str]:
    """List the models that can be named, and folders with a model in the working directory.

    Returns:
        Where each is, in words, by registry name or folder.
    """
    states = {}
    for info in REGISTRY.values():
        if info.kind != "model":
            continue
        if info.repo_id is None:
            states[info.name] = "comes with sa3train"
        elif weights := _find_cached(info.repo_id):
            states[info.name] = f"in the cache, {weights.stat().st_size / 1e9:.2f} GB"
        else:
            states[info.name] = f"to be downloaded from {info.page} ({info.license})"
    configs = [path for name in (CONFIG_FILE, PIPELINE_FILE) for path in Path().glob(f"*/{name}")]
    found = [CheckpointFiles(path.parent.name, path.parent) for path in sorted(configs)]
    return states | {f"./{each.folder}": "folder" for each in found if each.is_pipeline or each.weights.is_file()}
