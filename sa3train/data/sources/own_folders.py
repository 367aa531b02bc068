"""What of a folder is no source: hidden files, and folders that sa3train made, whose audio is its output."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sa3train.core.errors import DataError
from sa3train.core.files import RECORD_FILE
from sa3train.core.user_files import is_file, read_file, scan_folder

STUDIO, RUN, LATENTS = "the workspace of a studio", "a training run", "latents"
STUDIO_HOME, STUDIO_RESULTS = ".sa3-studio", "results"
"""Folders by which the workspace of a studio is known."""
CONFIG_FILE, INDEX_FILE = "config.yaml", "index.json"
INDEX_LIMIT = 64 << 20
MAX_FOLDERS = 4000
MAX_DEPTH = 8
_MARKS = ((RUN, (RECORD_FILE, CONFIG_FILE), b'"identity"'), (LATENTS, (INDEX_FILE,), b'"format": "sa3train-'))
"""Kind, files that are there, and what the first of them says: others call their files like this too."""


def identify_own_folder(folder: str, names: Collection[str], read: Callable[[str], bytes]) -> str:
    """Tell whether sa3train made a folder.

    Args:
        folder: Its path, with `/`; empty for the folder that paths start from.
        names: What is in it.
        read: Reads a file by its path; called for few. A folder whose files cannot be read is the user's.

    Returns:
        `STUDIO`, `RUN` or `LATENTS`; empty for a folder of the user's.
    """
    if STUDIO_HOME in names and STUDIO_RESULTS in names:
        return STUDIO
    for own, files, mark in _MARKS:
        with contextlib.suppress(OSError, DataError):
            if all(name in names for name in files) and mark in read(f"{folder}/{files[0]}" if folder else files[0]):
                return own
    return ""


def find_own_folders(paths: Iterable[str], read: Callable[[str], bytes]) -> dict[str, str]:
    """Find the folders that sa3train made among the paths of files.

    Args:
        paths: Paths with `/`, relative to one folder.
        read: Reads a file by its path.

    Returns:
        What each is by its path; "" is the folder that the paths start from.
    """
    entries: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split("/")
        for depth, part in enumerate(parts):
            entries.setdefault("/".join(parts[:depth]), set()).add(part)
    known = {folder: identify_own_folder(folder, names, read) for folder, names in entries.items()}
    return {folder: own for folder, own in known.items() if own}


def is_hidden(name: str) -> bool:
    """Tell whether a file is hidden, or one that macOS packs beside real ones.

    Args:
        name: Path within a source.

    Returns:
        Whether to skip it.
    """
    path = f"/{name.removeprefix('./')}"
    return "/." in path or "/__MACOSX" in path


class Folder(NamedTuple):
    """A folder below some roots.

    Attributes:
        path: Its path.
        files: Names of its regular files that are not hidden, in order.
        own: What `identify_own_folder` says of it.
    """

    path: Path
    files: list[str]
    own: str


def iterate_folders(roots: Sequence[Path]) -> Iterator[Folder]:
    """Yield the folders below some roots, without hidden ones, up to `MAX_FOLDERS` and `MAX_DEPTH`.

    The walk is bounded, since a root may be a whole home folder. Links are not followed. Names that are no valid text
    are left out: no page can show them.

    Args:
        roots: Where to start.

    Yields:
        Each folder, in order.
    """
    folders = [(root, 0) for root in reversed(roots)]
    seen: set[Path] = set()
    for _ in range(MAX_FOLDERS):
        if not folders:
            return
        folder, depth = folders.pop()
        if folder in seen:  # a root inside another
            continue
        seen.add(folder)
        try:
            _, entries = scan_folder(str(folder))
        except OSError:  # not ours to read, or gone
            continue
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        if depth < MAX_DEPTH:
            shown = [name for name in below if _is_shown(name) and not name.startswith("__")]
            folders += [(folder / name, depth + 1) for name in reversed(shown)]
        read_mark = functools.partial(read_file, limit=INDEX_LIMIT)
        own = identify_own_folder(str(folder), [entry.name for entry in entries], read_mark)
        yield Folder(folder, [entry.name for entry in entries if _is_shown(entry.name) and is_file(entry)], own)


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
