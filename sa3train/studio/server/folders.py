"""What is in the folders of a studio: models, adapters, audio, latents and runs.

Listings are bounded, since a source may be a whole home folder.
"""

import functools
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sa3train.adapters.formats.run_dir import ADAPTER_FILE, CHECKPOINTS_DIR, list_checkpoints, locate_adapter
from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import SA3Error
from sa3train.core.files import path_exists
from sa3train.core.processes import PROCESS_FILE
from sa3train.core.text import suggest_name
from sa3train.data.sources.own_folders import LATENTS, RUN, STUDIO, iterate_folders
from sa3train.inference.settings import MODEL_DEFAULTS
from sa3train.models import hub
from sa3train.models.checkpoint import read_model_config
from sa3train.models.config import ModelConfig
from sa3train.models.parse import parse_model
from sa3train.reports.runs import Run, load_run, sort_runs
from sa3train.studio.server.workspace import StudioError, Workspace

ADAPTER_CONFIG, ADAPTER_SUFFIXES = "adapter_config.json", (".safetensors", ".gguf")
_CHECKPOINT_NAME = re.compile(r"step-(\d{8})\.safetensors")
MAX_LISTED = 400
CACHE_SECONDS = 3
"""For how long `find_folders` returns the same result."""


def list_adapters(workspace: Workspace) -> list[str]:
    """List adapter files, PEFT folders, and runs with their checkpoints.

    Args:
        workspace: The workspace.

    Returns:
        Short paths (`Workspace.shorten`), newest first; RUN_FOLDER@STEP for a checkpoint.
    """
    found: dict[str, Path] = {}
    states: set[Path] = set()
    for folder, files, own in iterate_folders(workspace.roots):
        if own == RUN:
            states.add(folder / CHECKPOINTS_DIR)
            steps = sorted(list_checkpoints(folder), reverse=True)
            names = [str(folder)] * (ADAPTER_FILE in files) + [f"{folder}@{step}" for step in steps]
            found |= dict.fromkeys(names, folder)  # dated alike, so that they stay together
        elif ADAPTER_CONFIG in files:
            if str(folder.parent) not in found:  # else it is a part of that adapter
                found[str(folder)] = folder
        elif "config.json" not in files and folder not in states:  # a text encoder, or a component of a pipeline
            model = hub.WEIGHTS_FILE if hub.CONFIG_FILE in files else ""
            adapters = [name for name in files if name.endswith(ADAPTER_SUFFIXES) and name != model]
            found |= {str(folder / name): folder / name for name in adapters}
    return _sort_by_age(workspace, found)


def resolve_adapter(workspace: Workspace, path: str | None) -> Path:
    """Find an adapter inside the studio's folders.

    Args:
        workspace: The workspace.
        path: A file, a PEFT or run folder, or RUN_FOLDER@STEP.

    Returns:
        Its path, in the same form. One that is missing or outside is refused.

    Raises:
        StudioError: If none is chosen, or the run has no such checkpoint.
    """
    if not path or not path.strip():
        raise StudioError("Choose an adapter: a file from the list, or its path.")
    found, (run, at, step) = workspace.resolve(path), path.rpartition("@")
    if at and not path_exists(found):  # then the run is looked for in all folders
        found = Path(f"{workspace.resolve(run)}@{step.strip()}")
    try:
        located = locate_adapter(found)
    except SA3Error as error:  # the page finds the field by its text
        raise StudioError(str(error) if path in str(error) else f"{path}: {error}") from error
    workspace.resolve_existing(located, "adapter")
    return found


def name_adapter(path: str) -> str:
    """Name an adapter as `list_adapters` does.

    Args:
        path: Its path.

    Returns:
        RUN_FOLDER@STEP for the file of a checkpoint, the path itself for anything else.
    """
    file = Path(path)
    step = _CHECKPOINT_NAME.fullmatch(file.name) if file.parent.name == CHECKPOINTS_DIR else None
    return f"{file.parent.parent}@{int(step[1])}" if step else path


def list_audio(workspace: Workspace) -> list[str]:
    """List audio files.

    Args:
        workspace: The workspace.

    Returns:
        Short paths (`Workspace.shorten`), newest first.
    """
    found = [
        folder / name for folder, files, _ in iterate_folders(workspace.roots) for name in files if _is_audio(name)
    ]
    return _sort_by_age(workspace, {str(path): path for path in found})


def list_models(workspace: Workspace) -> list[tuple[str, str]]:
    """List the models to choose from: those known by name, and folders below the roots.

    Args:
        workspace: The workspace.

    Returns:
        (label, value) of each.
    """
    available = {"nano", "nano-base", *hub.list_cached_names()}
    names = hub.list_model_names()
    choices = [(name if name in available else f"{name} (not downloaded yet)", name) for name in names]
    for folder, files, _ in iterate_folders(workspace.roots):
        if hub.PIPELINE_FILE in files or (hub.CONFIG_FILE in files and hub.WEIGHTS_FILE in files):
            choices.append((workspace.shorten(folder), str(folder)))
    if workspace.model not in [value for _, value in choices]:
        choices.append((workspace.model, workspace.model))
    return choices


def resolve_model_name(workspace: Workspace, name: str) -> str:
    """Check the name of a model.

    Args:
        workspace: The workspace.
        name: A name of the registry, the model that the studio was started with, or a folder inside the roots.

    Returns:
        The name, or the absolute path of the folder. A path outside the roots is refused as by `Workspace.resolve`.

    Raises:
        StudioError: There is neither such a name nor such a folder.
    """
    if name in hub.list_model_names() or name == workspace.model:
        return name
    try:
        return str(workspace.resolve_folder(name, "model folder"))
    except StudioError as error:
        raise StudioError(f"{error} {suggest_name(name, hub.list_model_names())}".rstrip()) from error


