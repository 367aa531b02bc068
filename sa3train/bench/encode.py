"""Encoding a set of clips: audio seconds per second, padding computed, memory, and two processes against one.

The clips run through the calls that `sa3-encode` makes: batches of clips of unequal length through `encode_many`.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time

import torch

from sa3train.bench.checkpoints import make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import measure_peak_allocation, use_threads, wait
from sa3train.bench.roofline import count_same_encode, measure_rates
from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import SA3Error
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import load_checkpoint

CLIPS, SHORTEST, LONGEST = 200, 2.0, 12.0
RATE_TARGET, PADDING_TARGET, PROCESSES_TARGET = 20.0, 5.0, 1.7
BATCH_SECONDS = 60.0


def run(options: Options) -> list[Figure]:
    """Measure encoding of 200 clips of noise of 2 to 12 s.

    Args:
        options: `arch` (default small), `seconds` of all clips together (default: of all 200).

    Returns:
        Speed, padding, memory and, on a CPU, the speed of two processes.
    """
    arch = options.arch or "small"
    with use_threads(options.threads), torch.inference_mode():
        model = _load_autoencoder(arch, options.device, options.dtype)
        clips = _make_clips(model.sample_rate, options.seconds)
        rates = measure_rates(get_dtype(options.dtype), options.device, options.repeats)
        _encode_clips(model, clips[:2], options.device)
        start = time.perf_counter()
        _encode_clips(model, clips, options.device)
        seconds = time.perf_counter() - start
        memory = measure_peak_allocation(lambda: _encode_clips(model, clips[:12], options.device), options.device)
    total = sum(clip.shape[1] for clip in clips) / model.sample_rate
    frames = [model.count_frames(clip.shape[1]) for clip in clips]
    computed = sum(frames) * model.downsampling_ratio / model.sample_rate
    flops = sum(count_same_encode(model.config, count).flops for count in frames)
    has_target = arch == "small" and options.device == "cpu"
    what = f"{arch} encode, {len(clips)} clips of {SHORTEST:g} to {LONGEST:g} s, {options.dtype}"
    figures = [
        Figure(f"{what}: audio seconds per second", total / seconds, "", RATE_TARGET if has_target else None, ">="),
        Figure(f"{what} / roofline", seconds / (flops / rates.flops), "×"),
        Figure(f"{what}: padding computed", 100 * (computed / total - 1), "%", PADDING_TARGET if has_target else None),
        Figure(f"{what}: working memory besides the weights", memory / 1e9, "GB"),
    ]
    if options.device == "cpu" and (os.cpu_count() or 1) > 1:
        figures.append(_measure_two_processes(arch, options))
    return figures


def _make_clips(sample_rate: int, seconds: float | None = None) -> list[torch.Tensor]:
    """Make noise of lengths spread over 2 to 12 s: 200 clips, or as many as make up `seconds`."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [rng.uniform(SHORTEST, LONGEST) for _ in range(CLIPS)]
    if seconds is not None:
        lengths = [length for index, length in enumerate(lengths) if sum(lengths[:index]) < seconds]
    return [0.1 * torch.randn(2, int(length * sample_rate), generator=generator) for length in lengths]


def _encode_clips(model: Autoencoder, clips: list[torch.Tensor], device: str) -> None:
    """Encode clips in batches of at most a minute, concatenated in time."""
    batch: list[torch.Tensor] = []
    for clip in [*clips, None]:
        length = 0 if clip is None else clip.shape[1]
        if batch and (clip is None or sum(c.shape[1] for c in batch) + length > BATCH_SECONDS * model.sample_rate):
            model.encode_many([each.to(device) for each in batch])
            batch = []
        if clip is not None:
            batch.append(clip)
    wait(device)


def _load_autoencoder(arch: str, device: str, dtype: str) -> Autoencoder:
    return load_checkpoint(make_random_checkpoint(arch), device, get_dtype(dtype), parts=("autoencoder",)).autoencoder


def encode_share(arch: str, dtype: str, seconds: float, share: int, shares: int) -> None:
    """Encode every `shares`-th clip on one CPU thread: the main function of a process of `_time_processes`.

    Writes "ready" to stdout when the model is loaded, waits for a line on stdin, and writes the seconds of encoding.

    Args:
        arch: Architecture.
        dtype: "fp32", "bf16" or "fp16".
        seconds: Duration of all clips together.
        share: Index of the first clip.
        shares: Number of processes.
    """
    torch.set_num_threads(1)
    with torch.inference_mode():
        model = _load_autoencoder(arch, "cpu", dtype)
        clips = _make_clips(model.sample_rate, seconds)
        _encode_clips(model, clips[:1], "cpu")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        start = time.perf_counter()
        _encode_clips(model, clips[share::shares], "cpu")
        sys.stdout.write(f"{time.perf_counter() - start}\n")


def _measure_two_processes(arch: str, options: Options) -> Figure:
    """Compare two processes of one thread, each with half of the clips, to one with all; without loading."""
    seconds = min(options.seconds or 120.0, 120.0)
    ratios = []
    for _ in range(min(options.repeats, 3)):
        one, two = (_time_processes(arch, options.dtype, seconds, count) for count in (1, 2))
        ratios.append(one / two)
    note = f"of {seconds:g} s of audio; rounds from {min(ratios):.2f} to {max(ratios):.2f}"
    target = PROCESSES_TARGET if arch == "small" else None
    what = f"{arch} encode by 2 processes of one thread / by one"
    return Figure(what, statistics.median(ratios), "×", target, ">=", note)


def _time_processes(arch: str, dtype: str, seconds: float, count: int) -> float:
    """Time `count` processes that start together; return the seconds of the slowest."""
    program = "import json, sys; from sa3train.bench.encode import encode_share; encode_share(*json.loads(sys.argv[1]))"
    processes = []
    for share in range(count):
        command = [sys.executable, "-c", program, json.dumps([arch, dtype, seconds, share, count])]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise SA3Error("a benchmark process did not start. Its message is above.")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(process.communicate()[0].strip().splitlines()[-1]) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
