"""What a training run will be, before it is started: its settings as composed, its data, its steps, and the time and
memory that a few real steps of it took.

A planned run in words: what is trained on what, how often each clip comes, how long it takes with what memory.
"""

import dataclasses
import functools
import importlib.resources
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sa3train.core.device import GIB
from sa3train.core.files import cache_dir
from sa3train.data.shards.index import DataSummary
from sa3train.reports.run_files import MACHINE
from sa3train.reports.run_report import duration
from sa3train.studio.runs.runs import METRICS
from sa3train.studio.server.processes import program
from sa3train.studio.server.workspace import StudioError

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


def measure(choice: Choice) -> Trial:
    """Run a few steps of it in a folder that is thrown away. Raises `SA3Error` with the trainer's own message."""
    trials = cache_dir() / "trials"
    trials.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="trial-", dir=trials))
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
    from sa3train.reports.run_files import read_metrics

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


LEVELS = 10
"""Noise levels at which the fixed evaluation judges each clip."""
DEMO_STEPS, DEMO_PASSES = 50, 2
"""A base model's sampler, with guidance; its twin's few steps are small beside them."""


def outlook(config: Mapping[str, Any], data: DataSummary) -> list[tuple[str, str]]:
    """What is known before a step is run, as (name, text)."""
    trainer, clips = config["trainer"], config["data"]
    steps, each = int(trainer["max_steps"]), int(trainer["accumulate"]) * int(clips["batch_size"])
    packed = clips["pack_frames"]
    found = [
        ("Data", f"{_clips(data.clips)}, {duration(data.seconds)}; {data.heldout} held out; encoded by {data.model}"),
        ("Adapter", f"{config['adapter']['kind']}, rank {config['adapter']['rank']}, in {config['model']['name']}"),
        ("Steps", f"{steps:,}, each of {f'{each} packed rows' if packed else _clips(each)}"),
    ]
    if data.clips and not packed:
        found.append(("Passes", f"each clip comes about {_count(steps * each / data.clips)} times"))
    if not data.heldout:
        found.append(("Note", "nothing is held out, so nothing can show whether it learns or copies"))
    return found


def expected(config: Mapping[str, Any], data: DataSummary, trial: Trial) -> list[tuple[str, str]]:
    """Time and memory of the whole run, from those of a few steps, as (name, text)."""
    loop = int(config["trainer"]["max_steps"]) / trial.steps_per_second
    judging, demos = judging_seconds(config, data, trial), playing_seconds(config, trial)
    whole = f"about {duration(loop + judging + demos)} on {trial.device or 'this machine'}"
    parts = f"steps {duration(loop)} at {trial.steps_per_second:.3g} a second"
    parts += f", judging {duration(judging)}" if judging else ""
    parts += f", demos {duration(demos)}" if demos else ""
    found = [
        ("Time", f"{whole}: {parts}"),
        ("Memory", f"{trial.peak_gib:.2f} GiB at most in {TRIAL_STEPS} steps of trial"),
    ]
    if trial.parts:
        sizes = ", ".join(f"{name} {size_of(size)}" for name, size in trial.parts.items())
        found.append(("Memory plan", f"{size_of(sum(trial.parts.values()))}: {sizes}"))
    return found


def judging_seconds(config: Mapping[str, Any], data: DataSummary, trial: Trial) -> float:
    """Time of the fixed evaluations: forward passes alone, at about half the cost of a step's rows."""
    judge = config["callbacks"]["judge"]
    if not judge["enabled"]:
        return 0.0
    clips = min(int(judge["clips"]), data.heldout) + min(int(judge["clips"]), data.clips)
    times = 1 + int(config["trainer"]["max_steps"]) // int(judge["every"])
    return times * clips * LEVELS * _forward_seconds(config, trial)


def playing_seconds(config: Mapping[str, Any], trial: Trial) -> float:
    """Time of the demos' sampling, by the length of their audio against a training row's."""
    demos = config["callbacks"]["demos"]
    if not demos["enabled"]:
        return 0.0
    played = len(demos["prompts"]) + int(demos["heldout_prompts"]) + int(bool(demos["inpaint"]))
    times = 1 + int(config["trainer"]["max_steps"]) // int(demos["every"]) * len(demos["strengths"])
    row_seconds = config["data"]["crop_seconds"] or demos["duration"]
    passes = int(demos["steps"] or DEMO_STEPS) * DEMO_PASSES * float(demos["duration"]) / float(row_seconds)
    return played * times * passes * _forward_seconds(config, trial)


def _forward_seconds(config: Mapping[str, Any], trial: Trial) -> float:
    """Of one row: a step is a forward and a backward pass of about equal cost over its rows."""
    rows = int(config["trainer"]["accumulate"]) * int(config["data"]["batch_size"])
    return 1 / trial.steps_per_second / (2 * rows)


def size_of(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def _count(times: float) -> str:
    return f"{times:,.0f}" if times >= 10 else f"{times:.2g}"


def _clips(count: int) -> str:
    return f"{count} clip" if count == 1 else f"{count:,} clips"
