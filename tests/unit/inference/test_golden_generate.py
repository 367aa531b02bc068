"""Every golden whole generation, both checkpoints, base and post-trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.golden import GOLDEN, PACKED, GoldenSet
from sa3train.inference.generator import Generator

ROOT = GOLDEN
SETS = {which: GoldenSet(f"{which}/cases") for which in ("plain", "diff")}
WAV = "generate.wav"
CASES = [(which, case) for which, golden in SETS.items() for case in golden.names("generate.") if case != WAV]
TOLERANCE = 1e-3


@pytest.mark.parametrize(("which", "case"), CASES)
def test_generation(make: Callable[..., Generator], which: str, case: str) -> None:
    golden = SETS[which]
    settings: dict[str, Any] = golden.settings(case)
    settings.pop("note", None)
    real_frames = settings.pop("real_frames", None)
    generator = make(which, settings.pop("objective"))
    for role in ("init_audio", "inpaint_audio"):
        if role in settings:
            assert settings[role] == f"{WAV}/audio"
            settings[role] = (golden.tensors(WAV)["audio"], 44100)
    result = generator.generate(**settings, return_latents=True)
    expected = golden.tensors(case)
    if "audio" in expected:
        assert len(result.audio) == len(expected["audio"])
        for audio, wanted in zip(result.audio, expected["audio"], strict=True):
            assert audio.shape == wanted.shape
            assert (audio - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
        return
    assert result.latents is not None
    assert result.latents.shape == expected["latents"].shape
    for latents, wanted, real in zip(result.latents, expected["latents"], real_frames, strict=True):
        difference = (latents - wanted)[:, :real].abs().max()
        assert difference <= TOLERANCE * wanted[:, :real].abs().max()


def test_audio_of_another_rate(make: Callable[..., Generator]) -> None:
    """Mono noise at 32 kHz, up to its Nyquist frequency: what the resampling filter changes most."""
    expected = torch.from_numpy(np.load(PACKED / "mono_32khz.npz")["latents"])
    noise = (0.3 * torch.randn(1, 48000, generator=torch.Generator().manual_seed(8))).clamp(-1, 1)
    settings: dict[str, Any] = {"duration": 1.97, "steps": 4, "cfg_scale": 7.0, "seed": 5, "init_noise_level": 0.5}
    latents = make().generate("koto", init_audio=(32000, noise), **settings, return_latents=True).latents
    assert latents is not None
    assert (latents - expected).abs().max() <= 1e-4 * expected.abs().max()
