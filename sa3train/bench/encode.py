"""Encoding a set of clips: audio seconds per second, padding computed, memory, and two processes against one.

The clips run through the calls that `sa3-encode` makes: buckets of unequal clips through `encode_many`.
"""

import json
import os
import random
import subprocess
import sys
import time

import torch

from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import dtype_of, own_threads, peak_allocated, wait
from sa3train.bench.roofline import measured_rates, same_encode
from sa3train.core.errors import SA3Error
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import load_checkpoint

CLIPS, SHORTEST, LONGEST = 200, 2.0, 12.0
RATE_BAR, PADDING_BAR, PROCESSES_BAR = 20.0, 0.05, 1.7
BATCH_SECONDS = 60.0


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (small) for 200 clips of 2 to 12 s; `seconds` takes the place of their total length."""
    arch = options.arch or "small"
    dtype = dtype_of(options.dtype)
    with own_threads(options.threads), torch.inference_mode():
        model = _autoencoder(arch, options)
        clips = clips_of(model.sample_rate, options.seconds)
        rates = measured_rates(dtype, options.device, options.repeats)
        encode_all(model, clips[:2], options.device)
        start = time.perf_counter()
        encode_all(model, clips, options.device)
        taken = time.perf_counter() - start
        few = clips[:12]
        memory = peak_allocated(lambda: encode_all(model, few, options.device), options.device)
    total = sum(clip.shape[1] for clip in clips) / model.sample_rate
    computed = sum(model.frames_of(clip.shape[1]) for clip in clips) * model.downsampling_ratio / model.sample_rate
    held = arch == "small" and options.device == "cpu"
    frames = [model.frames_of(clip.shape[1]) for clip in clips]
    flops = sum(same_encode(model.config, count).flops for count in frames)
    what = f"{arch} encode, {len(clips)} clips of {SHORTEST:g} to {LONGEST:g} s, {options.dtype}"
    figures = [
        Figure(f"{what}: audio seconds per second", total / taken, "", RATE_BAR if held else None, ">="),
        Figure(f"{what} / roofline floor", taken / (flops / rates.flops), "×"),
        Figure(f"{what}: padding computed", computed / total - 1, "of the audio", PADDING_BAR if held else None),
        Figure(f"{what}: working memory over the weights", memory / 1e9, "GB"),
    ]
    if options.device == "cpu" and (os.cpu_count() or 1) > 1:
        figures.append(_two_processes(arch, options))
    return figures


def clips_of(sample_rate: int, seconds: float | None = None) -> list[torch.Tensor]:
    """Noise of lengths spread over 2 to 12 s: 200 clips, or as many as make up `seconds`."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [draw.uniform(SHORTEST, LONGEST) for _ in range(CLIPS)]
    if seconds is not None:
        lengths = [length for index, length in enumerate(lengths) if sum(lengths[:index]) < seconds]
    return [0.1 * torch.randn(2, int(length * sample_rate), generator=generator) for length in lengths]


def encode_all(model: Autoencoder, clips: list[torch.Tensor], device: str) -> None:
    """Clips in batches of at most a minute, laid end to end."""
    batch: list[torch.Tensor] = []
    for clip in [*clips, None]:
        length = 0 if clip is None else clip.shape[1]
        if batch and (clip is None or sum(c.shape[1] for c in batch) + length > BATCH_SECONDS * model.sample_rate):
            model.encode_many([each.to(device) for each in batch])
            batch = []
        if clip is not None:
            batch.append(clip)
    wait(device)


def _autoencoder(arch: str, options: Options) -> Autoencoder:
    dtype = dtype_of(options.dtype)
    return load_checkpoint(random_checkpoint(arch), options.device, dtype, parts=("autoencoder",)).autoencoder


_PROGRAM = """
import sys, time, torch
from sa3train.bench.encode import clips_of, encode_all, _autoencoder
from sa3train.bench.figures import Options
arch, dtype, share, seconds = sys.argv[1:]
torch.set_num_threads(1)
with torch.inference_mode():
    model = _autoencoder(arch, Options(dtype=dtype))
    clips = clips_of(model.sample_rate, float(seconds))
    encode_all(model, clips[:1], "cpu")
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    encode_all(model, clips if share == "all" else clips[int(share)::2], "cpu")
    print(time.perf_counter() - start)
"""


def _two_processes(arch: str, options: Options) -> Figure:
    """Two processes of one thread, each with half the clips, against one with all, in turn; loading not counted."""
    seconds = min(options.seconds or 120.0, 120.0)
    tasks = {
        "one": lambda: _seconds_of(arch, options, ["all"], seconds),
        "two": lambda: _seconds_of(arch, options, ["0", "1"], seconds),
    }
    rounds: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(min(options.repeats, 3)):
        for name, task in tasks.items():
            rounds[name].append(task())
    ratios = sorted(one / two for one, two in zip(rounds["one"], rounds["two"], strict=True))
    return Figure(
        f"{arch} encode by 2 processes of one thread / by one",
        ratios[len(ratios) // 2],
        "×",
        PROCESSES_BAR if arch == "small" else None,
        ">=",
        note=f"of {seconds:g} s of audio; rounds from {ratios[0]:.2f} to {ratios[-1]:.2f}",
    )


def _seconds_of(arch: str, options: Options, shares: list[str], seconds: float) -> float:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, arch, options.dtype, share, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    try:
        for process in started:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise SA3Error("a measuring process did not start; its message is above.")
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
