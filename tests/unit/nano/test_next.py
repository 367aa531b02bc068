"""What the next nano is trained on: loops at any tempo, and latents of the trained autoencoder."""

import random
from pathlib import Path
from typing import Any

import grooves
import latents
import numpy as np
import parts
import pytest
import start
import tempo
import torch
import watch

from sa3train.core.files import write_json
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.parse import parse_model


def make_grooves(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Any]:
    """Make loops, with steady tones where FluidSynth would play."""
    monkeypatch.setattr(grooves, "render", lambda scores: [np.ones((2, round(s.seconds * 44_100))) for s in scores])
    return list(grooves.make_grooves(random.Random(0), np.random.default_rng(0), count))


def test_loops_are_whole_bars_at_stated_tempi(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_grooves(monkeypatch, 40)
    assert sum(bool(facts["sound"]) for facts, _, _ in made) == 20
    for facts, audio_CN, texts in made:
        bars = audio_CN.shape[1] / 44_100 * facts["bpm"] / 240
        assert bars == pytest.approx(round(bars), abs=1e-3)
        assert np.isfinite(audio_CN).all()
        assert np.abs(audio_CN).max() <= 1
        assert facts["sound"] or all(f"{facts['bpm']}" in text for text in texts)


@pytest.mark.parametrize("bpm", [109, 126, 137])
def test_tempo_is_heard(bpm: int) -> None:
    strokes = [
        (15 / bpm * place, key, 100) for place in range(32) for key in (36, 42) if place % (4 if key == 36 else 2) == 0
    ]
    audio_CN = grooves.synthesize(np.random.default_rng(0), 6.0, [stroke for stroke in strokes if stroke[0] < 5.5])
    heard = tempo.hear_tempo(torch.from_numpy(audio_CN).float())
    assert tempo.judge([heard, bpm / 2, 0.0, 1.2 * bpm], [float(bpm)] * 4) == {"tempo": 0.25, "octaves": 0.5}


@torch.no_grad()
def test_scaled_waveforms_are_undone_by_the_decoder() -> None:
    torch.manual_seed(0)
    model, audio_BCN = start.build_codec(), 0.1 * torch.randn(1, 2, 8 * start.FRAME)
    z_BCT = model.encode(audio_BCN)
    made_BCN = model.decode(z_BCT, noise=False)
    latents.scale_waves(model, 0.25)
    scaled_BCT = model.encode(audio_BCN)
    torch.testing.assert_close(scaled_BCT[:, : latents.WAVES], 0.25 * z_BCT[:, : latents.WAVES], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scaled_BCT[:, latents.WAVES :], z_BCT[:, latents.WAVES :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(scaled_BCT, noise=False), made_BCN, atol=1e-4, rtol=1e-3)


def test_a_corpus_is_encoded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of any kind, with or without a tempo word; those whose caption says the tempo start at their start."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "0.npy", np.zeros((2 * 65_536, 2), np.int16))
        plans: list[dict[str, Any]] = [{"sound": "", "bpm": 90}, {"sound": "wind", "tempo": "slow"}]
        texts = (["a beat, 90 BPM"], ["slow wind, 90 BPM"])
        entries = [
            {"first": 65_536 * i, "length": 65_536, "plan": plan, "captions": captions}
            for i, (plan, captions) in enumerate(zip(plans, texts, strict=True))
        ]
        write_json(tmp_path / split / "0.json", entries)
    torch.manual_seed(0)
    torch.save({"average": start.build_codec().state_dict()}, tmp_path / "codec.pt")
    monkeypatch.setattr("sys.argv", ["latents.py", str(tmp_path)])
    latents.main()
    encoded, silence_C = parts.load(tmp_path, "train"), parts.load_silence(tmp_path)
    assert [z.shape for z in encoded] == [(224, 16)] * 2
    for z in encoded:  # silent clips, but for the codec's noise
        torch.testing.assert_close(z[:, 5].float(), silence_C, atol=1e-2, rtol=1e-2)
    corpus = parts.Corpus(tmp_path, "train", parts.tokenizer_of(tmp_path), silence_C)
    ramp = torch.arange(16.0).repeat(224, 1) / 16
    corpus.latents = [ramp, ramp]
    cap = parts.Cap(8, 4, 2, 0.5, 1.0)
    batch = next(corpus.batches(0, (cap,)))
    torch.testing.assert_close(batch.latents_BCT[:, :, :8], ramp[:, :8].expand(4, -1, -1))
    torch.testing.assert_close(batch.latents_BCT[:, :, 8:], silence_C[:, None].expand(4, -1, 2))


def test_the_config_names_the_autoencoder_that_is_trained() -> None:
    codec = start.build_codec()
    parsed = parse_model(parts.build_config(224), "nano").autoencoder
    Autoencoder(parsed).load_state_dict(codec.state_dict())
    assert (parsed.patch_size, parsed.decoder.mask_noise) == (start.PATCH, start.MASK_NOISE)


@torch.no_grad()
def test_the_wide_model_begins_by_giving_noise_back() -> None:
    torch.manual_seed(0)
    model = parts.Nano(300, 224)
    noise_BCT = torch.randn(2, 224, 6)
    conditions = {"cross_attn_cond_BLD": torch.randn(2, 5, 128), "global_cond_BD": torch.randn(2, 128)}
    velocity_BCT = model.dit(noise_BCT, torch.ones(2), **conditions, local_add_cond_BCT=torch.zeros(2, 225, 6))
    torch.testing.assert_close(velocity_BCT, noise_BCT, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(watch.statistics({}, torch.randn(224, 12))).all()
