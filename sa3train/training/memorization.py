"""Whether a finished adapter copies its training clips, and whether it keeps the energy of the base's generations.

Measured in latent space (`sa3train.evaluation.distances`). Shapes: C channels, T frames.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.core.files import write_json
from sa3train.core.log import get_logger, report_stage, track_progress
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.evaluation.distances import ReferenceClips, measure_spread
from sa3train.inference import Generator
from sa3train.reports.run_files import MEMORIZATION_FILE
from sa3train.reports.verdict import COPIES, COPIES_ADVICE, judge_copying
from sa3train.training.settings import DemoSettings

_logger = get_logger(__name__)

MAX_SPREAD_CHANGE = 0.25
"""Relative change of the latents' spread, against the base, above which few-step generation counts as damaged."""


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


@report_stage("looking for memorized clips")
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
        reference = ReferenceClips(heldout_latents, train_latents, names)
        measured, base_score = reference.measure_memorization(generated), reference.measure_memorization(base).score
        scores = {"score": measured.score, "base_score": base_score, "heldout_clips": len(heldout)}
        found["memorization"] = scores | asdict(measured)
        if judge_copying(measured.score, base_score, min(len(prompts), len(heldout))) == COPIES:
            _logger.warning(COPIES_ADVICE)
    else:
        _logger.warning("no memorization score: nothing is held out. Encode with split=0.1.")
    write_json(run_dir / MEMORIZATION_FILE, found)
    return found
