"""How far 16-bit generation strays from fp32: cosine similarity of the latents of the same prompts and seeds."""

import torch

from sa3train.bench.checkpoints import random_checkpoint
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import own_threads
from sa3train.inference import Generator

BAR = 0.99
PROMPTS = tuple(
    f"{mood} {sound}, {tempo} BPM"
    for mood, tempo in (("calm", 70), ("bright", 110), ("dark", 90), ("driving", 140))
    for sound in ("piano arpeggio", "drum loop", "synth pad", "bass line", "plucked strings")
)


def run(options: Options) -> list[Figure]:
    """Figures of `arch` (nano, the shipped weights; others random) for 20 prompts of `seconds` (5)."""
    arch, seconds = options.arch or "nano", options.seconds or 5.0
    source = arch if arch == "nano" else str(random_checkpoint(arch))
    with own_threads(options.threads):
        latents = {}
        for precision in ("fp32", options.dtype):
            generator = Generator.from_pretrained(source, options.device, precision)
            made = [
                generator.generate(
                    prompt, duration=seconds, steps=options.steps, seed=seed, return_latents=True
                ).latents
                for seed, prompt in enumerate(PROMPTS)
            ]
            latents[precision] = torch.cat([one.flatten(1) for one in made if one is not None])
    cosines = torch.cosine_similarity(latents["fp32"].double(), latents[options.dtype].double())
    what = f"{arch} generation {options.dtype} against fp32, same seed: latent cosine similarity"
    least = cosines.min().item()
    return [
        Figure(
            f"{what}, least of {len(PROMPTS)}",
            least,
            "",
            BAR if arch == "nano" else None,
            ">=",
            note=f"1 − {1 - least:.1e}",
        ),
        Figure(f"{what}, mean", cosines.mean().item(), ""),
    ]
