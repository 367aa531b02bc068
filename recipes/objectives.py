"""Compare training objectives: one difference at a time, over data sets and seeds, paired over what is equal.

python recipes/objectives.py OUT sample=LATENTS loops=LATENTS --seeds 0,1,2 --variants released,uniform

Each trial is a run of `sa3-train` on nano-base, a line of OUT/trials.jsonl, and an adapter there for `sa3-eval`. Trials
that are there are not run again, so that the same command goes on after a stop (a NAME stands for its data: give other
data another OUT). The table shows the change of the held-out loss against the base after the last step, its difference
from the first variant on the same data and seed (both as docs/evaluation.md says, "What a change is"), and the step at
which the first's last loss is reached, interpolated between validations.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sa3train.reports.loss_change import compare_clips, take_logs
from sa3train.reports.run_files import ADAPTER_FILE

_OBJECTIVE = ["loss=released", "trainer.ema_decay=null"]
_RELEASED = [*_OBJECTIVE, "scheduler.warmup_steps=0"]
_UNSHIFTED = ["loss.shift=none"]
VARIANTS: dict[str, list[str]] = {
    "released": _RELEASED,
    "released-rate-3": [*_RELEASED, "optimizer.lr=3e-3"],
    "default": [],
    "rate-3": ["optimizer.lr=3e-3"],
    "rate-3-cosine": ["optimizer.lr=3e-3", "scheduler=cosine"],
    "rate-3-lora-plus": ["optimizer.lr=3e-3", "optimizer.lora_plus=4"],
    "rate-2-lora-plus": ["optimizer.lr=2e-3", "optimizer.lora_plus=2"],
    "default-lora-plus": ["optimizer.lora_plus=4"],
    "default-lora-plus-16": ["optimizer.lora_plus=16"],
    "ema-95": ["trainer.ema_decay=0.95"],
    "ema-985": ["trainer.ema_decay=0.985"],
    "prodigy": ["optimizer=prodigy", "optimizer.lr=1"],
    "schedule-free": [
        "optimizer=schedule-free",
        "optimizer.lr=3e-3",
        "optimizer.options.warmup_steps=5",
        "trainer.ema_decay=null",
    ],
    "default-muon": ["optimizer=muon", "optimizer.lr=1e-2", "optimizer.options.adamw_lr=1e-3"],
    "unshifted": _UNSHIFTED,
    "unshifted-rate-2": [*_UNSHIFTED, "optimizer.lr=2e-3"],
    "unshifted-rate-3": [*_UNSHIFTED, "optimizer.lr=3e-3"],
    "unshifted-rate-2-lora-plus": [*_UNSHIFTED, "optimizer.lr=2e-3", "optimizer.lora_plus=2"],
    "warm-up": [*_OBJECTIVE, "scheduler.warmup_steps=100"],
    "uniform": [*_RELEASED, "loss.timesteps=uniform"],
    "low-discrepancy": [*_RELEASED, "loss.timesteps=low_discrepancy"],
    "ema": ["loss=released", "scheduler.warmup_steps=0", "trainer.ema_decay=0.97"],
    "uniform-ema": ["loss.timesteps=uniform", "scheduler.warmup_steps=0"],
    "cosine": [*_RELEASED, "scheduler=cosine"],
    "lora-plus": [*_RELEASED, "optimizer.lora_plus=4"],
    "min-snr": [*_RELEASED, "loss.weighting=min_snr"],
    "no-coupling": [*_RELEASED, "loss.coupling=false"],
    "no-segments": [*_RELEASED, "loss.inpainting={full: 1.0}"],
}
"""What each variant changes: from `warm-up` on, and in `released` ones, of the released trainer's objective and
schedule, else of the default."""

COMMON = [
    "model=nano-base",
    "optimizer.lr=1e-3",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
    "data.num_workers=0",
    "callbacks.validation.clips=12",
    "callbacks.validation.strengths=[]",
    "callbacks.demos.enabled=false",
    "callbacks.checkpoint.every=1000000",
    "callbacks.report=false",
]


def main() -> None:
    """Run the trials that are missing and print the table."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    flags.add_argument("out", type=Path, help="folder of trials.jsonl")
    flags.add_argument("data", nargs="+", metavar="NAME=LATENTS", help="data sets")
    flags.add_argument("--variants", default=",".join(VARIANTS), help="the first is what others are compared with")
    flags.add_argument("--seeds", default="0,1,2")
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--first-steps", type=int, help="steps of the first variant (default: as the others)")
    flags.add_argument("--every", type=int, help="steps between validations (default: after the last alone)")
    arguments = flags.parse_args()
    variants, sets = arguments.variants.split(","), dict(each.split("=", 1) for each in arguments.data)
    if unknown := set(variants) - set(VARIANTS):
        flags.error(f"unknown variants {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = arguments.out / "trials.jsonl"
    steps = dict.fromkeys(variants, arguments.steps)
    steps[variants[0]] = arguments.first_steps or arguments.steps
    losses = _read(lines, steps)
    for seed in map(int, arguments.seeds.split(",")):
        for data, folder in sets.items():
            for variant in variants:
                if (data, variant, seed) in losses:
                    continue
                trial = {"data": data, "variant": variant, "seed": seed, "steps": steps[variant]}
                trial |= run_trial(arguments.out / "run", folder, variant, seed, steps[variant], arguments.every)
                (arguments.out / "run" / ADAPTER_FILE).replace(arguments.out / f"{data}-{variant}-{seed}.safetensors")
                with lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(trial) + "\n")
    losses = _read(lines, steps)
    for data in sets:
        print_table(data, variants, {key[1:]: trial for key, trial in losses.items() if key[0] == data})


