"""The whole training loop: `sa3-train` on random latents, with what it spends beside forward and backward.

The loop's own share is taken inside one run on a CPU: from the start of a batch to the end of its backward pass is the
step, the rest of an iteration (data, clipping, optimizer, logging) is overhead. The floor is that of `sa3-bench
adapters`: the frozen DiT forward and backward on the same number of frames, measured beside the run.

On a GPU nothing waits for the device but the start of the first and of the last iteration that count, since steps
overlap there. Rows are packed, several to a step; a second run, of one row, tells the memory that the least takes.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sa3train.bench.adapters import FRAMES, RANK, frozen_step, random_batch
from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import dtype_of, interleaved, own_threads, run_apart
from sa3train.bench.roofline import Cost, dit_training_floor, measured_rates
from sa3train.core.errors import ConfigError
from sa3train.data.shards.index import SILENCE, build_index
from sa3train.data.shards.writer import ShardWriter
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

OVERHEAD_BAR, CUDA_RATE_BAR, CUDA_MEMORY_BAR = 0.10, 0.60, 5.0
CLIPS, SKIPPED = 16, 2
CUDA_ROWS, CUDA_STEPS = 4, 6
"""Rows a step on a GPU, and steps for each of a CPU's."""

_PROGRAM = """
import json, sys, time
from sa3train.bench.measure import PeakMemory, wait
from sa3train.cli.train import main
from sa3train.training.module import LoraModule
device, waits, *arguments = sys.argv[1:]
times = []

def mark(self, *_):
    if str(len(times)) in waits.split(","):
        wait(device)
    times.append(time.perf_counter())

LoraModule.on_train_batch_start = mark
LoraModule.on_after_backward = mark
with PeakMemory(device) as memory:
    code = main(arguments)
if code:
    sys.exit(code)
print(json.dumps({"times": times, "memory": memory.bytes}))
"""


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (small) on crops of 258 frames, or of `seconds`; the adapter is dora-rows of rank 16.

    Raises `ConfigError` for a dtype that nothing is trained in.
    """
    if options.dtype == "fp16":
        raise ConfigError("sa3-train has no fp16: give --dtype bf16 or fp32.")
    arch = options.arch or "small"
    folder = random_checkpoint(arch)
    with own_threads(options.threads):
        model = load_checkpoint(folder, options.device, dtype_of(options.dtype), parts=("dit", "conditioner"))
        frames = FRAMES if options.seconds is None else int(options.seconds * 44100) // model.downsampling_ratio
        with tempfile.TemporaryDirectory() as place:
            shards = random_shards(Path(place) / "latents", model, frames)
            run_dir, cuda = Path(place) / "run", options.device.startswith("cuda")
            flags = training_flags(options, folder, shards, frames)
            times, memory = _gpu_run(options, flags, run_dir) if cuda else _cpu_run(options, flags, run_dir)
            least = _least_memory(options, flags, run_dir) if cuda else None
        step = frozen_step(model, random_batch(model, options))
        floor = interleaved({"floor": step}, options.repeats, options.device).median("floor")
        rates = measured_rates(dtype_of(options.dtype), options.device, options.repeats)
    cost = dit_training_floor(model.config.dit, frames, model.conditioner.max_length + 1)
    return _figures(options, arch, frames, times, floor, cost, rates.flops, memory, least)


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration with so many rows, and what its loop takes over the step where that is measured."""

    iteration: float
    rows: int
    overhead: float | None


def _cpu_run(options: Options, flags: list[str], run_dir: Path) -> tuple[Times, int]:
    count = options.repeats + SKIPPED + 1
    found = run_apart(_PROGRAM, options.device, "", *flags, f"run_dir={run_dir}", f"trainer.max_steps={count}")
    starts, ends = found["times"][0::2], found["times"][1::2]
    iterations = [after - start for start, after in zip(starts[SKIPPED:], starts[SKIPPED + 1 :], strict=False)]
    steps = [end - start for start, end in zip(starts[SKIPPED:], ends[SKIPPED:], strict=False)][: len(iterations)]
    return Times(statistics.median(iterations), 1, sum(iterations) / sum(steps) - 1), found["memory"]


