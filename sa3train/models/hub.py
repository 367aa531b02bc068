"""Where a checkpoint's files come from: the registry of names, folders, and huggingface_hub's cache and download."""

import contextlib
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sa3train.core.errors import CheckpointError
from sa3train.core.files import hash_file, path_exists
from sa3train.core.log import get_logger
from sa3train.models.hub_messages import HUB, explain_failure, explain_unknown_name

logger = get_logger(__name__)

CONFIG_FILE = "model_config.json"
WEIGHTS_FILE = "model.safetensors"
PIPELINE_FILE = "model_index.json"
PACKS_REPO = "stabilityai/stable-audio-3-optimized"
PACKED = "@mlx"
"""Behind the name of a registered model: its open packs of the MLX builds, in fp16, instead of the released files."""
TEXT_PACK = "t5gemma_f16.npz"
_PACKS_FOLDER, _DIT_PACKS = "MLX", "dit_*.npz"


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

    @property
    def packs(self) -> tuple[str, ...]:
        """Files of its packs in `PACKS_REPO`, that of the DiT first; none where there are none."""
        if self.repo_id is None or self.kind != "model":
            return ()
        kind = "l" if self.name.startswith("medium") else "s"
        sides = (f"same_{kind}_{side}_f32.npz" for side in ("encoder", "decoder"))
        names = (f"dit_{self.name.replace('small-', 'sm-')}_f16.npz", *sides, TEXT_PACK)
        return tuple(f"{_PACKS_FOLDER}/{name}" for name in names)


_COMMUNITY = "Stability AI Community License"
_TERMS = "https://stability.ai/license; the text encoder: Gemma Terms of Use, https://ai.google.dev/gemma/terms"
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
        name: Registry name, also with `PACKED`, or repository.

    Returns:
        The checkpoint, or None.
    """
    plain = name.removesuffix(PACKED)
    if plain in REGISTRY and (plain == name or REGISTRY[plain].packs):
        return REGISTRY[plain]
    return next((info for info in REGISTRY.values() if info.repo_id is not None and info.repo_id == name), None)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
        name: Registry name, or the name of the folder.
        folder: Folder that contains them; given a pack, the one where that lies.
        info: Registry entry; None for a folder of the user's.
        pack: The pack of the DiT, of a model in the layout of the MLX builds.
    """

    name: str
    folder: Path
    info: CheckpointInfo | None = None
    pack: Path | None = None

    def __post_init__(self) -> None:
        if self.folder.suffix == ".npz":
            object.__setattr__(self, "pack", self.folder)
            object.__setattr__(self, "folder", self.folder.parent)

    @property
    def path(self) -> Path:
        """What names them: the pack, or the folder."""
        return self.pack or self.folder

    @property
    def is_pipeline(self) -> bool:
        """Whether they are in the layout of diffusers."""
        return (self.folder / PIPELINE_FILE).is_file() and not self.weights.is_file()

    @property
    def config(self) -> Path:
        """Path of `model_config.json`, of diffusers' `model_index.json`, or of a pack that has no config beside it."""
        path = self.folder / (PIPELINE_FILE if self.is_pipeline else CONFIG_FILE)
        return path if self.pack is None or path.is_file() else self.pack

    @property
    def weights(self) -> Path:
        """Path of `model.safetensors`, which the released layout has."""
        return self.folder / WEIGHTS_FILE