def run_trial(run: Path, data: str, variant: str, seed: int, steps: int, every: int | None = None) -> dict[str, Any]:
    """Train once.

    Args:
        run: Run folder, made anew.
        data: Latent shards with held-out clips.
        variant: Name of the variant.
        seed: Seed of the run.
        steps: Optimizer steps.
        every: Steps between validations. None: after the last alone.

    Returns:
        Losses of held-out clips with the base and by step; mean loss of training clips after the last step; processor
        seconds of the run.
    """
    shutil.rmtree(run, ignore_errors=True)
    settings = [f"data={data}", f"run_dir={run}", f"seed={seed}", f"trainer.max_steps={steps}", *COMMON]
    settings += [f"callbacks.validation.every={every or steps}", *VARIANTS[variant]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, Path(__file__).with_name("train.py"), *settings], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads((run / "validation.json").read_text(encoding="utf-8"))
    last = found["history"][-1]
    return {
        "base": found["base"]["val"]["by_clip"],
        "losses": {row["step"]: row["val"]["by_clip"] for row in found["history"]},
        "training_loss": last["train_eval"]["loss"],
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def print_table(data: str, variants: list[str], trials: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Print the variants of a data set.

    Args:
        data: Its name.
        variants: The variants; the first is what others are compared with.
        trials: Trials by variant and seed.
    """
    for variant in variants:
        seeds = [seed for name, seed in trials if name == variant and (variants[0], seed) in trials]
        if not seeds:
            continue
        mine, first = ([trials[name, seed] for seed in seeds] for name in (variant, variants[0]))
        changes = [_compare(trial["base"], _get_last(trial)) for trial in mine]
        pairs = [(trial, _get_last(other)) for trial, other in zip(mine, first, strict=True)]
        differences = ", ".join(f"{_compare(goal_I, _get_last(trial)):+.2f}%" for trial, goal_I in pairs)
        steps = ", ".join(find_step(trial, goal_I) for trial, goal_I in pairs)
        cost = statistics.mean(trial["processor_seconds"] for trial in mine)
        against = f"against {variants[0]}: {differences}, its loss after {steps} steps"
        print(f"{data:10} {variant:16} {', '.join(f'{change:+.1f}%' for change in changes)}  {against}  {cost:.0f} s")


def find_step(trial: dict[str, Any], goal_I: list[float]) -> str:
    """Find when a trial reaches a loss.

    Args:
        trial: What `run_trial` returned.
        goal_I: The loss, clip by clip.

    Returns:
        The first step at which the geometric mean over clips is as low, between validations on a straight line of
        logarithms; "more than" the last step if it never is.
    """
    before, excess_before = 0, 0.0
    for step, losses_I in trial["losses"].items():
        excess = float((take_logs(losses_I) - take_logs(goal_I)).mean())
        if excess <= 0:
            share = excess_before / (excess_before - excess) if excess_before > excess else 1.0
            return f"{before + share * (int(step) - before):.0f}"
        before, excess_before = int(step), excess
    return f"more than {before}"


def _compare(base_I: list[float], other_I: list[float]) -> float:
    change = compare_clips(base_I, other_I)
    assert change is not None
    return 100 * change.change


def _get_last(trial: dict[str, Any]) -> list[float]:
    return list(trial["losses"].values())[-1]


def _read(path: Path, steps: dict[str, int]) -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [row for row in rows if row["steps"] == steps.get(row["variant"]) and isinstance(row["base"], list)]
    return {(row["data"], row["variant"], row["seed"]): row for row in rows}


if __name__ == "__main__":
    main()
