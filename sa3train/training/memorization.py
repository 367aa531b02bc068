"""What finished adapters generate, measured in latent space: do they copy their training clips, do they keep their
energy?

Distances are between windows of latents (1.5 s): root mean square difference, each channel in units of its spread over
the training clips. Shapes: N windows, C channels, T frames, K = C × window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.core.files import write_json
from sa3train.core.log import get_logger, progress
from sa3train.inference import Generator
from sa3train.reports.run_files import COPIED, GENERATED
from sa3train.training.callbacks.validation import FixedItem

_logger = get_logger(__name__)

WINDOW, STRIDE = 16, 4
ENERGY = 0.25
"""Relative change of the latents' spread, against the base, above which few-step generation counts as harmed."""


@dataclass(frozen=True)
class Memorisation:
    """Nearest-neighbour distances, means over windows, and per generated clip the training clip it comes closest to.

    `score` is generated-to-training over heldout-to-training: about 1 or above for new music, towards 0 for copies.
    """

    generated_to_training: float
    generated_to_heldout: float
    heldout_to_training: float
    nearest: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """1: as far from the training clips as unseen real clips are."""
        return self.generated_to_training / max(self.heldout_to_training, 1e-9)


def windows(latents: Sequence[Tensor], size: int = WINDOW, stride: int = STRIDE) -> tuple[Tensor, Tensor]:
    """Every window of each (C, T) latent, (N, K), and the number of the clip each is from, (N,).

    A clip shorter than a window is repeated to its length.
    """
    rows, owners = [], []
    for number, latent_CT in enumerate(latents):
        times = -(-size // latent_CT.shape[1])
        filled_CT = latent_CT.float().repeat(1, times)[:, : max(size, latent_CT.shape[1])]
        unfolded = filled_CT.unfold(1, size, stride).permute(1, 0, 2).flatten(1)
        rows.append(unfolded)
        owners.append(torch.full((len(unfolded),), number))
    return torch.cat(rows), torch.cat(owners)


def nearest(queries_NK: Tensor, keys_MK: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """For each query its root mean square distance to the nearest key, and that key's number: (N,), (N,)."""
    distances, numbers = [], []
    for start in range(0, len(queries_NK), chunk):
        found = torch.cdist(queries_NK[start : start + chunk], keys_MK).min(dim=1)
        distances.append(found.values)
        numbers.append(found.indices)
    return torch.cat(distances) / queries_NK.shape[1] ** 0.5, torch.cat(numbers)


def memorisation(
    generated: Sequence[Tensor], training: Sequence[Tensor], heldout: Sequence[Tensor], names: Sequence[str]
) -> Memorisation:
    """Compare (C, T) latents of generated, training and held-out clips; `names` are the training clips'."""
    spread_C1 = torch.cat([latent_CT.float() for latent_CT in training], dim=1).std(dim=1, keepdim=True)
    scaled = [
        [latent_CT.float() / spread_C1.clamp(min=1e-6) for latent_CT in clips]
        for clips in (generated, training, heldout)
    ]
    (made_NK, made_from), (train_NK, train_from), (held_NK, _) = (windows(clips) for clips in scaled)
    to_training_N, keys_N = nearest(made_NK, train_NK)
    closest = []
    for number in range(len(generated)):
        own = (made_from == number).nonzero()[:, 0]
        best = own[to_training_N[own].argmin()]
        name = names[int(train_from[keys_N[best]])]
        closest.append({"clip": number, "training_clip": name, "distance": float(to_training_N[best])})
    return Memorisation(
        float(to_training_N.mean()),
        float(nearest(made_NK, held_NK)[0].mean()),
        float(nearest(held_NK, train_NK)[0].mean()),
        closest,
    )


def spread(latents: Sequence[Tensor]) -> float:
    """Root mean square over channels of the latents' standard deviation in time."""
    return float(torch.stack([latent_CT.float().var(dim=1).mean() for latent_CT in latents]).mean().sqrt())


def generate_latents(
    generator: Generator, prompts: Sequence[str], seconds: float, seed: int, **sampling: Any
) -> list[Tensor]:
    """One latent (C, T) per prompt, cut to `seconds`; `sampling` is `Generator.generate`'s."""
    found = []
    frames = max(1, int(seconds * generator.facts.sample_rate / generator.model.downsampling_ratio))
    for number, prompt in enumerate(progress(prompts, "generating")):
        output = generator.generate(
            prompt=prompt, duration=seconds, seed=seed + number, return_latents=True, **sampling
        )
        assert output.latents is not None
        found.append(output.latents[0, :, :frames])
    return found


def examine(
    run_dir: Path,
    source: str,
    adapter: Adapter,
    training: Sequence[FixedItem],
    heldout: Sequence[FixedItem],
    *,
    clips: int,
    seconds: float,
    seed: int,
    device: torch.device | str,
    steps: int | None = None,
    cfg_scale: float | None = None,
) -> dict[str, Any]:
    """Generate from training prompts with base and adapter, and write `generated.json`: memorisation and energy.

    Without held-out clips the memorisation score cannot be had, which is said aloud.
    """
    prompts = [training[number % len(training)].clip.prompts[0] for number in range(clips)]
    with torch.random.fork_rng():
        precision = "bf16" if torch.device(device).type == "cuda" else "fp32"
        generator = Generator.from_pretrained(source, device=device, precision=precision)
        seconds = min(seconds, generator.facts.longest)
        sampling = {"steps": steps, "cfg_scale": cfg_scale}
        base = generate_latents(generator, prompts, seconds, seed, **sampling)
        generator.load_adapter(adapter)
        made = generate_latents(generator, prompts, seconds, seed, **sampling)
        del generator
    train_latents = [item.clip.data_SCF[0] for item in training]
    spreads = {"data": spread(train_latents), "base": spread(base), "adapter": spread(made)}
    found: dict[str, Any] = {"clips": clips, "seconds": seconds, "spread": spreads}
    if abs(spreads["adapter"] / max(spreads["base"], 1e-9) - 1) > ENERGY:
        _logger.warning(
            "generations have changed their energy (spread of latents %.3f with the adapter, %.3f without): listen to "
            "them, train for fewer steps or at a lower rate, or play the adapter at less strength",
            spreads["adapter"], spreads["base"],
        )  # fmt: skip
    if heldout:
        score = memorisation(
            made, train_latents, [item.clip.data_SCF[0] for item in heldout], [item.key for item in training]
        )
        found["memorisation"] = {
            "score": score.score,
            "generated_to_training": score.generated_to_training,
            "generated_to_heldout": score.generated_to_heldout,
            "heldout_to_training": score.heldout_to_training,
            "nearest": score.nearest,
        }
        if score.score < COPIED:
            _logger.warning("generations come closer to training clips than unseen clips do: they may be copies")
    else:
        _logger.warning("no memorisation score: nothing is held out. Encode with split=0.1.")
    write_json(run_dir / GENERATED, found)
    return found
