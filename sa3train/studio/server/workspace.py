"""The folders that a studio may read and write, and what they hold: models, adapters, audio, latents and runs.

Listings are bounded, since a root may be a whole home folder.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.device import choose_device
from sa3train.core.errors import SA3Error
from sa3train.core.user_files import is_file, scan_folder
from sa3train.data.shards.index import INDEX_FILE
from sa3train.inference.settings import MODEL_DEFAULTS
from sa3train.models import hub
from sa3train.models.config import ModelConfig
from sa3train.models.parse import parse_model, read_config_file
from sa3train.reports import run_files
from sa3train.studio.server.processes import PROCESS_FILE

HOME = ".sa3-studio"
FILE_ROUTE = "/gradio_api/file="
ADAPTER_CONFIG = "adapter_config.json"
MAX_FOLDERS = 4000
MAX_DEPTH = 8
MAX_LISTED = 400
CACHE_SECONDS = 3
"""For how long `find_folders` returns the same result."""


class StudioError(SA3Error):
    """Invalid request from the UI."""


@dataclass(frozen=True)
class Workspace:
    """The folders of a studio and its initial choices.

    Args:
        roots: Folders that may be read and written, with all that is in them.
        home: The studio's own folder (history, uploads), inside one of `roots`.
        model: Name or folder of the model that is selected first.
        device: Device to run on. None: the best one.
    """

    roots: tuple[Path, ...]
    home: Path
    model: str = "nano"
    device: str | None = None

    @classmethod
    def create(cls, folders: Iterable[str | Path], model: str = "nano", device: str | None = None) -> "Workspace":
        """Create a workspace of existing folders, with its home in the first of them.

        Args:
            folders: The roots.
            model: Name or folder of the model that is selected first.
            device: Device to run on. None: the best one.

        Returns:
            The workspace.

        Raises:
            StudioError: There is no folder, one does not exist, or the first cannot be written to.
            SA3Error: There is no such model or device.
        """
        check_model(model)
        choose_device(device)
        if "" in map(str, folders := list(folders)):
            raise StudioError("A folder has no name. Name folders that exist, or . for the current one.")
        roots = tuple(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
        if not roots:
            raise StudioError("The studio needs a folder to work in. Name one or more.")
        for root in roots:
            if not root.is_dir():
                raise StudioError(f"{root} is not a folder. Name folders that exist, or create it first.")
        home = roots[0] / HOME
        try:
            for part in ("history", "uploads"):
                (home / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudioError(
                f"Cannot write to {roots[0]}: {error.strerror or error}. The studio stores results there. Name a "
                "writable folder first."
            ) from error
        return cls(roots, home.resolve(), model, device)

    @property
    def history(self) -> Path:
        """Folder of generated results."""
        return self.home / "history"

    @property
    def uploads(self) -> Path:
        """Folder of files uploaded through the page."""
        return self.home / "uploads"

    def resolve(self, path: str | Path) -> Path:
        """Resolve a path, symbolic links included, and check that it is inside the roots.

        Args:
            path: A path that need not exist; a relative one starts at the first root. One that exists is taken as it is
                written; otherwise spaces around it are left out, and `~` is the home folder.

        Returns:
            The absolute path.

        Raises:
            StudioError: The path, or a link on the way, leads outside the roots.
        """
        text = str(path)
        if not text.strip() or "\0" in text:
            raise StudioError("Enter the path of a file or folder.")
        try:
            written = self.roots[0] / text
            found = (written if os.path.lexists(written) else self.roots[0] / Path(text.strip()).expanduser()).resolve()
            str(found).encode()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.lstat()
        except (OSError, RuntimeError, UnicodeError) as error:  # a loop of links, an unknown user, a name too long
            shown = f"{text:.100}".encode(errors="replace").decode()
            raise StudioError(f"Cannot resolve {shown}: {_get_cause(error)}. Correct the path.") from error
        if not any(found.is_relative_to(root) for root in self.roots):
            folders = ", ".join(str(root) for root in self.roots)
            raise StudioError(
                f"{text} is outside the folders of this studio ({folders}). Copy it there, or restart sa3-studio with "
                "its folder as well."
            )
        return found

    def resolve_existing(
        self, path: str | Path, what: str = "file or folder", check: Callable[[Path], bool] = Path.exists
    ) -> Path:
        """Resolve a path that must exist.

        Args:
            path: As for `resolve`.
            what: What it is, for the error message.
            check: What it must be, besides inside the roots.

        Returns:
            The absolute path.

        Raises:
            StudioError: There is no such file or folder inside the roots.
        """
        found = self.resolve(path)
        if not check(found):
            raise StudioError(f"There is no {what} {found}. Check the path.")
        return found

    def resolve_file(self, path: str | Path, what: str = "file") -> Path:
        """Resolve the path of a file that must exist.

        Args:
            path: As for `resolve`.
            what: What the file is, for the error message.

        Returns:
            The absolute path.
        """
        return self.resolve_existing(path, what, Path.is_file)

    def resolve_folder(self, path: str | Path, what: str = "folder") -> Path:
        """Resolve the path of a folder that must exist.

        Args:
            path: As for `resolve`.
            what: What the folder is, for the error message.

        Returns:
            The absolute path.
        """
        return self.resolve_existing(path, what, Path.is_dir)

    def shorten(self, path: str | Path) -> str:
        """Shorten a path for display.

        Args:
            path: An absolute path.

        Returns:
            The path relative to the first root if it is inside it, else the whole path.
        """
        full = Path(path)
        return str(full.relative_to(self.roots[0])) if full.is_relative_to(self.roots[0]) else str(full)

    def get_url(self, path: str | Path) -> str:
        """Return the address at which the page finds a file.

        Args:
            path: As for `resolve`, which also checks it.

        Returns:
            The address, relative to the server.
        """
        return FILE_ROUTE + quote(str(self.resolve(path)))

    def is_served(self, path: str | Path) -> bool:
        """Check whether the page may fetch a file.

        Args:
            path: The path as requested.

        Returns:
            True for an absolute path inside the roots that is not hidden, and for anything in the studio's own home.
        """
        if not Path(path).is_absolute():  # also a remote address, which Gradio would fetch
            return False
        try:
            found = self.resolve(path)
        except StudioError:
            return False
        if found.exists() and not (found.is_file() or found.is_dir()):  # a pipe would never end
            return False
        if found.is_relative_to(self.home):
            return True
        root = next(root for root in self.roots if found.is_relative_to(root))
        return not any(part.startswith(".") for part in found.relative_to(root).parts)


def iterate_folders(workspace: Workspace) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders below the roots, without hidden ones, up to `MAX_FOLDERS` and `MAX_DEPTH`.

    Names that are no valid text are left out: no page can show them.

    Args:
        workspace: The workspace.

    Yields:
        (folder, names of its regular files that are not hidden), both in order.
    """
    folders = [(root, 0) for root in reversed(workspace.roots)]
    for _ in range(MAX_FOLDERS):
        if not folders:
            return
        folder, depth = folders.pop()
        try:
            _, entries = scan_folder(str(folder))
        except OSError:  # not ours to read, or gone
            continue
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        if depth < MAX_DEPTH:
            shown = [name for name in below if _is_shown(name) and not name.startswith("__")]
            folders += [(folder / name, depth + 1) for name in reversed(shown)]
        yield folder, [entry.name for entry in entries if _is_shown(entry.name) and is_file(entry)]


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and is_text(name)


