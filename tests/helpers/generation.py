"""Generations in tests."""

from typing import Any

from torch import Tensor

from sa3train.inference import Generator


def generate_latents(generator: Generator, *prompt: str, **settings: Any) -> Tensor:
    """Generate and return the latents (B, C, T)."""
    latents = generator.generate(*prompt, return_latents=True, **settings).latents
    assert latents is not None
    return latents


def inpaint(audio: Any, start: Any, end: Any) -> dict[str, Any]:
    """Settings that regenerate regions of audio."""
    return {"inpaint_audio": audio, "inpaint_mask_start_seconds": start, "inpaint_mask_end_seconds": end}
