"""The whole training loop: `sa3-train` on random latents, with what it spends beside forward and backward.

The loop's own share is taken inside one run: from the start of a batch to the end of its backward pass is the step,
the rest of an iteration (data, clipping, optimizer, logging) is overhead. The floor is that of `sa3-bench adapters`:
the frozen DiT forward and backward on the same number of frames, measured beside the run.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np

from sa3train.data.index import SILENCE, build_index
from sa3train.data.shards import ShardWriter
from sa3train.errors import ConfigError
from sa3train.jobs.benches.adapters import FRAMES, RANK, frozen_step, random_batch
from sa3train.jobs.benches.apart import run_apart
from sa3train.jobs.benches.checkpoints import random_checkpoint
from sa3train.jobs.benches.figures import Figure, Options
from sa3train.jobs.benches.measure import interleaved
from sa3train.jobs.benches.roofline import Cost, dit_training_floor, measured_rates
from sa3train.jobs.benches.settings import dtype_of, own_threads
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

OVERHEAD_BAR, CUDA_RATE_BAR, CUDA_MEMORY_BAR = 0.10, 0.60, 5.0
CLIPS, SKIPPED = 16, 2

_PROGRAM = """
import json, sys, time
from sa3train.jobs.benches.measure import PeakMemory, wait
from sa3train.jobs.train import main
from sa3train.training.module import LoraModule
device, *arguments = sys.argv[1:]
times = []

def mark(self, *_):
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
            count = options.repeats + SKIPPED + 1
            flags = training_flags(options, folder, shards, Path(place) / "run", frames, count)
            found = run_apart(_PROGRAM, options.device, *flags)
        step = frozen_step(model, random_batch(model, options))
        floor = interleaved({"floor": step}, options.repeats, options.device).median("floor")
        rates = measured_rates(dtype_of(options.dtype), options.device, options.repeats)
    starts, ends = found["times"][0::2], found["times"][1::2]
    iterations = [after - start for start, after in zip(starts[SKIPPED:], starts[SKIPPED + 1 :], strict=False)]
    steps = [end - start for start, end in zip(starts[SKIPPED:], ends[SKIPPED:], strict=False)][: len(iterations)]
    iteration, overhead = statistics.median(iterations), sum(iterations) / sum(steps) - 1
    cost = dit_training_floor(model.config.dit, frames, model.conditioner.max_length + 1)
    return _figures(options, arch, frames, iteration, overhead, floor, cost, rates.flops, found["memory"])


def _figures(
    options: Options,
    arch: str,
    frames: int,
    iteration: float,
    overhead: float,
    floor: float,
    cost: Cost,
    rate: float,
    memory: int,
) -> list[Figure]:
    cuda = options.device.startswith("cuda") and arch == "medium"
    what = f"train {arch}, dora-rows rank {RANK}, {frames} frames, {options.dtype}"
    share = cost.flops / iteration / rate
    return [
        Figure(f"{what}: steps per second", 1 / iteration, "", note=f"{frames / iteration:.1f} frames per second"),
        Figure(f"{what}: iteration / floor of sa3-bench adapters", iteration / floor, "×", note=f"floor {floor:.2f} s"),
        Figure(
            f"{what}: share of the matmul rate, counted on the frozen forward and backward",
            share,
            "",
            CUDA_RATE_BAR if cuda else None,
            ">=",
            note=f"{cost.flops / 1e12:.2f} Tflop a step, {rate / 1e12:.2f} Tflop/s",
        ),
        Figure(
            f"{what}: data, logging, optimizer over the step",
            overhead,
            "of it",
            OVERHEAD_BAR if arch == "small" else None,
        ),
        Figure(f"{what}: peak memory, weights included", memory / 1e9, "GB", CUDA_MEMORY_BAR if cuda else None),
    ]


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


def training_flags(options: Options, folder: Path, shards: Path, run_dir: Path, frames: int, steps: int) -> list[str]:
    """The command line of `sa3-train`: dora-rows of rank 16, one clip a step, every step logged, nothing beside it."""
    return [
        f"data={shards}",
        f"model={folder}",
        f"run_dir={run_dir}",
        "adapter=dora-rows",
        f"adapter.rank={RANK}",
        "callbacks=none",
        "data.crop_seconds=null",
        f"data.crop_frames={frames}",
        "data.batch_size=1",
        "data.tail_seconds=0",
        f"model.dtype={options.dtype}",
        f"trainer.max_steps={steps}",
        f"trainer.threads={options.threads}",
        f"trainer.accelerator={'gpu' if options.device.startswith('cuda') else 'cpu'}",
        "trainer.log_every=1",
    ]
