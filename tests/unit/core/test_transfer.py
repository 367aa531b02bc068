"""Numbers drawn ahead by a thread are those that would have been drawn, in the same order."""

import threading

import pytest
import torch
from torch import Tensor

from helpers.golden import GOLDEN
from sa3train.core import device
from sa3train.core.device import drawn_ahead, normal, to_device
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_autoencoder

SHAPES = [(3, 4), (5,), (2, 2, 7)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU itself has no time to draw ahead; here it does all the same."""
    monkeypatch.setattr(device, "pays_ahead", lambda device: True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_numbers_and_the_same_state_behind_them() -> None:
    plain, ahead = seeded(), seeded()
    expected = [normal(shape, plain, "cpu") for shape in SHAPES]
    with drawn_ahead(ahead, SHAPES, "cpu"):
        found = [normal(shape, ahead, "cpu") for shape in SHAPES]
        elsewhere = normal((3,), seeded(7), "cpu")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert torch.equal(elsewhere, normal((3,), seeded(7), "cpu")), "other generators go on by themselves"
    assert torch.equal(ahead.get_state(), plain.get_state())
    assert torch.equal(normal((2,), ahead, "cpu"), normal((2,), plain, "cpu"))


@pytest.mark.parametrize("asked", [[(4, 3)], [*SHAPES, (1,)]])
def test_what_was_not_announced_is_an_error_and_never_waits(asked: list[tuple[int, ...]]) -> None:
    generator = seeded()
    with pytest.raises(RuntimeError, match="mistake in sa3train"), drawn_ahead(generator, SHAPES, "cpu"):
        for shape in asked:
            normal(shape, generator, "cpu")


def test_leaving_early_ends_the_thread() -> None:
    with pytest.raises(KeyboardInterrupt), drawn_ahead(seeded(), SHAPES * 1000, "cpu"):
        raise KeyboardInterrupt
    assert not any(thread.name == "draws" for thread in threading.enumerate())
    assert not device._AHEAD


def test_one_thread_a_generator() -> None:
    generator = seeded()
    with drawn_ahead(generator, SHAPES, "cpu"):
        with pytest.raises(RuntimeError, match="already"), drawn_ahead(generator, SHAPES, "cpu"):
            pass
        assert torch.equal(normal(SHAPES[0], generator, "cpu"), normal(SHAPES[0], seeded(), "cpu"))


def test_no_more_waits_than_the_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRAWN_AHEAD", 2)
    ahead, plain = seeded(), seeded()
    with drawn_ahead(ahead, [(2,)] * 9, "cpu"):
        assert device._AHEAD[id(ahead)].maxsize == 2
        found = [normal((2,), ahead, "cpu") for _ in range(9)]
    assert torch.equal(torch.stack(found), torch.stack([normal((2,), plain, "cpu") for _ in range(9)]))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["plain", "diff"])
def test_decoders_announce_what_they_draw(name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder, drawn = load_autoencoder(GOLDEN / name), []
    from sa3train.models import resampler

    def noted(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
        drawn.append(tuple(shape))
        return normal(shape, generator, device)

    monkeypatch.setattr(resampler, "normal", noted)
    latents_BCT = torch.randn(2, autoencoder.latent_channels, 140)
    autoencoder.decode(latents_BCT, generator=seeded(), chunked=chunked)
    assert autoencoder.draws(2, 140, chunked) == drawn
    assert drawn


@pytest.mark.parametrize("sampler", ["pingpong", "euler"])
def test_a_generation_is_the_same(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gen, audio = Generator.from_pretrained("nano", device="cpu", precision="fp32"), []
    for pays in (True, False):
        monkeypatch.setattr(device, "pays_ahead", lambda device, pays=pays: pays)
        out = gen.generate("koto", duration=[1.0, 2.0], steps=3, cfg_scale=1.0, sampler_type=sampler, seed=3)
        audio.append(out.audio)
    assert all(torch.equal(one, other) for one, other in zip(*audio, strict=True))


def test_to_the_cpu_nothing_is_pinned_or_copied() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, "cpu") is tensor
