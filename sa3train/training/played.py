"""The demos that a run has played, as its folder holds them. Light: what reads it need not be able to train."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER, INDEX = "demos", "demos.json"


@dataclass(frozen=True)
class Played:
    """One file: what it is, and how it measures (`measure`: LUFS, dBTP, Hz, width)."""

    file: str
    picture: str
    demo: str
    mode: str
    prompt: str
    model: str
    strength: float
    seed: int
    step: int
    measures: dict[str, float | None]


def played_demos(run_dir: Path) -> list[Played]:
    """Everything that was played in a run, oldest first, with `file` and `picture` relative to the run folder."""
    found = []
    for index in sorted((run_dir / FOLDER).glob(f"step-*/{INDEX}")):
        for entry in json.loads(index.read_text(encoding="utf-8")):
            place = index.parent.relative_to(run_dir)
            demo = Played(**entry)
            found.append(replace(demo, file=str(place / demo.file), picture=str(place / demo.picture)))
    return found
