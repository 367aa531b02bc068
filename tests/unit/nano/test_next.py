"""What the next nano is trained on: loops at any tempo, and latents of the trained autoencoder."""

import random
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


def test_captions_of_grooves_say_what_the_facts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grooves, "GROOVES", {name: {36: (0,)} for name in ("click track", "electronic beat")})
    made = [(facts, texts) for facts, _, texts in make_grooves(monkeypatch, 80) if not facts["sound"]]
    assert sum(f"{kit} click track" in texts[2] for _, texts in made for kit in grooves.KITS.values()) > 1
    for facts, texts in made:
        assert facts["type"] == ("SFX" if "click track" in texts[2] else "Drums")
        assert texts[0].startswith(f"TrackType: {facts['type']}, ")
        assert not re.search(r"\bA [aeiou8]|electronic electronic", " ".join(texts))


@pytest.mark.parametrize("bpm", [109, 126, 137])
def test_tempo_is_heard(bpm: int) -> None:
    strokes = [
        (15 / bpm * place, key, 100) for place in range(32) for key in (36, 42) if place % (4 if key == 36 else 2) == 0
    ]
    audio_CN = grooves.synthesize(np.random.default_rng(0), 6.0, [stroke for stroke in strokes if stroke[0] < 5.5])
    heard = tempo.hear_tempo(torch.from_numpy(audio_CN).float())
    assert tempo.judge([heard, bpm / 2, 0.0, 1.2 * bpm], [float(bpm)] * 4) == {"tempo": 0.25, "octaves": 0.5}


def write_chunk(folder: Path, number: int, clips: list[tuple[dict[str, Any], int, str]]) -> None:
    """Write a chunk of silent clips: facts, samples, caption."""
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{number}.npy", np.zeros((sum(length for _, length, _ in clips), 2), np.int16))
    entries = [{"first": 0, "length": length, "plan": plan, "captions": [text]} for plan, length, text in clips]
    write_json(folder / f"{number}.json", entries)


def test_no_loop_is_heard_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole loop's length tells its tempo."""
    clips = [({"bpm": 120}, round(seconds * 44_100), "House beat") for seconds in (4.0, 6.0, 8.0)]
    write_chunk(tmp_path / "val", 0, clips)
    heard = Mock(return_value=120.0)
    monkeypatch.setattr(tempo, "hear_tempo", heard)
    assert tempo.hear_real(tmp_path) == {"tempo": 1.0, "octaves": 1.0}
    assert [call.args[0].shape[1] for call in heard.call_args_list] == [6 * 44_100]


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


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose chunks have number 3, encoded: clips of any kind, with or without a tempo word."""
    beat = {"sound": "", "bpm": 90}, 65_536, "a beat, 90 BPM"
    drums = {"sound": "house drums", "tempo": "slow"}, 65_536, "Loud house drums playing a loop at 72 bpm."
    for split in ("train", "val"):
        write_chunk(tmp_path / split, 3, [beat, drums])
    torch.manual_seed(0)
    torch.save({"average": start.build_codec().state_dict()}, tmp_path / "codec.pt")
    encode(tmp_path, monkeypatch)
    return tmp_path


def encode(work: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Run latents.py."""
    monkeypatch.setattr("sys.argv", ["latents.py", str(work), *options])
    latents.main()


def test_a_corpus_is_encoded_and_read(encoded: Path) -> None:
    """Clips whose caption says the tempo start at their start."""
    made, silence_C = parts.load(encoded, "train"), parts.load_silence(encoded)
    assert [z.shape for z in made] == [(224, 16)] * 2
    for z in made:  # silent clips, but for the codec's noise
        torch.testing.assert_close(z[:, 5].float(), silence_C, atol=1e-2, rtol=1e-2)
    corpus = parts.Corpus(encoded, "train", parts.tokenizer_of(encoded), silence_C)
    ramp = torch.arange(16.0).repeat(224, 1) / 16
    corpus.latents = [ramp, ramp]
    batch = next(corpus.batches(0, (parts.Cap(8, 32, 2, 0.5, 1.0),)))
    torch.testing.assert_close(batch.latents_BCT[:, :, :8], ramp[:, :8].expand(32, -1, -1))
    torch.testing.assert_close(batch.latents_BCT[:, :, 8:], silence_C[:, None].expand(32, -1, 2))


def test_latents_are_of_one_codec_and_share(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'share': 0\.6.*delete"):
        encode(encoded, monkeypatch, "--share", "0.3")
    weights = {name: 2 * tensor for name, tensor in start.build_codec().state_dict().items()}
    torch.save({"average": weights}, encoded / "codec-cool.pt")
    with pytest.raises(ValueError, match="delete"):
        latents.load_codec(encoded)


def test_chunks_keep_their_numbers(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that comes before the encoded ones must not lend them its captions."""
    write_chunk(encoded / "train", 1, [({"sound": ""}, 8192, "a click")])
    with pytest.raises(FileNotFoundError, match=r"\[3\] of train"):
        parts.load(encoded, "train")
    encode(encoded, monkeypatch)
    assert [z.shape[1] for z in parts.load(encoded, "train")] == [2, 16, 16]


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
