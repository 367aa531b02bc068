"""The autoencoder's decoder: bf16 against fp32, and against its roofline."""

import torch

from sa3train.bench.checkpoints import load_random_model
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import measure_peak_allocation, time_interleaved, use_threads
from sa3train.bench.roofline import count_same, measure_rates

TARGET = 0.55


def run(options: Options) -> list[Figure]:
    """Measure decoding of random latents, in chunks as generation does it.

    Args:
        options: `arch` (small: SAME-S, the default; medium: SAME-L), `seconds` (default 30).

    Returns:
        Time in bf16, against fp32 and the roofline, and memory.
    """
    arch, seconds = options.arch or "small", options.seconds or 30.0
    with use_threads(options.threads), torch.inference_mode():
        fast = load_random_model(arch, options, "autoencoder").autoencoder
        exact = load_random_model(arch, options, "autoencoder", dtype="fp32").autoencoder
        frames = -(-int(seconds * fast.sample_rate) // fast.downsampling_ratio)
        latents_1CT = torch.randn(1, fast.latent_channels, frames, generator=torch.Generator().manual_seed(0))
        latents_1CT = latents_1CT.to(options.device)
        rates = measure_rates(options)
        tasks = {"fast": lambda: fast.decode(latents_1CT), "exact": lambda: exact.decode(latents_1CT)}
        timings = time_interleaved(tasks, options.repeats, options.device)
        memory = measure_peak_allocation(lambda: fast.decode(latents_1CT), options.device)
    cost = count_same(fast.config, frames, decodes=True)
    roofline = cost.compute_seconds(rates)
    name = {"medium": "SAME-L", "small": "SAME-S"}.get(arch, f"{arch} SAME")
    what = f"{name} decode of {seconds:g} s, {options.dtype}"
    has_target = arch == "small" and options.device == "cpu" and options.dtype == "bf16"
    note = (
        f"roofline {roofline:.3f} s: {cost.flops / 1e9:.0f} Gflop, each frame once, at {rates.flops / 1e9:.0f} Gflop/s"
    )
    return [
        Figure(f"{what}, median of {options.repeats}", timings.median("fast"), "s"),
        timings.compare(f"{what} / fp32", "fast", "exact", TARGET if has_target else None),
        Figure(f"{what} / roofline", timings.median("fast") / roofline, "×", note=note),
        Figure(f"{what}: working memory besides the weights", memory / 1e9, "GB"),
    ]