def _gpu_run(options: Options, flags: list[str], run_dir: Path) -> tuple[Times, int]:
    count = options.repeats * CUDA_STEPS + SKIPPED + 1
    frames = next(flag for flag in flags if flag.startswith("data.crop_frames=")).partition("=")[2]
    packed = [f"data.batch_size={CUDA_ROWS}", f"data.pack_frames={frames}", "objective.silence_seconds=0"]
    first, last = 2 * SKIPPED, 2 * (count - 1)  # two marks a step: its start, the end of its backward pass
    steps = f"trainer.max_steps={count}"
    found = run_apart(_PROGRAM, options.device, f"{first},{last}", *flags, *packed, f"run_dir={run_dir}", steps)
    seconds = found["times"][last] - found["times"][first]
    return Times(seconds / (count - 1 - SKIPPED), CUDA_ROWS, None), found["memory"]


def _least_memory(options: Options, flags: list[str], run_dir: Path) -> int:
    """Peak bytes of training on one row with the blocks recomputed."""
    lean = ["trainer.activation_checkpointing=blocks", f"run_dir={run_dir}-lean", f"trainer.max_steps={SKIPPED + 1}"]
    memory: int = run_apart(_PROGRAM, options.device, "", *flags, *lean)["memory"]
    return memory


def _figures(
    options: Options,
    arch: str,
    frames: int,
    times: Times,
    floor: float,
    cost: Cost,
    rate: float,
    memory: int,
    least: int | None,
) -> list[Figure]:
    cuda = options.device.startswith("cuda") and arch == "medium"
    rows = f"{times.rows} × {frames}" if times.rows > 1 else str(frames)
    what = f"train {arch}, dora-rows rank {RANK}, {rows} frames, {options.dtype}"
    flops, iteration = times.rows * cost.flops, times.iteration
    figures = [
        Figure(
            f"{what}: steps per second",
            1 / iteration,
            "",
            note=f"{times.rows * frames / iteration:.1f} frames per second",
        ),
        Figure(
            f"{what}: iteration / floor of sa3-bench adapters",
            iteration / floor / times.rows,
            "×",
            note=f"floor {floor:.2f} s a row",
        ),
        Figure(
            f"{what}: share of the matmul rate, counted on the frozen forward and backward",
            flops / iteration / rate,
            "",
            CUDA_RATE_BAR if cuda else None,
            ">=",
            note=f"{flops / 1e12:.2f} Tflop a step, {rate / 1e12:.2f} Tflop/s",
        ),
        Figure(f"{what}: peak memory, weights included", memory / 1e9, "GB"),
    ]
    if times.overhead is not None:
        bar = OVERHEAD_BAR if arch == "small" else None
        figures.append(Figure(f"{what}: data, logging, optimizer over the step", times.overhead, "of it", bar))
    if least is not None:
        name = f"train {arch}, dora-rows rank {RANK}, one row of {frames} frames, {options.dtype}, blocks recomputed"
        bar = CUDA_MEMORY_BAR if cuda else None
        figures.append(Figure(f"{name}: peak memory, weights included", least / 1e9, "GB", bar))
    return figures


def random_shards(folder: Path, model: StableAudio3, frames: int) -> Path:
    """Latent shards of random clips a little longer than `frames`, as `sa3-encode` leaves them."""
    folder.mkdir(parents=True)
    generator, channels = np.random.default_rng(0), model.latent_channels
    with ShardWriter(folder, "train") as writer:
        for index in range(CLIPS):
            length = frames + 1 + index
            record = {
                "key": f"clip-{index:03d}",
                "clip": f"clip-{index:03d}",
                "view": "original",
                "caption": f"sound {index % 4}",
                "tags": {},
                "source": f"{index}.wav",
                "seconds": length * model.downsampling_ratio / model.sample_rate,
            }
            writer.add(generator.standard_normal((channels, length)).astype(np.float16), record)
    np.save(folder / SILENCE, np.zeros((channels, 16), np.float16))
    described = {
        "name": model.name,
        "fingerprint": model.autoencoder_fingerprint(),
        "sample_rate": model.sample_rate,
        "downsampling_ratio": model.downsampling_ratio,
    }
    build_index(folder, {"model": described}, {})
    return folder


def training_flags(options: Options, folder: Path, shards: Path, frames: int) -> list[str]:
    """The command line of `sa3-train`: dora-rows of rank 16, one clip a step; on a CPU every step is logged."""
    cuda = options.device.startswith("cuda")
    return [
        f"data={shards}",
        f"model={folder}",
        "adapter=dora-rows",
        f"adapter.rank={RANK}",
        "callbacks=none",
        "data.crop_seconds=null",
        f"data.crop_frames={frames}",
        "data.batch_size=1",
        "data.tail_seconds=0",
        f"model.dtype={options.dtype}",
        f"trainer.threads={options.threads}",
        f"trainer.accelerator={'gpu' if cuda else 'cpu'}",
        f"trainer.log_every={10 if cuda else 1}",
    ]
