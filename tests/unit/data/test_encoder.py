"""Encoding a clip alone, in any company, or as recorded gives the same latents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.audio import noise
from helpers.golden import GOLDEN, GoldenSet
from sa3train.core.errors import MemoryShortageError
from sa3train.data.encode.encoder import Encoder
from sa3train.models.checkpoint import load_autoencoder

CASES = ["same.encode.8192", "same.encode.28672", "same.encode.49152"]


def clips(seconds: list[float]) -> list[torch.Tensor]:
    return [torch.from_numpy(noise(length, seed=number).T.copy()) for number, length in enumerate(seconds)]


@pytest.fixture(scope="module", params=["plain", "diff"])
def model(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(load_autoencoder(GOLDEN / request.param), request.param)


@pytest.mark.parametrize("case", CASES)
def test_golden(model: Encoder, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recordings were made without noise and several clips at once; ours also in the company of other clips."""
    monkeypatch.setattr("sa3train.models.resampler.draw_noise", lambda shape, like, generator: like.new_zeros(shape))
    recorded = GoldenSet(f"{model.name}/cases").tensors(case)
    audio = [*recorded["audio"].float(), *clips([0.4, 1.7])]
    latents = model.compute_latents(audio, [0] * len(audio))
    for mine, theirs in zip(latents, recorded["latents"].float(), strict=False):
        assert torch.allclose(mine, theirs[:, : mine.shape[1]], rtol=0, atol=1e-4)


def test_golden_noise(model: Encoder) -> None:
    recorded = GoldenSet(f"{model.name}/cases").tensors("same.encode.noisy")
    assert len(recorded["audio"]) == 1
    (mine,) = model.compute_latents(list(recorded["audio"].float()), [12])
    assert torch.allclose(mine, recorded["latents"][0].float(), rtol=0, atol=1e-4)


def test_company_changes_nothing(model: Encoder) -> None:
    audio = clips([0.1, 0.2, 0.5, 0.51, 0.9, 1.3, 13.0])
    seeds = list(range(len(audio)))
    together = model.compute_latents(audio, seeds)
    for clip, seed, latent_CT in zip(audio, seeds, together, strict=True):
        (alone,) = model.compute_latents([clip], [seed])
        assert latent_CT.shape == (64, -(-clip.shape[1] // 4096))
        assert torch.allclose(alone, latent_CT, rtol=0, atol=1e-4)
    assert np.array_equal(model.encode(audio[:1], [0])[0], together[0].half().numpy())


def test_long_clips_go_in_chunks_unless_told(model: Encoder) -> None:
    audio = clips([13.0])
    whole = Encoder(model.autoencoder, model.name, chunked=False).compute_latents(audio, [3])[0]
    pieces = model.compute_latents(audio, [3])[0]
    assert whole.shape == pieces.shape == (64, 140)
    with torch.inference_mode():
        direct = model.autoencoder.encode(audio[0][None], generator=torch.Generator().manual_seed(3), chunked=True)
    assert torch.equal(pieces, direct[0])


def test_values_that_cannot_be_stored_are_none(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (float("nan"), float("inf"), 7e4):
        monkeypatch.setattr(encoder, "compute_latents", lambda clips, seeds, v=value: [torch.full((4, 3), v)])
        assert encoder.encode(clips([0.2]), [0]) == [None]


def test_little_memory_halves_the_batch(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = clips([0.5, 0.6, 0.7, 0.8, 0.9])
    expected = encoder.compute_latents(audio, [0] * 5)
    encode_many, sizes = encoder.autoencoder.encode_many, []

    def small(several: list[torch.Tensor], most: int = 2) -> list[torch.Tensor]:
        sizes.append(len(several))
        if len(several) > most:
            raise torch.cuda.OutOfMemoryError
        return encode_many(several)

    monkeypatch.setattr(encoder.autoencoder, "encode_many", small)
    for one, two in zip(encoder.compute_latents(audio, [0] * 5), expected, strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-4)
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.setattr(encoder.autoencoder, "encode_many", lambda several: small(several, most=0))
    with pytest.raises(MemoryShortageError, match=r"while encoding a clip of 1 s.*Try: model\.dtype=bf16; or"):
        encoder.compute_latents(audio, [0] * 5)


def test_silence_is_that_of_the_middle(encoder: Encoder) -> None:
    silence_CT = encoder.encode_silence()
    assert silence_CT.shape == (64, 16)
    assert silence_CT.dtype == np.float16
    (whole,) = encoder.encode([torch.zeros(2, 4096 * 80)], [0])
    assert whole is not None
    assert np.allclose(whole[:, 32:48], silence_CT, atol=2e-3)


def test_what_shards_say_of_the_model(encoder: Encoder, tmp_path: Path) -> None:
    assert encoder.model["fingerprint"] == encoder.autoencoder.fingerprint()
    assert encoder.model["latent_channels"] == 64
    assert encoder.precision == "float32"
    assert Encoder(load_autoencoder(GOLDEN / "plain", dtype=torch.bfloat16), "x").precision == "bfloat16"


def test_half_precision_is_near(encoder: Encoder) -> None:
    audio = clips([0.5, 0.7])
    half = Encoder(load_autoencoder(GOLDEN / "plain", dtype=torch.bfloat16), "x").compute_latents(audio, [0, 1])
    for one, two in zip(half, encoder.compute_latents(audio, [0, 1]), strict=True):
        assert (one - two).norm() < 0.05 * two.norm()
