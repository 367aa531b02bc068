"""A planned run in words: what is trained on what, how often each clip comes, how long it takes with what memory."""

from collections.abc import Mapping
from typing import Any

from sa3train.shortage import GIB
from sa3train.studio.plan import TRIAL_STEPS, DataSummary, Trial
from sa3train.training.report import duration

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