def is_text(name: str) -> bool:
    """Check that a name is valid Unicode, which file systems do not require.

    Args:
        name: Name of a file or folder, or a path.

    Returns:
        Whether a page can show it.
    """
    return name.encode("utf-8", "replace").decode("utf-8") == name


def _get_cause(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "the name is not valid UTF-8"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def list_adapters(workspace: Workspace) -> list[str]:
    """List adapter files and PEFT folders.

    Args:
        workspace: The workspace.

    Returns:
        Short paths (`Workspace.shorten`), newest first.
    """
    found = []
    for folder, files in iterate_folders(workspace):
        if ADAPTER_CONFIG in files:
            found.append(folder)
            continue
        is_model = hub.CONFIG_FILE in files
        found += [
            folder / name
            for name in files
            if name.endswith(".safetensors") and not (is_model and name == hub.WEIGHTS_FILE)
        ]
    return _sort_by_age(workspace, found)


def list_audio(workspace: Workspace) -> list[str]:
    """List audio files.

    Args:
        workspace: The workspace.

    Returns:
        Short paths (`Workspace.shorten`), newest first.
    """
    found = [folder / name for folder, files in iterate_folders(workspace) for name in files if _is_audio(name)]
    return _sort_by_age(workspace, found)


def list_models(workspace: Workspace) -> list[tuple[str, str]]:
    """List the models to choose from: those known by name, and folders below the roots.

    Args:
        workspace: The workspace.

    Returns:
        (label, value) of each.
    """
    available = {"nano", "nano-base", *hub.list_cached_names()}
    names = [entry.name for entry in hub.REGISTRY.values() if entry.kind == "model"]
    choices = [(name if name in available else f"{name} (not downloaded yet)", name) for name in names]
    for folder, files in iterate_folders(workspace):
        if hub.CONFIG_FILE in files and hub.WEIGHTS_FILE in files:
            choices.append((workspace.shorten(folder), str(folder)))
    if workspace.model not in [value for _, value in choices]:
        choices.append((workspace.model, workspace.model))
    return choices


def check_model(name: str) -> None:
    """Check that a model exists, without downloading it.

    Args:
        name: Name of the registry, or a folder.

    Raises:
        StudioError: It is no generator.
        SA3Error: There is no such model.
    """
    entry = hub.find_checkpoint(name)
    if entry is None:
        hub.locate_checkpoint(name)  # a folder, or a name that is explained
    elif entry.kind != "model":
        raise StudioError(f"{name} is no model that generates. Choose another --model, such as nano.")


def resolve_model_name(workspace: Workspace, name: str) -> str:
    """Check the name of a model.

    Args:
        workspace: The workspace.
        name: A name of the registry, the model that the studio was started with, or a folder inside the roots.

    Returns:
        The name, or the absolute path of the folder. A path outside the roots is refused as by `Workspace.resolve`.
    """
    if name in hub.REGISTRY or name == workspace.model:
        return name
    return str(workspace.resolve_folder(name, "model folder"))


def load_model_config(workspace: Workspace, name: str) -> ModelConfig | None:
    """Load the configuration of a model, unless that needs a download.

    Args:
        workspace: The workspace.
        name: As for `resolve_model_name`.

    Returns:
        The configuration, or None for a model that has not been downloaded yet.
    """
    name = resolve_model_name(workspace, name)
    entry = hub.REGISTRY.get(name)
    if entry is not None and entry.repo_id is not None and name not in hub.list_cached_names():
        return None
    files = hub.locate_checkpoint(name)
    return parse_model(read_config_file(files.config), str(files.config))


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
        entry = hub.REGISTRY[name]
        return f"{name} is downloaded on first use. License: {entry.license}, {entry.page}."
    kind = "base model" if config.objective == "rectified_flow" else "post-trained model"
    longest = config.sample_size / config.sample_rate
    defaults = MODEL_DEFAULTS[config.objective]
    sampling = "{steps} steps, CFG scale {cfg_scale:g}, sampler {sampler_type}".format(**defaults)
    return f"{kind}, up to {longest:.0f} s; defaults: {sampling}"


def get_sibling(name: str) -> str:
    """Return the base model of a post-trained model, or the other way round.

    Args:
        name: Name of a model of the registry.

    Returns:
        Name of its sibling.

    Raises:
        StudioError: The model has none.
    """
    entry = hub.REGISTRY.get(name)
    if entry is None or entry.sibling is None:
        raise StudioError(f"{name} has no known sibling. Choose a named model to compare base and post-trained.")
    return entry.sibling


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
    for folder, files in iterate_folders(workspace):
        if folder.parent in closed:
            closed.add(folder)
        elif PROCESS_FILE in files or {run_files.CONFIG_FILE, run_files.RECORD_FILE} <= set(files):
            found.runs.append(folder)
            closed.add(folder)
        elif INDEX_FILE in files:
            found.latents.append(folder)
            closed.add(folder)
        elif any(map(_is_audio, files)):
            found.audio.append(folder)
    return FoundFolders(*(sorted(set(paths)) for paths in (found.runs, found.latents, found.audio)))


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def _sort_by_age(workspace: Workspace, paths: list[Path]) -> list[str]:
    dated = sorted(((path.stat().st_mtime, path) for path in paths if path.exists()), reverse=True)
    return [workspace.shorten(path) for _, path in dated[:MAX_LISTED]]
