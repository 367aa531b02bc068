"""Every golden whole generation, both checkpoints, base and post-trained."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers.golden import GOLDEN, GoldenSet
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
