"""What of a folder is no source: hidden files, and folders that sa3train made, whose audio is its output."""

import contextlib
from collections.abc import Callable, Collection, Iterable

from sa3train.core.errors import DataError

STUDIO, RUN, LATENTS = "the workspace of a studio", "a training run", "latents"
STUDIO_HOME, STUDIO_RESULTS = ".sa3-studio", "results"
"""Folders by which the workspace of a studio is known."""
RECORD_FILE, CONFIG_FILE, INDEX_FILE = "run.json", "config.yaml", "index.json"
INDEX_LIMIT = 64 << 20
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
