"""Accuracy of 16-bit and 8-bit generation: cosine similarity with fp32 latents of the same prompts and seeds."""

import torch

from sa3train.bench.checkpoints import make_random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import use_threads
from sa3train.inference import Generator
from sa3train.models.int8_linear import find_int8_fault

TARGET = 0.99
PROMPTS = tuple(
    f"{mood} {sound}, {tempo} BPM"
    for mood, tempo in (("calm", 70), ("bright", 110), ("dark", 90), ("driving", 140))
    for sound in ("piano arpeggio", "drum loop", "synth pad", "bass line", "plucked strings")
)


def run(options: Options) -> list[Figure]:
    """Compare latents of 20 prompts in `dtype`, and on a CPU in int8, with those in fp32.

    Args:
        options: `arch` (default nano with its shipped weights; others have random ones), `seconds` (default 5).

    Returns:
        Lowest and mean cosine similarity of each.
    """
    arch, seconds = options.arch or "nano", options.seconds or 5.0
    source = arch if arch == "nano" else str(make_random_checkpoint(arch))
    latents: dict[str, torch.Tensor] = {}
    compared: tuple[str, ...] = (options.dtype,)
    if options.device == "cpu" and not find_int8_fault():
        compared = (options.dtype, "int8")
    with use_threads(options.threads):
        for precision in ("fp32", *compared):
            generator = Generator.from_pretrained(source, options.device, precision)
            outputs = [
                generator.generate(prompt, duration=seconds, steps=options.steps, seed=seed, return_latents=True)
                for seed, prompt in enumerate(PROMPTS)
            ]
            latents[precision] = torch.cat([one.latents.flatten(1) for one in outputs if one.latents is not None])
    figures, target = [], TARGET if arch == "nano" else None
    for precision in compared:
        cosines = torch.cosine_similarity(latents["fp32"].double(), latents[precision].double())
        lowest = cosines.min().item()
        what = f"{arch} generation {precision} against fp32, same seed: latent cosine similarity"
        figures += [
            Figure(f"{what}, lowest of {len(PROMPTS)}", lowest, "", target, ">=", note=f"1 − {1 - lowest:.1e}"),
            Figure(f"{what}, mean", cosines.mean().item(), ""),
        ]
    return figures
