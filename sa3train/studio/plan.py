"""What a training run will be, before it is started: its settings as composed, its data, its steps, and the time and
memory that a few real steps of it took.
"""

import dataclasses
import functools
import importlib.resources
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sa3train.data.index import INDEX, parse_index
from sa3train.errors import DataError
from sa3train.files import cache_dir
from sa3train.studio.processes import program
from sa3train.studio.runs import METRICS
from sa3train.studio.workplace import StudioError
from sa3train.training.report_files import MACHINE

TRIAL_STEPS = 4
TRIAL_SECONDS = 900
COMPOSE_SECONDS = 60

MAY_SET = ("data", "adapter", "objective", "optimizer", "scheduler", "trainer", "callbacks", "logger", "seed")
NOT_HERE = ("data.dir.", "data.more.", "adapter.start_from.")
_SETTING = re.compile(r"\+{0,2}[a-z_]+(\.[A-Za-z0-9_]+)*=[^\n\0]*")

TRIAL = (
    f"trainer.max_steps={TRIAL_STEPS}", "trainer.log_every=1", "scheduler.warmup_steps=0", "callbacks=none",
    "callbacks.report=true", "callbacks.save.every=1000000",
)  # fmt: skip
"""What a trial sets: a few steps, nothing beside them but the note on memory."""


@dataclass(frozen=True)
class Choice:
    """What was chosen on the page. `settings`: further `key=value`; `start_from`: an adapter for recipe=continue."""

    recipe: str
    data: Path
    model: str
    run_dir: Path
    steps: int | None = None
    settings: tuple[str, ...] = ()
    start_from: Path | None = None

    def command(self) -> list[str]:
        """The command that this is."""
        begun = ["sa3-train", f"recipe={self.recipe}", f"data={self.data}", f"model={self.model}"]
        steps = [f"trainer.max_steps={self.steps}"] if self.steps else []
        start_from = [f"adapter.start_from={self.start_from}"] if self.start_from else []
        return [*begun, f"run_dir={self.run_dir}", *steps, *start_from, *self.settings]


@dataclass(frozen=True)
class DataSummary:
    """What an `index.json` says: clips and seconds of each split, and whose autoencoder made it."""

    clips: int
    seconds: float
    heldout: int
    heldout_seconds: float
    model: str
    rejected: int
    frames: int


@dataclass(frozen=True)
class Trial:
    """What a few real steps took. `parts`: the memory plan's bytes by name."""

    steps_per_second: float
    peak_gib: float
    device: str
    parts: dict[str, int]


def recipes() -> dict[str, str]:
    """Recipes that make one run each, with what they say of themselves."""
    return {name: said for name, said in options("recipe").items() if name != "sweep"}


@functools.cache
def options(group: str) -> dict[str, str]:
    """The options of a configuration group, each with the first line of its comment."""
    found = {}
    for file in sorted(
        importlib.resources.files("sa3train.conf").joinpath(group).iterdir(), key=lambda file: file.name
    ):
        if file.name.endswith(".yaml"):
            comments = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
            said = next((line for line in comments if not line.startswith("@")), "")
            found[file.name.removesuffix(".yaml")] = said.partition(" Card:")[0]
    return found


def further_settings(text: str) -> tuple[str, ...]:
    """`key=value` lines as typed. Raises `StudioError` for what reaches beyond the run: folders, other jobs, Hydra."""
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        key = line.partition("=")[0].lstrip("+")
        if not _SETTING.fullmatch(line) or "${" in line:
            raise StudioError(f"{line!r} is not a setting: write one key=value a line, such as optimizer.lr=1e-3.")
        if key.partition(".")[0] not in MAY_SET or key == "data" or f"{key}.".startswith(NOT_HERE):
            raise StudioError(
                f"{key} is not set here: choose data, model and folder above. Settings begin with {', '.join(MAY_SET)}."
            )
        if "." not in key and key != "seed" and line.partition("=")[2] not in options(key):
            raise StudioError(f"{line!r}: choose {key} from {', '.join(options(key))}.")
        found.append(line)
    return tuple(found)


def compose(choice: Choice) -> dict[str, Any]:
    """The whole configuration as the trainer will see it, from the trainer itself. Raises `SA3Error` as it does."""
    text = _run([*choice.command(), "--cfg", "job", "--resolve"], COMPOSE_SECONDS)
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or "trainer" not in config:
        raise StudioError("the settings could not be composed: try the command in a terminal to see why.")
    return config


def summarise(data: Path) -> DataSummary:
    """What lies in a folder of latents. Raises `DataError` when it holds none."""
    path = data / INDEX
    if not path.is_file():
        raise DataError(f"{data} holds no latents ({INDEX}): encode a folder of audio first, on the Data page.")
    index = parse_index(path.read_bytes(), str(path))
    train, heldout = (index["splits"].get(split, {}) for split in ("train", "heldout"))
    return DataSummary(
        int(train.get("clips", 0)),
        float(train.get("seconds", 0.0)),
        int(heldout.get("clips", 0)),
        float(heldout.get("seconds", 0.0)),
        str(index["model"].get("name", "")),
        int(index.get("rejected", 0)),
        int(train.get("frames", 0)),
    )


def measure(choice: Choice) -> Trial:
    """Run a few steps of it in a folder that is thrown away. Raises `SA3Error` with the trainer's own message."""
    place = cache_dir() / "trials"
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="trial-", dir=place))
    beside = ("callbacks", "logger")  # what a trial leaves out, its settings must leave out too: they would be refused
    kept = tuple(setting for setting in choice.settings if not setting.lstrip("+").startswith(beside))
    trial = dataclasses.replace(choice, run_dir=folder / "run", steps=None, settings=(*kept, *TRIAL))
    try:
        _run(trial.command(), TRIAL_SECONDS)
        return read_trial(folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_trial(folder: Path) -> Trial:
    """What a trial's folder says; the first step, which sets things up, does not count for speed."""
    from sa3train.training.tracking import read_metrics

    rows = [row for row in read_metrics(folder / METRICS)[1] if "time/steps_per_second" in row]
    if not rows:
        raise StudioError("the trial made no steps: try the command in a terminal to see why.")
    seconds = [1 / max(float(row["time/steps_per_second"]), 1e-9) for row in rows]
    counted = seconds[1:] or seconds
    machine = json.loads((folder / MACHINE).read_text(encoding="utf-8")) if (folder / MACHINE).is_file() else {}
    return Trial(
        len(counted) / sum(counted),
        max(float(row.get("time/peak_memory_gib", 0)) for row in rows),
        str(machine.get("device", "")),
        {name: int(size) for name, size in (machine.get("plan") or {}).items() if size},
    )


def _run(command: Sequence[str], seconds: float) -> str:
    """Standard output of a command of ours. Raises `StudioError` with what it said when it fails."""
    try:
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise StudioError(f"{command[0]} has not answered within {seconds:.0f} s; try it in a terminal.") from error
    except OSError as error:
        raise StudioError(f"cannot start {command[0]}: {error.strerror or error}.") from error
    if done.returncode != 0:
        raise StudioError(_complaint(done.stderr) or f"{command[0]} ended with exit code {done.returncode}.")
    return done.stdout


def _complaint(text: str) -> str:
    """A command's `error: …` with the lines that belong to it, else the last line it wrote."""
    _, found, message = text.rpartition("error: ")
    if found:
        return " ".join(message.split())
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
