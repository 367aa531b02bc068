"""The plan of a training run before it starts: its settings, data and steps, and estimates of time and memory.

The estimates come from a trial: a few real steps in a temporary folder.
"""

import atexit
import dataclasses
import functools
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sa3train.core.files import get_cache_dir, get_config_dir
from sa3train.core.overrides import format_override
from sa3train.core.processes import find_program, make_environment
from sa3train.data.shards.index import DataSummary
from sa3train.data.shards.reader import LatentStore
from sa3train.reports import run_files
from sa3train.reports.html import format_bytes, format_duration
from sa3train.studio.server.workspace import StudioError
from sa3train.training.settings import TrainerSettings

TRIAL_STEPS = 4
TRIAL_SECONDS = 900
COMPOSE_SECONDS = 60

SETTABLE_GROUPS = ("data", "adapter", "loss", "optimizer", "scheduler", "trainer", "callbacks", "logger", "seed")
FORM_FIELDS = {
    "recipe": "Recipe", "data.dir": "Latents", "data.more": "Latents", "model": "Base model", "run_dir": "Run folder",
    "adapter.start_from": "Start from adapter, of the recipe continue",
}  # fmt: skip
"""Fields of the form that starts a run, by what they set: settings that are not given as lines."""
_trials: dict["RunRequest", "Trial"] = {}
_SETTING = re.compile(r"\+{0,2}[a-z_]+(\.[A-Za-z0-9_]+)*=[^\n\0]*")
_INTERPOLATION = re.compile(r"(?<!\\)\$\{|\\\\\$\{|\$\\+\{")
"""`${` that reaches the trainer as such, also by Hydra's escapes; `\\${` with a single backslash is text."""

TRIAL_SETTINGS = (
    f"trainer.max_steps={TRIAL_STEPS}", "trainer.log_every=1", "scheduler.warmup_steps=0", "callbacks=none",
    "callbacks.report=true", "callbacks.checkpoint.every=1000000",
)  # fmt: skip
"""Settings of a trial: a few steps and the memory plan, nothing else."""
OMITTED_IN_TRIAL = ("callbacks", "logger")
"""Groups whose settings would be refused, since a trial leaves out what they configure."""

NOISE_LEVELS = 10
"""Noise levels at which validation measures the loss of each clip."""
BASE_STEPS, CFG_PASSES = 50, 2
"""Sampling steps of a base model, and its passes per step with CFG; a post-trained model's few steps are negligible."""


@dataclass(frozen=True)
class RunRequest:
    """What was chosen in the form.

    Args:
        recipe: Name of the recipe.
        data: Folder of latents.
        model: Name or folder of the model to train.
        run_dir: The run folder.
        steps: Optimizer steps. None: the recipe's.
        settings: Further `key=value` settings.
        start_from: Adapter to continue from, for recipe=continue.
    """

    recipe: str
    data: Path
    model: str
    run_dir: Path
    steps: int | None = None
    settings: tuple[str, ...] = ()
    start_from: Path | None = None

    def build_command(self) -> list[str]:
        """Build the `sa3-train` command.

        Returns:
            The arguments, the command first.
        """
        chosen = {
            "recipe": self.recipe, "data": self.data, "model": self.model, "run_dir": self.run_dir,
            "trainer.max_steps": self.steps, "adapter.start_from": self.start_from,
        }  # fmt: skip
        given = [format_override(key, value) for key, value in chosen.items() if value is not None]
        return ["sa3-train", *given, *self.settings]


@dataclass(frozen=True)
class Trial:
    """Measurements of a trial.

    Args:
        steps_per_second: Speed without the first step.
        peak_gib: Peak memory in GiB.
        device: Description of the device.
        parts: The memory plan: bytes by name.
    """

    steps_per_second: float
    peak_gib: float
    device: str
    parts: dict[str, int]


