"""The autoencoder's decoder: bf16 against fp32, and against its floor."""

import torch

from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import dtype_of, interleaved, own_threads, peak_allocated
from sa3train.bench.roofline import measured_rates, same_decode
from sa3train.models.autoencoder import chunks_of, computed_frames
from sa3train.models.checkpoint import load_checkpoint

BAR = 0.55


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (small: SAME-S; medium: SAME-L) for `seconds` (30), decoded as generation does."""
    arch, seconds = options.arch or "small", options.seconds or 30.0
    with own_threads(options.threads), torch.inference_mode():
        folder, dtype = random_checkpoint(arch), dtype_of(options.dtype)
        fast = load_checkpoint(folder, options.device, dtype, parts=("autoencoder",)).autoencoder
        exact = load_checkpoint(folder, options.device, torch.float32, parts=("autoencoder",)).autoencoder
        frames = -(-int(seconds * fast.sample_rate) // fast.downsampling_ratio)
        latents_1CT = torch.randn(1, fast.latent_channels, frames, generator=torch.Generator().manual_seed(0))
        latents_1CT = latents_1CT.to(options.device)
        rates = measured_rates(dtype, options.device, options.repeats)
        tasks = {"fast": lambda: fast.decode(latents_1CT), "exact": lambda: exact.decode(latents_1CT)}
        timings = interleaved(tasks, options.repeats, options.device)
        memory = peak_allocated(lambda: fast.decode(latents_1CT), options.device)
    cost = same_decode(fast.config, frames)
    floor = cost.seconds(rates, dtype.itemsize)
    resampler = fast.decoder.resampler
    computed = computed_frames(chunks_of(frames, 128, 32, resampler.reach, resampler.groups_per_chunk))
    name = f"SAME-{'L' if arch == 'medium' else 'S'}" if arch != "nano" else "nano SAME"
    what = f"{name} decode of {seconds:g} s, {options.dtype}"
    bar = BAR if arch == "small" and options.device == "cpu" and options.dtype == "bf16" else None
    note = f"fp32 takes {timings.median('exact'):.2f} s; {timings.spread('fast', 'exact')}"
    return [
        Figure(f"{what}, median of {options.repeats}", timings.median("fast"), "s"),
        Figure(f"{what} / fp32", timings.ratio("fast", "exact"), "×", bar, note=note),
        Figure(
            f"{what} / roofline floor",
            timings.median("fast") / floor,
            "×",
            note=f"floor {floor:.3f} s = {cost.flops / 1e9:.0f} Gflop at {rates.flops / 1e9:.0f} Gflop/s, each "
            f"frame once; the chunks of generation overlap and compute {computed / frames:.2f} × the frames",
        ),
        Figure(f"{what}: working memory over the weights", memory / 1e9, "GB"),
    ]
