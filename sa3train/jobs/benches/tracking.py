"""What a run loses to W&B when its server is of no use: tracked steps against untracked ones of the same run.

One training per kind of failure, on nano, every step logged (a run logs every tenth unless told otherwise). Blocks of
ten steps with W&B follow blocks without, so that other work on the machine hits both; the ratio is the median over
pairs of blocks. What a run waits for once, at its start and end, is counted in seconds beside it.
"""

import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from sa3train.jobs.benches.apart import run_apart
from sa3train.jobs.benches.checkpoints import random_checkpoint
from sa3train.jobs.benches.dead_servers import KINDS, dead_server, pointed_at
from sa3train.jobs.benches.figures import Figure, Options
from sa3train.jobs.benches.settings import dtype_of
from sa3train.jobs.benches.train import random_shards, training_flags
from sa3train.models.checkpoint import load_checkpoint

BAR, BLOCK, FRAMES = 1.10, 10, 54
NAMES = {
    "500": "answers 500",
    "silence": "takes connections and says nothing",
    "refusal": "is not there",
    "death": "says nothing more after the run's start",
}

_PROGRAM = """
import json, sys, time
from sa3train.jobs.train import main
from sa3train.training.module import LoraModule
from sa3train.training.tracking import WandbSink
block, *arguments = sys.argv[1:]
starts, once = [], []
log = WandbSink.metrics

def timed(method):
    def run(*given, **named):
        start = time.perf_counter()
        method(*given, **named)
        once.append(time.perf_counter() - start)
    return run

def in_turn(self, values, step):
    if (len(starts) - 1) // int(block) % 2:
        log(self, values, step)

LoraModule.on_train_batch_start = lambda self, *_: starts.append(time.perf_counter())
WandbSink.metrics = in_turn
WandbSink.__init__, WandbSink.close = timed(WandbSink.__init__), timed(WandbSink.close)
code = main(arguments)
if code:
    sys.exit(code)
print(json.dumps({"starts": starts, "once": once}))
"""


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (nano), `repeats` pairs of blocks each."""
    arch = options.arch or "nano"
    folder = random_checkpoint(arch)
    model = load_checkpoint(folder, dtype=dtype_of(options.dtype), parts=("dit", "conditioner"))
    figures = []
    with tempfile.TemporaryDirectory() as place:
        shards = random_shards(Path(place) / "latents", model, FRAMES)
        for kind in KINDS:
            steps = BLOCK * (2 * options.repeats + 2) + 1  # one pair to warm up, one step to see the last one's end
            flags = training_flags(options, folder, shards, FRAMES)
            flags += [f"run_dir={Path(place) / f'run-{kind}'}", f"trainer.max_steps={steps}"]
            with dead_server(kind) as server:
                flags += ["logger=wandb", "logger.mode=online"]
                found = run_apart(_PROGRAM, BLOCK, *flags, environment=pointed_at(server))
            figures += _figures(arch, kind, found)
    return figures


def _figures(arch: str, kind: str, found: dict[str, Any]) -> list[Figure]:
    ratios, seconds = block_ratios(found["starts"], BLOCK)
    what = f"train {arch}, W&B server {NAMES[kind]}"
    return [
        Figure(
            f"{what}: tracked steps / untracked steps",
            statistics.median(ratios),
            "×",
            BAR,
            note=f"{seconds:.3f} s a step; pairs of blocks {min(ratios):.3g} to {max(ratios):.3g}",
        ),
        Figure(f"{what}: once, at start and end", sum(found["once"]), "s"),
    ]


def block_ratios(starts: list[float], block: int) -> tuple[list[float], float]:
    """Odd blocks of `block` steps over the even ones before them, the first pair left out; and seconds of an even step.

    `starts`: when each step began.
    """
    marks = starts[::block]
    lengths = [after - before for before, after in pairwise(marks)][2:]
    pairs = list(zip(lengths[0::2], lengths[1::2], strict=False))
    return [tracked / bare for bare, tracked in pairs], statistics.median(bare for bare, _ in pairs) / block
