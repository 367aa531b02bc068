"""The training loop: `sa3-train` on random latents, and its overhead besides forward and backward.

On a CPU the overhead is measured inside one run: from the start of a batch to the end of its backward pass is the step,
the rest of an iteration (data, clipping, optimizer, logging) is overhead. The baseline is the frozen-base baseline of
`sa3-bench adapters` on the same number of frames, measured after the run.

On a GPU the device is waited for only at the start of the first and of the last counted iteration, since steps overlap.
Rows are packed, several to a step; a second run, with one row, measures the least memory.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sa3train.bench.adapters import FRAMES, RANK, make_frozen_step, make_random_batch
from sa3train.bench.checkpoints import load_random_model, make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import run_in_subprocess, time_interleaved, use_threads
from sa3train.bench.roofline import count_dit_training, measure_rates
from sa3train.bench.tasks import measure_training
from sa3train.core.errors import ConfigError
from sa3train.data.shards.index import SILENCE_FILE, build_index
from sa3train.data.shards.writer import ShardWriter
from sa3train.models.checkpoint import StableAudio3

OVERHEAD_TARGET, CUDA_RATE_TARGET, CUDA_MEMORY_TARGET = 10.0, 60.0, 5.0
CLIPS, SKIPPED = 16, 2
CUDA_ROWS, CUDA_STEPS = 4, 6
"""Rows of a step on a GPU, and steps for each of a CPU's."""


@dataclass(frozen=True)
class _Run:
    """A measured run.

    Attributes:
        seconds: Of an iteration.
        memory: Peak bytes, weights included.
        rows: Rows of a step.
        overhead: Share of the step's time that its loop takes besides it; None where it is not measured.
    """

    seconds: float
    memory: int
    rows: int = 1
    overhead: float | None = None


def run(options: Options) -> list[Figure]:
    """Measure training of dora-rows, rank 16.

    Args:
        options: `arch` (default small), `seconds` of a crop (default: 258 frames).

    Returns:
        Speed, memory and overhead.

    Raises:
        ConfigError: The dtype is fp16, in which nothing is trained.
    """
    if options.dtype == "fp16":
        raise ConfigError("sa3-train does not support fp16. Use --dtype bf16 or fp32.")
    arch = options.arch or "small"
    with use_threads(options.threads):
        model = load_random_model(arch, options, "dit", "conditioner")
        frames = FRAMES if options.seconds is None else int(options.seconds * 44100) // model.downsampling_ratio
        with tempfile.TemporaryDirectory() as work:
            shards = make_random_shards(Path(work) / "latents", model, frames)
            flags = list_training_flags(options, make_random_checkpoint(arch), shards, frames)
            measure = _run_on_gpu if options.is_cuda else _run_on_cpu
            measured = measure(options, flags, Path(work) / "run", frames)
            least = _measure_least_memory(options, flags, Path(work) / "lean") if options.is_cuda else None
        step = make_frozen_step(model, make_random_batch(model, options))
        baseline = time_interleaved({"baseline": step}, options.repeats, options.device).median("baseline")
        rate = measure_rates(options).flops
    flops = measured.rows * count_dit_training(model.config.dit, frames, model.conditioner.max_length + 1).flops
    figures = _make_figures(options, arch, frames, measured, baseline, flops, rate)
    if least is not None:
        name = f"train {arch}, dora-rows rank {RANK}, one row of {frames} frames, {options.dtype}, blocks recomputed"
        target = CUDA_MEMORY_TARGET if arch == "medium" else None
        figures.append(Figure(f"{name}: peak memory, weights included", least / 1e9, "GB", target))
    return figures


def _make_figures(
    options: Options, arch: str, frames: int, measured: _Run, baseline: float, flops: float, rate: float
) -> list[Figure]:
    """Make the figures of a run, from the baseline's seconds, the operations of a step and the matmul rate."""
    rows = f"{measured.rows} × {frames}" if measured.rows > 1 else str(frames)
    what = f"train {arch}, dora-rows rank {RANK}, {rows} frames, {options.dtype}"
    ratio, share = measured.seconds / baseline / measured.rows, 100 * flops / measured.seconds / rate
    speed = f"{measured.rows * frames / measured.seconds:.1f} frames per second"
    rates = f"{flops / 1e12:.2f} Tflop a step, {rate / 1e12:.2f} Tflop/s"
    counted = "share of the matmul rate, counted on the frozen forward and backward"
    share_target = CUDA_RATE_TARGET if options.is_cuda and arch == "medium" else None
    figures = [
        Figure(f"{what}: steps per second", 1 / measured.seconds, "", note=speed),
        Figure(f"{what}: iteration / frozen-base baseline", ratio, "×", note=f"baseline {baseline:.2f} s a row"),
        Figure(f"{what}: {counted}", share, "%", share_target, ">=", rates),
        Figure(f"{what}: peak memory, weights included", measured.memory / 1e9, "GB"),
    ]
    if measured.overhead is not None:
        target = OVERHEAD_TARGET if arch == "small" else None
        name = f"{what}: data, logging, optimizer besides the step"
        figures.append(Figure(name, 100 * measured.overhead, "%", target))
    return figures