def load_model_config(workspace: Workspace, name: str) -> ModelConfig | None:
    """Load the configuration of a model, unless that needs a download.

    Args:
        workspace: The workspace.
        name: As for `resolve_model_name`.

    Returns:
        The configuration, or None for a model that has not been downloaded yet.
    """
    name = resolve_model_name(workspace, name)
    entry = hub.find_checkpoint(name)
    if entry is not None and entry.repo_id is not None and name not in hub.list_cached_names():
        return None
    files = hub.locate_checkpoint(name)
    return parse_model(read_model_config(files), str(files.config))


def describe_model(workspace: Workspace, name: str) -> str:
    """Describe a model in one line.

    Args:
        workspace: The workspace.
        name: As for `resolve_model_name`.

    Returns:
        Kind, longest duration and defaults; the license of a model that must be downloaded; or what is wrong.
    """
    try:
        config = load_model_config(workspace, name)
    except SA3Error as error:
        return str(error)
    if config is None:
        return f"{name} is {hub.describe_place(name)}."
    kind = "base model" if config.objective == "rectified_flow" else "post-trained model"
    longest = config.sample_size / config.sample_rate
    defaults = MODEL_DEFAULTS[config.objective]
    sampling = "{steps} steps, CFG scale {cfg_scale:g}, sampler {sampler_type}".format(**defaults)
    return f"{kind}, up to {longest:.0f} s at once; defaults: {sampling}"


def get_sibling(name: str) -> str:
    """Return the base model of a post-trained model, or the other way round.

    Args:
        name: Name of a model of the registry.

    Returns:
        Name of its sibling.

    Raises:
        StudioError: The model has none.
    """
    entry = hub.find_checkpoint(name)
    if entry is None or entry.sibling is None:
        raise StudioError(f"{name} has no known sibling. Choose a named model to compare base and post-trained.")
    return f"{entry.sibling}{hub.PACKED}" if name.endswith(hub.PACKED) else entry.sibling


@dataclass(frozen=True)
class FoundFolders:
    """Folders by what they hold, each list in order of path.

    Args:
        runs: Run folders.
        latents: Folders of encoded clips.
        audio: Folders of audio files.
    """

    runs: list[Path] = field(default_factory=list)
    latents: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)


def name_folders(workspace: Workspace, paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Name folders for a list to choose from.

    Args:
        workspace: The workspace.
        paths: The folders.

    Returns:
        (label, value) of each.
    """
    return [(workspace.shorten(path), str(path)) for path in paths]


def find_folders(workspace: Workspace) -> FoundFolders:
    """Find folders of runs, latents and audio below the roots; a result is reused for `CACHE_SECONDS`.

    Links and hidden folders are not followed, and folders inside a run or a folder of latents are not listed.

    Args:
        workspace: The workspace.

    Returns:
        The folders.
    """
    return _find_folders(workspace, int(time.monotonic() / CACHE_SECONDS))


@functools.lru_cache(maxsize=8)
def _find_folders(workspace: Workspace, period: int) -> FoundFolders:
    """Find folders; another `period` makes them be looked for again."""
    found = FoundFolders()
    closed: set[Path] = set()
    studios: set[Path] = set()
    for folder, files, own in iterate_folders(workspace.roots):
        if own == STUDIO or folder.parent in studios:
            studios.add(folder)
        if folder.parent in closed:
            closed.add(folder)
        elif PROCESS_FILE in files or own == RUN:
            found.runs.append(folder)
            closed.add(folder)
        elif own == LATENTS:
            found.latents.append(folder)
            closed.add(folder)
        elif folder not in studios and any(map(_is_source, files)):
            found.audio.extend([folder, *(root for root in workspace.sources if folder.is_relative_to(root))])
    return FoundFolders(*(sorted(set(paths)) for paths in (found.runs, found.latents, found.audio)))


def forget_folders() -> None:
    """Forget what `find_folders` has found, so that a folder made since is found at once."""
    _find_folders.cache_clear()


def find_runs(workspace: Workspace) -> list[Run]:
    """Find all runs below the roots, but for those whose files are links that lead out of them.

    Args:
        workspace: The workspace.

    Returns:
        Running ones first, then the newest.
    """
    inside = (path for path in find_folders(workspace).runs if not leads_out(workspace, path))
    return sort_runs(map(load_run, inside))


def leads_out(workspace: Workspace, folder: Path) -> bool:
    """Check whether files of a folder, such as one from somebody's archive, are links to what no page may show.

    Args:
        workspace: The workspace.
        folder: The folder.

    Returns:
        Whether one leads out of the roots, or the folder cannot be listed.
    """
    try:
        links = [path for path in folder.iterdir() if path.is_symlink()]
        return any(workspace.resolve(link) is None for link in links)
    except (OSError, StudioError):
        return True


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _is_source(name: str) -> bool:
    return _is_audio(name) or name.lower().endswith(".tar")


def _sort_by_age(workspace: Workspace, paths: Mapping[str, Path]) -> list[str]:
    dated = {name: path.stat().st_mtime for name, path in paths.items() if path.exists()}
    return [workspace.shorten(name) for name in sorted(dated, key=dated.__getitem__, reverse=True)[:MAX_LISTED]]
