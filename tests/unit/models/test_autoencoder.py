"""SAME beyond the recorded cases: many clips at once, chunk geometry, memory, noise, precision."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.golden import GOLDEN
from sa3train.core.errors import ConfigError
from sa3train.models.autoencoder import Autoencoder, list_chunk_spans, patchify, plan_chunks, unpatchify
from sa3train.models.checkpoint import load_autoencoder

ROOT = GOLDEN
SECONDS_60 = 646  # latent frames


@pytest.fixture(scope="module", params=["plain", "diff"])
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    return load_autoencoder(ROOT / request.param)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_patching_is_channel_major_and_undone() -> None:
    audio = draw(2, 2, 768)
    patches = patchify(audio, 256)
    assert torch.equal(patches[1, 2, 256 + 7], audio[1, 1, 2 * 256 + 7])
    assert torch.equal(unpatchify(patches, 2), audio)


def test_many_clips_equal_each_alone(autoencoder: Autoencoder) -> None:
    clips = [draw(2, samples) for samples in (4096 * 5, 4096 * 2 + 1, 300, 4096 * 9 - 5)]
    together = autoencoder.encode_many(clips, noise=False)
    for clip, found in zip(clips, together, strict=True):
        alone = autoencoder.encode(clip[None], noise=False)[0]
        assert found.shape[-1] == autoencoder.count_frames(clip.shape[-1])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_batch_equals_items(autoencoder: Autoencoder) -> None:
    audio = draw(3, 2, 4096 * 6)
    items = torch.cat([autoencoder.encode(item[None], noise=False) for item in audio])
    torch.testing.assert_close(autoencoder.encode(audio, noise=False), items, atol=1e-5, rtol=0)


def test_any_length_is_padded_with_silence(autoencoder: Autoencoder) -> None:
    unit = 8192 if autoencoder.config.encoder.chunk_size else 4096
    audio = draw(1, 2, 5000)
    padded = torch.nn.functional.pad(audio, (0, -5000 % unit))
    assert torch.equal(autoencoder.encode(audio, noise=False), autoencoder.encode(padded, noise=False))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_window_kind_is_linear_in_length() -> None:
    """60 s are 10 982 tokens: an L x L mask alone would hold 120 million entries."""
    window = load_autoencoder(ROOT / "diff")
    largest = {}
    with torch.inference_mode():
        for frames in (SECONDS_60 // 2, SECONDS_60):
            with LargestTensor() as watch:
                audio = window.decode(draw(1, 64, frames), chunked=False)
            assert audio.shape == (1, 2, 4096 * frames)
            largest[frames] = watch.numel
    tokens = SECONDS_60 * 17
    assert largest[SECONDS_60] <= 2.1 * largest[SECONDS_60 // 2]
    assert largest[SECONDS_60] < tokens**2 / 10
    with LargestTensor() as watch, torch.inference_mode():
        window.encode(draw(1, 2, 4096 * SECONDS_60), chunked=False)
    assert watch.numel < tokens**2 / 10


@pytest.mark.parametrize(("frames", "size", "overlap"), [(22, 8, 2), (128, 128, 32), (129, 128, 32), (500, 128, 31)])
def test_chunks_cover_everything(frames: int, size: int, overlap: int) -> None:
    spans = list_chunk_spans(frames, size, overlap)
    assert spans[0].start == 0
    assert spans[-1].stop == frames
    assert all(len(span) == min(size, frames) for span in spans)
    assert all(later.start <= earlier.stop - overlap for earlier, later in itertools.pairwise(spans))


def test_chunked_is_close_to_whole_away_from_edges(autoencoder: Autoencoder) -> None:
    z = draw(1, 64, 50)
    whole = autoencoder.decode(z, noise=False, chunked=False)
    chunked = autoencoder.decode(z, noise=False, chunked=True, chunk_size=20, overlap=12)
    assert chunked.shape == whole.shape
    torch.testing.assert_close(chunked, whole, atol=1e-3, rtol=0)
    assert torch.equal(autoencoder.decode(z, noise=False, chunked=True, chunk_size=50), whole)
    odd = autoencoder.decode(draw(1, 64, 51), noise=False, chunked=True, chunk_size=20, overlap=12)
    assert odd.shape[-1] == 51 * 4096
    latents = autoencoder.encode(draw(1, 2, 4096 * 31 - 7), noise=False, chunked=True, chunk_size=20, overlap=12)
    assert latents.shape[-1] == 31


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "size", "overlap"), [(75, 40, 28), (77, 40, 28), (70, 33, 31)])
def test_what_a_chunk_drops_is_not_computed(
    autoencoder: Autoencoder, frames: int, size: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result, random numbers included, is that of chunks computed whole."""

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        chunks = {"chunked": True, "chunk_size": size, "overlap": overlap}
        audio = autoencoder.decode(draw(2, 64, frames), generator=torch.Generator().manual_seed(1), **chunks)
        latents = autoencoder.encode(audio, generator=torch.Generator().manual_seed(2), **chunks)
        return audio, latents

    trimmed = run()
    resampler = type(autoencoder.decoder.resampler)
    reach = autoencoder.decoder.resampler.reach
    unit = autoencoder.decoder.resampler.groups_per_chunk
    assert all(chunk.computed != chunk.span for chunk in plan_chunks(frames, size, overlap, reach, unit))
    monkeypatch.setattr(resampler, "reach", frames)
    assert all(chunk.computed == chunk.span for chunk in plan_chunks(frames, size, overlap, frames, unit))
    for found, whole in zip(trimmed, run(), strict=True):
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_noise_follows_the_generator(autoencoder: Autoencoder) -> None:
    z = draw(1, 64, 6)
    first, second, other = (autoencoder.decode(z, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(autoencoder.decode(z, noise=False), autoencoder.decode(z, noise=False))


def test_bf16_takes_and_gives_fp32() -> None:
    exact, half = (load_autoencoder(ROOT / "plain", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    audio = draw(1, 2, 8192)
    z, z_half = exact.encode(audio), half.encode(audio)
    assert z_half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(z.flatten(), z_half.flatten(), dim=0) > 0.99


def test_what_does_not_fit_is_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="must have 2 channels"):
        autoencoder.encode(draw(1, 1, 8192))
    with pytest.raises(ValueError, match="must have 64 channels"):
        autoencoder.decode(draw(64, 8))
    with pytest.raises(ValueError, match="some length"):
        autoencoder.encode(torch.zeros(1, 2, 0))
    with pytest.raises(ConfigError, match="overlap"):
        autoencoder.decode(draw(1, 64, 50), chunked=True, chunk_size=8, overlap=8)


def test_gradients_reach_every_weight(autoencoder: Autoencoder) -> None:
    autoencoder.requires_grad_(True)
    audio = draw(1, 2, 16384)
    autoencoder.decode(autoencoder.encode(audio)).square().mean().backward()
    without = [name for name, weight in autoencoder.named_parameters() if weight.grad is None and weight.numel()]
    autoencoder.requires_grad_(False).zero_grad()
    assert without == []