def locate_checkpoint(name_or_path: str | os.PathLike[str]) -> CheckpointFiles:
    """Locate the files of a checkpoint, in the cache or by downloading them.

    Args:
        name_or_path: Registry name, folder, pack of the MLX builds, or repository in the layout of diffusers.

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
    if name.endswith(PACKED):
        pack, *_ = [fetch_file(PACKS_REPO, file) for file in info.packs]
        return CheckpointFiles(info.name, pack, info)
    return CheckpointFiles(info.name, fetch_file(info.repo_id, WEIGHTS_FILE).parent, info)


def locate_config(name: str) -> CheckpointFiles:
    """Locate a checkpoint of which only the config is needed: of a released one no more is downloaded.

    Args:
        name: As for `locate_checkpoint`.

    Returns:
        The files, of which the config is there.

    Raises:
        CheckpointError: As `locate_checkpoint` does.
    """
    info = check_checkpoint(name)
    if info is None or info.repo_id is None or name.endswith(PACKED):
        return locate_checkpoint(name)
    return CheckpointFiles(info.name, fetch_file(info.repo_id, CONFIG_FILE).parent, info)


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
    elif info is not None and name.endswith(PACKED):
        if not _find_cached(name):
            _download(PACKS_REPO, info.packs[0], info.packs[0], str)
    elif info is not None and info.repo_id is not None:
        fetch_file(info.repo_id, CONFIG_FILE)
    return info


def choose_weights(name: str, weights: str | None) -> str:
    """Choose the files of a model.

    Args:
        name: Registry name, folder or repository.
        weights: "mlx" for the open packs of the MLX builds; "released" or None for what the name means by itself.

    Returns:
        The name that stands for them.

    Raises:
        CheckpointError: There are no packs of that model.
    """
    if weights != "mlx" or name.endswith((PACKED, ".npz")):
        return name
    info = find_checkpoint(name)
    if info is None or not info.packs:
        packed = ", ".join(each.name for each in REGISTRY.values() if each.packs)
        raise CheckpointError(f"there are no packs of {name} for --weights mlx (weights=mlx). There are of {packed}.")
    return f"{info.name}{PACKED}"


def _is_repository(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not path_exists(Path(name))


def _locate_folder(name: str) -> CheckpointFiles:
    folder = Path(name)
    with contextlib.suppress(RuntimeError):  # the home of nobody
        folder = folder.expanduser()
    if not name or not path_exists(folder):
        raise explain_unknown_name(name, REGISTRY)
    if folder.suffix == ".npz" and folder.is_file():
        return CheckpointFiles(folder.stem, folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file. Give the folder that contains {CONFIG_FILE} and {WEIGHTS_FILE}; "
            f"adapters are given with --lora, and pickles (.ckpt, .pt) are not read."
        )
    files = CheckpointFiles(folder.resolve().name, folder)
    missing = [path.name for path in (files.config, files.weights) if not path.is_file()]
    packs = sorted(folder.glob(_DIT_PACKS)) if missing and not files.is_pipeline else []
    if len(packs) == 1:
        return replace(files, folder=packs[0])
    if packs:
        names = ", ".join(pack.name for pack in packs)
        raise CheckpointError(f"{folder} holds several packs: {names}. Give one of them, such as {packs[0]}.")
    if missing and not files.is_pipeline:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {' and '.join(missing)} missing. A checkpoint folder contains "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, as the released repositories do, diffusers' {PIPELINE_FILE}, or packs "
            f"of the MLX builds (dit_….npz)."
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
        raise CheckpointError(
            f"{explain_unknown_name(repo_id, REGISTRY)} As a repository of the hub: {error}"
        ) from error
    return CheckpointFiles(repo_id, folder)


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


def fetch_folder(repo_id: str, subfolder: str) -> Path:
    """Fetch a folder of a repository, from the cache or by downloading it.

    Args:
        repo_id: Repository.
        subfolder: Path of the folder in it; empty for all of it.

    Returns:
        Path of the folder.

    Raises:
        CheckpointError: The download failed.
    """
    import huggingface_hub

    prefix = f"{subfolder}/" if subfolder else ""
    download = functools.partial(huggingface_hub.snapshot_download, repo_id, allow_patterns=[f"{prefix}*"])
    return Path(_download(repo_id, f"{prefix}*", f"{prefix}config.json", download)) / subfolder


def _download(repo_id: str, what: str, probe: str, download: Callable[[], str]) -> str:
    """Run one download; every failure becomes a `CheckpointError` that says what to do.

    The hub repeats a request without an answer six times, for up to 100 s, and waits as long as a busy server tells it
    to. So the file `probe` is asked for once first, and whoever started the command hears of a failure at once.
    """
    try:
        _ask(repo_id, probe)
        _state_license(repo_id)
        return download()
    except Exception as error:  # the HTTP library and hf_xet raise classes that the hub neither documents nor keeps
        at_hand = f"Models at hand without the hub: {', '.join(list_cached_names())}."
        raise explain_failure(repo_id, what, error, at_hand, _offer_packs(repo_id)) from error


def check_reachable(name: str) -> None:
    """Check once that the hub shows a model of transformers, whose own loaders repeat a request many times.

    Args:
        name: Its repository, or a folder, which needs no hub.

    Raises:
        CheckpointError: If it is a repository that is not in the cache and that the hub does not show.
    """
    import huggingface_hub

    probe = "config.json"
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError:  # a path
        return
    if Path(name).is_dir() or isinstance(huggingface_hub.try_to_load_from_cache(name, probe), str):
        return
    try:
        _ask(name, probe)
    except Exception as error:
        raise explain_failure(name, probe, error, "What is in the cache needs no hub.", "") from error


def _ask(repo_id: str, probe: str) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    url = huggingface_hub.hf_hub_url(repo_id, probe)
    huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)


@functools.cache
def _state_license(repo_id: str) -> None:
    info = find_checkpoint(repo_id)
    name = info.license if info is not None else _COMMUNITY if repo_id == PACKS_REPO else "see its page"
    logger.info(f"fetching from {HUB}/{repo_id}; license: {name}{f' ({_TERMS})' if name == _COMMUNITY else ''}")


def _offer_packs(repo_id: str) -> str:
    info = find_checkpoint(repo_id)
    if info is None or not info.packs:
        return ""
    return (
        f" Without an account: {info.name}{PACKED} as the model's name (or --weights mlx, weights=mlx, where a command "
        f"has it) takes the same model from the open packs of {HUB}/{PACKS_REPO}, in fp16."
    )


def _list_names() -> dict[str, CheckpointInfo]:
    """The checkpoints by every name that they have: that of the registry, and that of their packs."""
    return {f"{name}{end}": info for end in ("", PACKED) for name, info in REGISTRY.items() if not end or info.packs}


def list_cached_names() -> list[str]:
    """List the checkpoints that load without a network.

    Returns:
        Names.
    """
    return [name for name, info in _list_names().items() if info.repo_id is None or _find_cached(name)]


def _find_cached(name: str) -> list[Path]:
    """The files of a checkpoint of the registry in the cache, where all are."""
    import huggingface_hub

    info, is_packed = _list_names()[name], name.endswith(PACKED)
    repo_id, files = (PACKS_REPO, info.packs) if is_packed else (info.repo_id or "", (CONFIG_FILE, WEIGHTS_FILE))
    found = [huggingface_hub.try_to_load_from_cache(repo_id, file) for file in files]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths if len(paths) == len(files) else []


def list_model_names() -> list[str]:
    """List the models that can be named.

    Returns:
        Names.
    """
    return [name for name, info in _list_names().items() if info.kind == "model"]


def describe_place(name: str) -> str:
    """Describe where a checkpoint is.

    Args:
        name: One of the registry.

    Returns:
        Such as "in the cache, 2.61 GB".
    """
    info = _list_names()[name]
    if info.repo_id is None:
        return "comes with sa3train"
    if found := _find_cached(name):
        return f"in the cache, {sum(path.stat().st_size for path in found) / 1e9:.2f} GB"
    where = f"without an account from {HUB}/{PACKS_REPO}" if name.endswith(PACKED) else f"from {info.page}"
    return f"to be downloaded {where} (license: {info.license})"


def list_checkpoints() -> dict[str, str]:
    """List the models that can be named, and folders with a model in the working directory.

    Returns:
        Where each is, in words, by name or folder.
    """
    states = {name: describe_place(name) for name in list_model_names()}
    configs = [path for name in (CONFIG_FILE, PIPELINE_FILE) for path in Path().glob(f"*/{name}")]
    found = [CheckpointFiles(path.parent.name, path.parent) for path in configs]
    folders = {each.folder for each in found if each.is_pipeline or each.weights.is_file()}
    folders |= {pack.parent for pack in Path().glob(f"*/{_DIT_PACKS}")}
    return states | {f"./{folder}": "folder" for folder in sorted(folders)}
