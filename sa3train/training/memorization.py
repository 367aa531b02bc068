"""Whether a finished adapter copies its training clips, and whether it keeps the energy of the base's generations.

Measured in latent space: distances are between windows of latents (1.5 s), root mean square, each channel in units of
its spread over the training clips. Shapes: N and M windows, C channels, T frames, K = C × window.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.core.files import write_json
from sa3train.core.log import get_logger, track_progress
from sa3train.inference import Generator
from sa3train.reports.run_files import COPY_THRESHOLD, MEMORIZATION_FILE
from sa3train.training.batch import ClipBatch
from sa3train.training.settings import DemoSettings

_logger = get_logger(__name__)

WINDOW, STRIDE = 16, 4
MAX_SPREAD_CHANGE = 0.25
"""Relative change of the latents' spread, against the base, above which few-step generation counts as damaged."""


@dataclass(frozen=True)
class Memorization:
    """Mean nearest-neighbor distances, and the closest training clip of each generated clip.

    Attributes:
        generated_to_training: From windows of generated clips to training clips.
        generated_to_heldout: From generated clips to held-out clips.
        heldout_to_training: From held-out clips to training clips.
        nearest: Per generated clip: clip, training_clip, distance.
    """

    generated_to_training: float
    generated_to_heldout: float
    heldout_to_training: float
    nearest: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """Generated-to-training over held-out-to-training distance: about 1 for new music, towards 0 for copies."""
        return self.generated_to_training / max(self.heldout_to_training, 1e-9)


