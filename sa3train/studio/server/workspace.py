"""Where the studio works: the folders it may touch, and no others.

What lies in a studio's folders: models, adapters, audio. Listings are bounded: a root may be a whole home folder.

What lies under the folders that the studio was started with: runs, latents, folders of audio.
"""

import functools
import os
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import SA3Error
from sa3train.data.shards.index import INDEX
from sa3train.inference.request import BASE_CFG, BASE_SAMPLER, BASE_STEPS, POST_CFG, POST_SAMPLER, POST_STEPS
from sa3train.models.config import ModelConfig
from sa3train.models.hub import CONFIG_FILE, REGISTRY, WEIGHTS_FILE, cached_names, locate
from sa3train.models.parse import parse_model, read_config
from sa3train.reports.run_files import CONFIG, RECORD
from sa3train.studio.server.processes import RECORD as PROCESS

HOME = ".sa3-studio"
FILE_ROUTE = "/gradio_api/file="


class StudioError(SA3Error):
    """A wish of the page's user that cannot be granted."""


@dataclass(frozen=True)
class Workspace:
    """The folders of a studio and what it starts with.

    `roots`: whole folders that may be read and written. `home`: the studio's own folder (history, uploads), inside one
    of them. `model`: the name or folder first chosen. `device` None: the best there is.
    """

    roots: tuple[Path, ...]
    home: Path
    model: str = "nano"
    device: str | None = None

    @classmethod
    def at(cls, folders: Iterable[str | Path], model: str = "nano", device: str | None = None) -> "Workspace":
        """A workspace of existing `walk_folders`; its home is `.sa3-studio` in the first. Raises `StudioError`."""
        roots = tuple(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
        if not roots:
            raise StudioError("the studio needs a folder to work in: name one or more.")
        for root in roots:
            if not root.is_dir():
                raise StudioError(f"{root} is not a folder. Name folders that exist, or make it first.")
        home = roots[0] / HOME
        try:
            for part in ("history", "uploads"):
                (home / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudioError(
                f"cannot write into {roots[0]}: {error.strerror or error}. Results are kept there; name a folder "
                f"that you may write to first."
            ) from error
        return cls(roots, home.resolve(), model, device)

    @property
    def history(self) -> Path:
        """Where results are kept."""
        return self.home / "history"

    @property
    def uploads(self) -> Path:
        """Where files given through the page are kept."""
        return self.home / "uploads"

    def inside(self, path: str | Path) -> Path:
        """`path` in full, symbolic links followed; relative ones count from the first root.

        It need not exist. Raises `StudioError` when it lies, or a link on the way leads, outside the roots.
        """
        text = str(path).strip()
        if not text or "\0" in text:
            raise StudioError("give the path of a file or folder.")
        try:
            found = (self.roots[0] / Path(text).expanduser()).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links, or a user that does not exist
            raise StudioError(f"{text} leads nowhere: {error}.") from error
        if not any(found.is_relative_to(root) for root in self.roots):
            folders = ", ".join(str(root) for root in self.roots)
            raise StudioError(
                f"{text} is outside the folders of this studio ({folders}). Copy it there, or start sa3-studio with "
                f"its folder too."
            )
        return found

    def file(self, path: str | Path, what: str = "file") -> Path:
        """As `inside`, for a file that must exist; `what` it is goes into the message."""
        found = self.inside(path)
        if not found.is_file():
            raise StudioError(f"there is no {what} {found}.")
        return found

    def folder(self, path: str | Path, what: str = "folder") -> Path:
        """As `inside`, for a folder that must exist."""
        found = self.inside(path)
        if not found.is_dir():
            raise StudioError(f"there is no {what} {found}.")
        return found

    def shown(self, path: str | Path) -> str:
        """`path` as short as it can be said: relative to the first root, or in full."""
        full = Path(path)
        return str(full.relative_to(self.roots[0])) if full.is_relative_to(self.roots[0]) else str(full)

    def url(self, path: str | Path) -> str:
        """The address at which the page finds the file `path`. Raises as `inside` does."""
        return FILE_ROUTE + quote(str(self.inside(path)))

    def served(self, path: str | Path) -> bool:
        """Whether the page may fetch `path`: in full, inside the roots, and no hidden file but the studio's own."""
        if not Path(path).is_absolute():  # also an address elsewhere, which Gradio would fetch
            return False
        try:
            found = self.inside(path)
        except StudioError:
            return False
        if found.is_relative_to(self.home):
            return True
        root = next(root for root in self.roots if found.is_relative_to(root))
        return not any(part.startswith(".") for part in found.relative_to(root).parts)

    def command(self, argv: Iterable[str | Path]) -> str:
        """A command line to paste into a shell."""
        return shlex.join(str(part) for part in argv)


MOST_FOLDERS = 4000
DEEPEST = 8
MOST_LISTED = 400

ADAPTER_CONFIG = "adapter_config.json"


def walk_folders(workspace: Workspace) -> Iterator[tuple[Path, list[str]]]:
    """Every folder under the roots with the names of its files; hidden ones are left out."""
    seen = 0
    for root in workspace.roots:
        for parent, below, files in os.walk(root):
            here = Path(parent)
            deep = len(here.relative_to(root).parts) >= DEEPEST
            below[:] = [] if deep else sorted(name for name in below if not name.startswith((".", "__")))
            seen += 1
            if seen > MOST_FOLDERS:
                return
            yield here, sorted(name for name in files if not name.startswith("."))


def list_adapters(workspace: Workspace) -> list[str]:
    """Adapter files and PEFT folders under the roots, newest first, as `Workplace.shown` says them."""
    found = []
    for here, files in walk_folders(workspace):
        if ADAPTER_CONFIG in files:
            found.append(here)
            continue
        whole = CONFIG_FILE in files
        found += [
            here / name for name in files if name.endswith(".safetensors") and not (whole and name == WEIGHTS_FILE)
        ]
    return _newest(workspace, found)


def list_audio(workspace: Workspace) -> list[str]:
    """Audio files under the roots, newest first."""
    return _newest(
        workspace, [here / name for here, files in walk_folders(workspace) for name in files if _is_audio(name)]
    )


def list_models(workspace: Workspace) -> list[tuple[str, str]]:
    """(label, value) of every model that can be chosen: by name, and folders under the roots."""
    here = {"nano", "nano-base", *cached_names()}
    named = [entry.name for entry in REGISTRY.values() if entry.kind == "model"]
    choices = [(name if name in here else f"{name} (not downloaded yet)", name) for name in named]
    for folder, files in walk_folders(workspace):
        if CONFIG_FILE in files and WEIGHTS_FILE in files:
            choices.append((workspace.shown(folder), str(folder)))
    if workspace.model not in [value for _, value in choices]:
        choices.append((workspace.model, workspace.model))
    return choices


def resolve_model_name(workspace: Workspace, name: str) -> str:
    """`name`, if it is one of the registry, the one the studio was started with, or a folder under the roots."""
    if name in REGISTRY or name == workspace.model:
        return name
    return str(workspace.folder(name, "model folder"))


def read_model_config(workspace: Workspace, name: str) -> ModelConfig | None:
    """The model's configuration, or None while that would mean a download. Raises `SA3Error` for no model."""
    name = resolve_model_name(workspace, name)
    entry = REGISTRY.get(name)
    if entry is not None and entry.repo_id is not None and name not in cached_names():
        return None
    files = locate(name)
    return parse_model(read_config(files.config), str(files.config))


def get_generation_defaults(config: ModelConfig) -> tuple[int, float, str]:
    """Steps, guidance and sampler that a request leaves to the model."""
    if config.objective == "rectified_flow":
        return BASE_STEPS, BASE_CFG, BASE_SAMPLER
    return POST_STEPS, POST_CFG, POST_SAMPLER


def describe_model(workspace: Workspace, name: str) -> str:
    """A line on a model: what it is and how far it reaches."""
    try:
        config = read_model_config(workspace, name)
    except SA3Error as error:
        return str(error)
    if config is None:
        entry = REGISTRY[name]
        return f"{name} is downloaded when it is first used. Its licence: {entry.licence}, {entry.page}."
    kind = "base model" if config.objective == "rectified_flow" else "post-trained model"
    longest = config.sample_size / config.sample_rate
    steps, cfg, sampler = get_generation_defaults(config)
    return f"{kind}, up to {longest:.0f} s; by default {steps} steps, guidance {cfg:g}, {sampler}"


def get_sibling(name: str) -> str:
    """The base of a post-trained model, or the other way round. Raises `StudioError` when it has none."""
    entry = REGISTRY.get(name)
    if entry is None or entry.sibling is None:
        raise StudioError(f"{name} has no known twin: base and post-trained can be compared for the named models.")
    return entry.sibling


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _newest(workspace: Workspace, paths: list[Path]) -> list[str]:
    dated = sorted(((path.stat().st_mtime, path) for path in paths if path.exists()), reverse=True)
    return [workspace.shown(path) for _, path in dated[:MOST_LISTED]]


FRESH_SECONDS = 3


@dataclass(frozen=True)
class Survey:
    """Folders by what they hold, each in order of path."""

    runs: list[Path] = field(default_factory=list)
    latents: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)


def survey_folders(workspace: Workspace) -> Survey:
    """Look through the roots. Links and hidden folders are not followed, and what is inside a run or a folder of
    latents is its own business. A survey of the last few seconds is given again.
    """
    return _recent(workspace, int(time.monotonic() / FRESH_SECONDS))


def refresh_survey(workspace: Workspace) -> Survey:
    """`survey_folders`, always anew."""
    found = Survey()
    closed: set[Path] = set()
    for folder, files in walk_folders(workspace):
        names = set(files)
        if folder.parent in closed:
            closed.add(folder)
        elif PROCESS in names or {CONFIG, RECORD} <= names:
            found.runs.append(folder)
            closed.add(folder)
        elif INDEX in names:
            found.latents.append(folder)
            closed.add(folder)
        elif any(name.lower().endswith(AUDIO_SUFFIXES) for name in files):
            found.audio.append(folder)
    return Survey(*(sorted(set(paths)) for paths in (found.runs, found.latents, found.audio)))


@functools.lru_cache(maxsize=8)
def _recent(workspace: Workspace, moment: int) -> Survey:
    return refresh_survey(workspace)
