"""Encoding a set of clips: audio seconds per second, padding computed, and memory.

The clips run through the calls that `sa3-encode` makes: batches of clips of unequal length through `encode_many`.
"""

import random
import time

import torch

from sa3train.bench.checkpoints import load_random_model
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import measure_peak_allocation, use_threads, wait
from sa3train.bench.roofline import count_same, measure_rates
from sa3train.models.autoencoder import Autoencoder

CLIPS, SHORTEST, LONGEST = 200, 2.0, 12.0
RATE_TARGET, PADDING_TARGET = 20.0, 5.0
BATCH_SECONDS = 60.0


def run(options: Options) -> list[Figure]:
    """Measure encoding of 200 clips of noise of 2 to 12 s.

    Args:
        options: `arch` (default small), `seconds` of all clips together (default: of all 200).

    Returns:
        Speed, padding and memory.
    """
    arch = options.arch or "small"
    with use_threads(options.threads), torch.inference_mode():
        model = load_random_model(arch, options, "autoencoder").autoencoder
        clips = _make_clips(model.sample_rate, options.seconds)
        rates = measure_rates(options)
        _encode_clips(model, clips[:2], options.device)
        start = time.perf_counter()
        _encode_clips(model, clips, options.device)
        seconds = time.perf_counter() - start
        memory = measure_peak_allocation(lambda: _encode_clips(model, clips[:12], options.device), options.device)
    total = sum(clip.shape[1] for clip in clips) / model.sample_rate
    frames = sum(model.count_frames(clip.shape[1]) for clip in clips)
    computed = frames * model.downsampling_ratio / model.sample_rate
    flops = count_same(model.config, frames, decodes=False).flops
    has_target = arch == "small" and options.device == "cpu"
    what = f"{arch} encode, {len(clips)} clips of {SHORTEST:g} to {LONGEST:g} s, {options.dtype}"
    return [
        Figure(f"{what}: audio seconds per second", total / seconds, "", RATE_TARGET if has_target else None, ">="),
        Figure(f"{what} / roofline", seconds / (flops / rates.flops), "×"),
        Figure(f"{what}: padding computed", 100 * (computed / total - 1), "%", PADDING_TARGET if has_target else None),
        Figure(f"{what}: working memory besides the weights", memory / 1e9, "GB"),
    ]


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