def extract_windows(latents: Sequence[Tensor], size: int = WINDOW, stride: int = STRIDE) -> tuple[Tensor, Tensor]:
    """Extract every window of some latents; a clip shorter than a window is repeated to its length.

    Args:
        latents: (C, T) each.
        size: Frames per window.
        stride: Frames between windows.

    Returns:
        The windows (N, K), and the number of the clip that each is from, (N,).
    """
    rows, owners = [], []
    for number, latent_CT in enumerate(latents):
        times = -(-size // latent_CT.shape[1])
        filled_CT = latent_CT.float().repeat(1, times)[:, : max(size, latent_CT.shape[1])]
        unfolded = filled_CT.unfold(1, size, stride).permute(1, 0, 2).flatten(1)
        rows.append(unfolded)
        owners.append(torch.full((len(unfolded),), number))
    return torch.cat(rows), torch.cat(owners)


def find_nearest(queries_NK: Tensor, keys_MK: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Find the nearest key of each query.

    Args:
        queries_NK: Windows.
        keys_MK: Windows to search.
        chunk: Queries compared at a time.

    Returns:
        Root mean square distances (N,), and the numbers of the keys (N,).
    """
    distances, numbers = [], []
    for start in range(0, len(queries_NK), chunk):
        found = torch.cdist(queries_NK[start : start + chunk], keys_MK).min(dim=1)
        distances.append(found.values)
        numbers.append(found.indices)
    return torch.cat(distances) / queries_NK.shape[1] ** 0.5, torch.cat(numbers)


def measure_memorization(
    generated: Sequence[Tensor], training: Sequence[Tensor], heldout: Sequence[Tensor], names: Sequence[str]
) -> Memorization:
    """Measure how close generated clips come to training clips.

    Args:
        generated: Latents (C, T) of generated clips.
        training: Latents of training clips.
        heldout: Latents of held-out clips.
        names: Names of the training clips.

    Returns:
        Distances and closest clips.
    """
    spread_C1 = torch.cat([latent_CT.float() for latent_CT in training], dim=1).std(dim=1, keepdim=True)
    scaled = [
        [latent_CT.float() / spread_C1.clamp(min=1e-6) for latent_CT in clips]
        for clips in (generated, training, heldout)
    ]
    (made_NK, made_from), (train_NK, train_from), (held_NK, _) = (extract_windows(clips) for clips in scaled)
    to_training_N, keys_N = find_nearest(made_NK, train_NK)
    closest = []
    for number in range(len(generated)):
        own = (made_from == number).nonzero()[:, 0]
        best = own[to_training_N[own].argmin()]
        name = names[int(train_from[keys_N[best]])]
        closest.append({"clip": number, "training_clip": name, "distance": float(to_training_N[best])})
    return Memorization(
        float(to_training_N.mean()),
        float(find_nearest(made_NK, held_NK)[0].mean()),
        float(find_nearest(held_NK, train_NK)[0].mean()),
        closest,
    )


def measure_spread(latents: Sequence[Tensor]) -> float:
    """Measure the spread of latents.

    Args:
        latents: (C, T) each.

    Returns:
        Root mean square over channels of their standard deviation in time.
    """
    return float(torch.stack([latent_CT.float().var(dim=1).mean() for latent_CT in latents]).mean().sqrt())


def generate_latents(
    generator: Generator, prompts: Sequence[str], seconds: float, seed: int, **sampling: Any
) -> list[Tensor]:
    """Generate one clip per prompt.

    Args:
        generator: The generator.
        prompts: The prompts.
        seconds: Length of each clip.
        seed: Seed of the first.
        **sampling: Further arguments of `Generator.generate`.

    Returns:
        Latents (C, T), cut to `seconds`.
    """
    found = []
    frames = max(1, int(seconds * generator.facts.sample_rate / generator.model.downsampling_ratio))
    for number, prompt in enumerate(track_progress(prompts, "generating")):
        output = generator.generate(
            prompt=prompt, duration=seconds, seed=seed + number, return_latents=True, **sampling
        )
        assert output.latents is not None
        found.append(output.latents[0, :, :frames])
    return found


def evaluate_memorization(
    run_dir: Path,
    source: str,
    adapter: Adapter,
    training: Sequence[ClipBatch],
    heldout: Sequence[ClipBatch],
    settings: DemoSettings,
    device: torch.device | str,
) -> dict[str, Any]:
    """Generate from training prompts with base and adapter, and measure memorization and energy.

    Args:
        run_dir: Run folder in which `memorization.json` is written.
        source: Name or folder of the model.
        adapter: The adapter.
        training: All training clips, batches of one.
        heldout: All held-out clips; without them there is no memorization score.
        settings: Number and length of the clips, seed and sampling.
        device: Where to generate.

    Returns:
        The content of `memorization.json`.
    """
    prompts = [training[number % len(training)].prompts[0] for number in range(settings.memorization_clips)]
    with torch.random.fork_rng():
        precision = "bf16" if torch.device(device).type == "cuda" else "fp32"
        generator = Generator.from_pretrained(source, device=device, precision=precision)
        seconds = min(settings.duration, generator.facts.longest)
        sampling = {"steps": settings.steps, "cfg_scale": settings.cfg_scale}
        base = generate_latents(generator, prompts, seconds, settings.seed, **sampling)
        generator.load_adapter(adapter)
        generated = generate_latents(generator, prompts, seconds, settings.seed, **sampling)
        del generator
    train_latents = [clip.data_SCF[0] for clip in training]
    spread = {name: measure_spread(latents) for name, latents in
              (("data", train_latents), ("base", base), ("adapter", generated))}  # fmt: skip
    found: dict[str, Any] = {"clips": len(prompts), "seconds": seconds, "spread": spread}
    if abs(spread["adapter"] / max(spread["base"], 1e-9) - 1) > MAX_SPREAD_CHANGE:
        _logger.warning(
            "the adapter changes the energy of generations (spread of latents %.3f with it, %.3f without). Listen to "
            "them; train for fewer steps or at a lower rate, or lower the adapter's strength.",
            spread["adapter"], spread["base"],
        )  # fmt: skip
    if heldout:
        heldout_latents, names = [clip.data_SCF[0] for clip in heldout], [clip.keys[0] for clip in training]
        measured = measure_memorization(generated, train_latents, heldout_latents, names)
        found["memorization"] = {"score": measured.score, **asdict(measured)}
        if measured.score < COPY_THRESHOLD:
            _logger.warning("generations are closer to training clips than held-out clips are: they may be copies")
    else:
        _logger.warning("no memorization score: nothing is held out. Encode with split=0.1.")
    write_json(run_dir / MEMORIZATION_FILE, found)
    return found