def _run_on_cpu(options: Options, flags: list[str], run_dir: Path, frames: int) -> _Run:
    arguments = [*flags, f"run_dir={run_dir}", f"trainer.max_steps={options.repeats + SKIPPED + 1}"]
    measured = run_in_subprocess(measure_training, arguments, options.device, [])
    starts, ends = measured["times"][0::2], measured["times"][1::2]
    iterations = [after - start for start, after in zip(starts[SKIPPED:], starts[SKIPPED + 1 :], strict=False)]
    steps = [end - start for start, end in zip(starts[SKIPPED:], ends[SKIPPED:], strict=False)][: len(iterations)]
    overhead = sum(iterations) / sum(steps) - 1
    return _Run(statistics.median(iterations), measured["memory"], overhead=overhead)


def _run_on_gpu(options: Options, flags: list[str], run_dir: Path, frames: int) -> _Run:
    count = options.repeats * CUDA_STEPS + SKIPPED + 1
    packed = [f"data.batch_size={CUDA_ROWS}", f"data.pack_frames={frames}", "loss.silence_seconds=0"]
    first, last = 2 * SKIPPED, 2 * (count - 1)  # two marks a step: its start, the end of its backward pass
    arguments = [*flags, *packed, f"run_dir={run_dir}", f"trainer.max_steps={count}"]
    measured = run_in_subprocess(measure_training, arguments, options.device, [first, last])
    seconds = measured["times"][last] - measured["times"][first]
    return _Run(seconds / (count - 1 - SKIPPED), measured["memory"], CUDA_ROWS)


def _measure_least_memory(options: Options, flags: list[str], run_dir: Path) -> int:
    """Measure the peak bytes of training on one row with activation checkpointing of blocks."""
    lean = ["trainer.activation_checkpointing=blocks", f"run_dir={run_dir}", f"trainer.max_steps={SKIPPED + 1}"]
    memory: int = run_in_subprocess(measure_training, [*flags, *lean], options.device, [])["memory"]
    return memory


def make_random_shards(folder: Path, model: StableAudio3, frames: int) -> Path:
    """Make shards of random latents a little longer than a crop, as `sa3-encode` writes them.

    Args:
        folder: Folder to make.
        model: Model whose latents they are.
        frames: Frames of a crop.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    generator, channels = np.random.default_rng(0), model.latent_channels
    with ShardWriter(folder, "train") as writer:
        for index in range(CLIPS):
            length = frames + 1 + index
            record = {
                "key": f"clip-{index:03d}",
                "clip": f"clip-{index:03d}",
                "augmentation": "original",
                "caption": f"sound {index % 4}",
                "tags": {},
                "source": f"{index}.wav",
                "seconds": length * model.downsampling_ratio / model.sample_rate,
            }
            writer.add(generator.standard_normal((channels, length)).astype(np.float16), record)
    np.save(folder / SILENCE_FILE, np.zeros((channels, 16), np.float16))
    encoder = {
        "name": model.name,
        "fingerprint": model.autoencoder_fingerprint(),
        "sample_rate": model.sample_rate,
        "downsampling_ratio": model.downsampling_ratio,
    }
    build_index(folder, {"model": encoder}, {})
    return folder


def list_training_flags(options: Options, folder: Path, shards: Path, frames: int) -> list[str]:
    """List the command line of `sa3-train`: dora-rows, rank 16, one clip a step; on a CPU each step is logged.

    Args:
        options: `device`, `dtype` and `threads`.
        folder: Folder of the model.
        shards: Folder of the latents.
        frames: Frames of a crop.

    Returns:
        Arguments without `run_dir` and `trainer.max_steps`.
    """
    return [
        f"data={shards}",
        f"model={folder}",
        "adapter=dora-rows",
        f"adapter.rank={RANK}",
        "callbacks=none",
        "data.crop_seconds=null",
        f"data.crop_frames={frames}",
        "data.batch_size=1",
        "data.silence_tail_seconds=0",
        f"model.dtype={options.dtype}",
        f"trainer.threads={options.threads}",
        f"trainer.accelerator={options.device}",
        f"trainer.log_every={10 if options.is_cuda else 1}",
    ]
