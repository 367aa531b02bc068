"""The one folder that a studio writes to, and the folders that it reads."""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sa3train.core.device import choose_device
from sa3train.core.errors import SA3Error
from sa3train.core.text import list_few
from sa3train.data.sources.own_folders import STUDIO_HOME, STUDIO_RESULTS
from sa3train.models import hub

FILE_ROUTE = "/gradio_api/file="
PARTS = ("latents", "runs", "adapters", STUDIO_RESULTS)
"""Folders of a workspace."""


class StudioError(SA3Error):
    """Invalid request from the UI."""


@dataclass(frozen=True)
class Workspace:
    """The one folder that a studio writes to, the folders that it reads, and its initial choices.

    Args:
        folder: The workspace: runs, latents, results, and whatever else the studio makes.
        sources: Folders of the user's, which are only read. Captions are saved beside their audio.
        model: Name or folder of the model that is selected first.
        device: Device to run on. None: the best one.
    """

    folder: Path
    sources: tuple[Path, ...] = ()
    model: str = "nano"
    device: str | None = None

    @classmethod
    def create(
        cls, folder: str | Path, sources: Iterable[str | Path] = (), model: str = "nano", device: str | None = None
    ) -> "Workspace":
        """Create the folder of a workspace, or open one that exists.

        Args:
            folder: The workspace. It may be inside a source, but not the reverse.
            sources: Existing folders to read.
            model: Name or folder of the model that is selected first.
            device: Device to run on. None: the best one.

        Returns:
            The workspace.

        Raises:
            StudioError: A source does not exist or is part of the workspace, or the workspace cannot be written to or
                holds something else.
            SA3Error: There is no such model or device.
        """
        check_model(model)
        choose_device(device)
        if "" in map(str, (folder, *(sources := list(sources)))):
            raise StudioError("A folder has no name. Name folders that exist, or . for the current one.")
        home = Path(folder).expanduser().resolve()
        roots = tuple(dict.fromkeys(Path(source).expanduser().resolve() for source in sources))
        for root in roots:
            if not root.is_dir():
                raise StudioError(f"{root} is not a folder. Name folders that exist, or create it first.")
            if root.is_relative_to(home):
                raise StudioError(
                    f"{root} is in the workspace {home}, where the studio writes. Choose another --workspace, or name "
                    "folders outside of it."
                )
        found = cls(home, roots, model, device)
        try:
            names = [] if found.home.exists() or not home.exists() else sorted(path.name for path in home.iterdir())
            if others := [name for name in names if name[0] != "." and name not in PARTS]:
                raise StudioError(
                    f"{home} has {list_few(others)}: as a workspace, its audio would never be a source. Choose a new "
                    "or empty folder as --workspace."
                )
            for path in (found.history, found.uploads):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudioError(
                f"Cannot write to {home}: {error.strerror or error}. The studio writes all its results there. Choose "
                "another --workspace."
            ) from error
        return found

    @property
    def roots(self) -> tuple[Path, ...]:
        """All folders that may be read, the workspace first."""
        return (self.folder, *self.sources)

    @property
    def home(self) -> Path:
        """Hidden folder of the studio's own records."""
        return self.folder / STUDIO_HOME

    @property
    def history(self) -> Path:
        """Folder of generated results."""
        return self.folder / STUDIO_RESULTS

    @property
    def uploads(self) -> Path:
        """Folder of files uploaded through the page."""
        return self.home / "uploads"

    def resolve(self, path: str | Path) -> Path:
        """Resolve a path, symbolic links included, and check that it is inside the roots.

        Args:
            path: A path that need not exist; a relative one starts at the workspace, at the folder that contains a
                source, or at a source, where it is found first. One that exists is taken as it is written; otherwise
                spaces around it are left out, and `~` is the home folder.

        Returns:
            The absolute path.

        Raises:
            StudioError: The path, or a link on the way, leads outside the roots.
        """
        text = str(path)
        named = [source.parent for source in self.sources if Path(text).parts[:1] == (source.name,)]
        found = _resolve(text, [self.folder, *named, *self.sources])
        if not any(found.is_relative_to(root) for root in self.roots):
            folders = ", ".join(str(root) for root in self.roots)
            raise StudioError(
                f"{text} is outside the folders that may be read ({folders}). Copy it there, or start the server "
                "with its folder as well."
            )
        return found

    def resolve_output(self, path: str | Path, part: str = "") -> Path:
        """Resolve a path to write to.

        Args:
            path: A path that need not exist; a relative one starts at the workspace.
            part: One of `PARTS`: where a name alone lands, unless the workspace itself has a file of that name.

        Returns:
            The absolute path.

        Raises:
            StudioError: The path, or a link on the way, leads outside the workspace, or it is the workspace itself.
        """
        name = str(path).strip()
        is_name = bool(part and name) and Path(name).name == name and name[0] != "~" and name != ".."
        is_known = name not in PARTS and (self.folder / name).exists()
        found = _resolve(f"{part}/{name}" if is_name and not is_known else str(path), [self.folder])
        if not found.is_relative_to(self.folder) or found == self.folder or found.is_relative_to(self.home):
            raise StudioError(
                f"{path} is not inside the workspace ({self.folder}), the only folder that is written to. Give "
                "a path inside it, such as runs/NAME."
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
            The path within the workspace, or from a source's name on; else, or where that is another file, the whole
            path. `resolve` finds it again.
        """
        full = Path(path)
        bases = [self.folder, *(source.parent for source in self.sources if full.is_relative_to(source))]
        short = next((str(full.relative_to(base)) for base in bases if full.is_relative_to(base)), str(full))
        with contextlib.suppress(StudioError):
            return short if self.resolve(short) == full else str(full)
        return str(full)

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


def _resolve(text: str, bases: Sequence[Path]) -> Path:
    """Resolve a path from the first of `bases` below which it exists, else from the first of them."""
    if not text.strip() or "\0" in text:
        raise StudioError("Enter the path of a file or folder.")
    try:
        places = (base / name for name in (text, text.strip()) for base in bases)
        written = next(filter(os.path.lexists, places), None)
        found = (written or bases[0] / Path(text.strip()).expanduser()).resolve()
        str(found).encode()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
    except (OSError, RuntimeError, UnicodeError) as error:  # a loop of links, an unknown user, a name too long
        shown = f"{text:.100}".encode(errors="replace").decode()
        raise StudioError(f"Cannot resolve {shown}: {_get_cause(error)}. Correct the path.") from error
    return found


def _get_cause(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "the name is not valid UTF-8"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


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
