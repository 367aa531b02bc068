"""What lies under the folders that the studio was started with: runs, latents, folders of audio."""

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.data.index import INDEX
from sa3train.studio.listing import folders
from sa3train.studio.processes import RECORD as PROCESS
from sa3train.studio.workplace import Workplace
from sa3train.training.folder import CONFIG, RECORD

FRESH_SECONDS = 3


@dataclass(frozen=True)
class Survey:
    """Folders by what they hold, each in order of path."""

    runs: list[Path] = field(default_factory=list)
    latents: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)


def survey(place: Workplace) -> Survey:
    """Look through the roots. Links and hidden folders are not followed, and what is inside a run or a folder of
    latents is its own business. A survey of the last few seconds is given again.
    """
    return _recent(place, int(time.monotonic() / FRESH_SECONDS))


def look(place: Workplace) -> Survey:
    """`survey`, always anew."""
    found = Survey()
    closed: set[Path] = set()
    for folder, files in folders(place):
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
def _recent(place: Workplace, moment: int) -> Survey:
    return look(place)