def list_recipes() -> dict[str, str]:
    """List the recipes that make one run each, on latents.

    Returns:
        Their descriptions by name.
    """
    return {name: text for name, text in list_options("recipe").items() if name not in ("sweep", "decoder")}


def get_recipe_steps(recipe: str) -> int:
    """Get the optimizer steps of a recipe.

    Args:
        recipe: Its name.

    Returns:
        The number.
    """
    settings = yaml.safe_load((get_config_dir() / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return int(settings.get("trainer", {}).get("max_steps", TrainerSettings.max_steps))


def get_default_recipe() -> str:
    """Get the recipe that `sa3-train` takes when none is given.

    Returns:
        Its name.
    """
    defaults = yaml.safe_load((get_config_dir() / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return next(str(entry["recipe"]) for entry in defaults if isinstance(entry, dict) and "recipe" in entry)


@functools.cache
def list_options(group: str) -> dict[str, str]:
    """List the options of a configuration group.

    Args:
        group: Name of the group, such as `recipe`.

    Returns:
        The first line of each option's comment, by name.
    """
    found = {}
    for file in sorted((get_config_dir() / group).glob("*.yaml")):
        comments = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
        text = next((line for line in comments if not line.startswith("@")), "")
        found[file.stem] = text.partition(" Card:")[0]
    return found


def parse_settings(text: str) -> tuple[str, ...]:
    """Parse further settings, and refuse those that reach beyond the run: folders, other jobs, Hydra itself.

    Args:
        text: Lines of `key=value`.

    Returns:
        The settings.

    Raises:
        StudioError: A line is not a setting, or not one that may be set here.
    """
    found: list[str] = []
    for line in filter(None, (line.strip() for line in text.split("\n"))):
        key, _, value = line.partition("=")
        key = key.lstrip("+")
        if not _SETTING.fullmatch(line):
            raise StudioError(f"{line!r} is not a setting. Write one key=value per line, such as optimizer.lr=1e-3.")
        if _INTERPOLATION.search(line):
            raise StudioError(f"{line} refers to other settings by ${{…}}. Write the value, or \\${{ for the text.")
        field = next((FORM_FIELDS[name] for name in FORM_FIELDS if f"{key}.".startswith(f"{name}.")), None)
        if field or key == "data":
            raise StudioError(f"{key} is set by the field {field or 'Latents'}. Choose it there and remove this line.")
        if key.partition(".")[0] not in SETTABLE_GROUPS:
            raise StudioError(f"{key} cannot be set here. Settings start with {', '.join(SETTABLE_GROUPS)}.")
        if "." not in key and key != "seed" and value not in list_options(key):
            raise StudioError(f"{line!r} is not an option. Choose {key} from {', '.join(list_options(key))}.")
        if key in (other.lstrip("+").partition("=")[0] for other in found):
            raise StudioError(f"{key} is set twice. Remove one line.")
        found.append(line)
    return tuple(found)


def compose_config(request: RunRequest) -> dict[str, Any]:
    """Compose the whole configuration with the trainer itself, which also checks it.

    Args:
        request: What to train.

    Returns:
        The configuration.

    Raises:
        StudioError: The trainer refuses it, with its message.
    """
    text = _run([*request.build_command(), "--cfg", "job", "--resolve"], COMPOSE_SECONDS)
    config = run_files.parse_settings(text)
    if not isinstance(config, dict) or "trainer" not in config:
        raise StudioError("Cannot compose the settings. Run the command in a terminal to see why.")
    return config


def find_trial(request: RunRequest) -> Trial | None:
    """Find the last trial of a request, whatever its steps and run folder.

    Args:
        request: What to train.

    Returns:
        What it measured; None where there was none.
    """
    return _trials.get(make_trial(request, Path()))


def run_trial(request: RunRequest) -> Trial:
    """Run a few steps in a temporary folder.

    Args:
        request: What to train.

    Returns:
        Its speed and memory. If the trainer fails, the `StudioError` has its message.
    """
    trials = get_cache_dir() / "trials"
    trials.mkdir(parents=True, exist_ok=True)
    for left in trials.glob("trial-*"):  # by a studio that was killed
        if time.time() - left.stat().st_mtime > 2 * TRIAL_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="trial-", dir=trials))
    try:
        _run(make_trial(request, folder / "run").build_command(), TRIAL_SECONDS)
        trial = _trials[make_trial(request, Path())] = read_trial(folder / "run")
        return trial
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_trial(request: RunRequest, run_dir: Path) -> RunRequest:
    """Make the request of a trial: a few steps of another one.

    Args:
        request: What to train.
        run_dir: The trial's run folder.

    Returns:
        The trial.
    """
    settings = tuple(line for line in request.settings if not line.lstrip("+").startswith(OMITTED_IN_TRIAL))
    return dataclasses.replace(request, run_dir=run_dir, steps=None, settings=(*settings, *TRIAL_SETTINGS))


def read_trial(folder: Path) -> Trial:
    """Read what a trial has measured.

    Args:
        folder: Its run folder.

    Returns:
        Its speed and memory.

    Raises:
        StudioError: It made no steps.
    """
    files = run_files.read_run(folder)
    speeds = [speed for _, speed in files.get_curve("time/steps_per_second")]
    if not speeds:
        raise StudioError("The trial made no steps. Run the command in a terminal to see why.")
    seconds = [1 / max(speed, 1e-9) for speed in speeds[1:] or speeds]  # the first step includes the setup
    return Trial(
        len(seconds) / sum(seconds),
        files.peak_memory_gib or 0.0,
        str(files.system.get("device", "")),
        {name: int(size) for name, size in (files.system.get("plan") or {}).items() if size},
    )


def _run(command: Sequence[str], seconds: float) -> str:
    """Run a command of ours and return its standard output."""
    try:
        child = subprocess.Popen(
            [find_program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=make_environment(),
        )
    except OSError as error:
        raise StudioError(f"Cannot start {command[0]}: {error.strerror or error}.") from error
    with child:
        atexit.register(child.kill)  # unlike a run, it ends with the studio
        try:
            output, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise StudioError(f"{command[0]} did not finish within {seconds:.0f} s. Run it in a terminal.") from error
        finally:
            atexit.unregister(child.kill)
            child.kill()
    if child.returncode != 0:
        raise StudioError(_find_error(errors) or f"{command[0]} ended with exit code {child.returncode}.")
    return output


def _find_error(text: str) -> str:
    """Find a command's `error: …` with the lines that belong to it, or the last line it wrote."""
    _, found, message = text.rpartition("error: ")
    return " ".join(message.split()) if found else "".join(text.strip().splitlines()[-1:])


def count_uncaptioned(folder: Path) -> int:
    """Count the clips without a caption.

    Args:
        folder: Folder of latents.

    Returns:
        The number, of training and held-out clips alike.
    """
    return sum(not record.get("caption") for _, record in LatentStore(folder).iterate_records())


def describe_plan(config: Mapping[str, Any], data: DataSummary, uncaptioned: int = 0) -> list[tuple[str, str]]:
    """Describe what is known before a trial.

    Args:
        config: The composed configuration.
        data: Summary of the latents.
        uncaptioned: Number of clips without a caption.

    Returns:
        (name, text) of each line.
    """
    trainer, adapter = config["trainer"], config["adapter"]
    steps, rows, packed = int(trainer["max_steps"]), _count_rows(config), config["data"]["pack_frames"]
    batch = f"{rows} packed rows" if packed else _format_clips(rows)
    duration = format_duration(data.seconds)
    found = [
        ("Data", f"{_format_clips(data.clips)}, {duration}; {data.heldout} held out; encoded by {data.model}"),
        ("Adapter", f"{adapter['adapter_type']}, rank {adapter['rank']}, on {config['model']['name']}"),
        ("Steps", f"{steps:,} with a batch of {batch}"),
    ]
    if data.clips and not packed:
        epochs = steps * rows / data.clips
        found.append(("Epochs", f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"))
    if uncaptioned:
        total = _format_clips(data.clips + data.heldout)
        found.append(("Note", f"{uncaptioned} of {total} have no caption: they train on the empty prompt."))
    if not data.heldout:
        found.append(("Note", "No clips are held out: validation cannot show overfitting."))
    return found


def describe_trial(config: Mapping[str, Any], data: DataSummary, trial: Trial) -> list[tuple[str, str]]:
    """Describe the time and memory that the whole run will take.

    Args:
        config: The composed configuration.
        data: Summary of the latents.
        trial: Measurements of a trial.

    Returns:
        (name, text) of each line.
    """
    steps = int(config["trainer"]["max_steps"]) / trial.steps_per_second
    validation = estimate_validation_seconds(config, data, trial)
    demos = estimate_demo_seconds(config, trial)
    parts = f"steps {format_duration(steps)} at {trial.steps_per_second:.3g} per second"
    parts += f", validation {format_duration(validation)}" if validation else ""
    parts += f", demos {format_duration(demos)}" if demos else ""
    device = trial.device or "this machine"
    found = [
        ("Time", f"about {format_duration(steps + validation + demos)} on {device}: {parts}"),
        ("Memory", f"peak {trial.peak_gib:.2f} GiB in {TRIAL_STEPS} trial steps"),
    ]
    if trial.parts:
        sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in trial.parts.items())
        found.append(("Memory plan", f"{format_bytes(sum(trial.parts.values()))}: {sizes}"))
    return found


def estimate_validation_seconds(config: Mapping[str, Any], data: DataSummary, trial: Trial) -> float:
    """Estimate the time of all validations, which are forward passes alone.

    Args:
        config: The composed configuration.
        data: Summary of the latents.
        trial: Measurements of a trial.

    Returns:
        Seconds.
    """
    validation = config["callbacks"]["validation"]
    if not validation["enabled"]:
        return 0.0
    heldout, training = (min(int(validation["clips"]), clips) for clips in (data.heldout, data.clips))
    times = 1 + int(config["trainer"]["max_steps"]) // int(validation["every"])
    rows = times * (heldout + training) + len(validation["strengths"]) * heldout
    return rows * NOISE_LEVELS * _estimate_forward_seconds(config, trial)


def estimate_demo_seconds(config: Mapping[str, Any], trial: Trial) -> float:
    """Estimate the time of all demos, from the duration of their audio relative to a training row's.

    Args:
        config: The composed configuration.
        trial: Measurements of a trial.

    Returns:
        Seconds.
    """
    demos = config["callbacks"]["demos"]
    if not demos["enabled"]:
        return 0.0
    count = len(demos["prompts"]) + int(demos["heldout_prompts"]) + int(bool(demos["inpaint"]))
    times = 1 + int(config["trainer"]["max_steps"]) // int(demos["every"]) * len(demos["strengths"])
    row_seconds = config["data"]["crop_seconds"] or demos["duration"]
    passes = int(demos["steps"] or BASE_STEPS) * CFG_PASSES * float(demos["duration"]) / float(row_seconds)
    return count * times * passes * _estimate_forward_seconds(config, trial)


def _estimate_forward_seconds(config: Mapping[str, Any], trial: Trial) -> float:
    """Estimate a forward pass of one row: a step is a forward and a backward pass of about equal cost."""
    return 1 / trial.steps_per_second / (2 * _count_rows(config))


def _count_rows(config: Mapping[str, Any]) -> int:
    return int(config["trainer"]["accumulate"]) * int(config["data"]["batch_size"])


def _format_clips(count: int) -> str:
    return f"{count} clip" if count == 1 else f"{count:,} clips"
