"""How far an inpainted region reaches into what is kept.

The decoder sees only so far, so audio outside a region depends on the kept latents alone but for a margin:

- chunked kind (SAME-S): chunks of two frames, the second half of its layers in chunks moved by one frame, so a frame is
  decoded from at most two frames to each side, and the last convolution looks one patch (256 samples) on: 3 frames;
- window kind (SAME-L): each layer sees one frame (17 tokens) to each side, so as many frames as the decoder has layers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.audio import noise, tone
from helpers.generation import generate_latents, inpaint
from sa3train.audio.edit import FADE, fit
from sa3train.inference import Generator

SECONDS, START, END = 3.0, 1.0, 2.0
SOURCE = torch.from_numpy((tone(SECONDS) + noise(SECONDS, peak=0.1)).T.copy())
SETTINGS: dict[str, Any] = {"prompt": "low hum", "duration": SECONDS, "steps": 3, "seed": 3, "cfg_scale": 1.0}
SETTINGS |= inpaint((44100, SOURCE), START, END)
FRAME = 4096


def receptive_field(gen: Generator) -> int:
    """Frames to each side that the audio of a frame depends on."""
    decoder = gen.model.config.autoencoder.decoder
    return 3 if decoder.window is None else decoder.depth * decoder.window


def outside(gen: Generator) -> torch.Tensor:
    """Samples beyond the decoder's reach of any frame that was regenerated."""
    first, last = -(-int(START * 44100) // FRAME), -(-int(END * 44100) // FRAME)
    reach = receptive_field(gen)
    kept = torch.ones(int(SECONDS * 44100), dtype=torch.bool)
    kept[max(0, first - reach) * FRAME : (last + reach) * FRAME] = False
    end = -(-int(SECONDS * 44100) // FRAME)
    kept[(end - reach) * FRAME :] = False
    return kept


def region(latents: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(latents.shape[-1])
    mask[-(-int(START * 44100) // FRAME) : -(-int(END * 44100) // FRAME)] = 0
    mask[-(-int(SECONDS * 44100) // FRAME) :] = 0
    return mask


def decoded(gen: Generator, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return gen.model.autoencoder.decode(latents, noise=False)[0, :, : SOURCE.shape[1]]


@pytest.mark.parametrize("which", ["plain", "diff"])
@pytest.mark.parametrize("keep_exact", [False, True])
def test_outside_the_region_the_audio_is_that_of_the_kept_latents_alone(
    make: Callable[..., Generator], which: str, keep_exact: bool
) -> None:
    gen = make(which)
    latents = generate_latents(gen, **SETTINGS, keep_exact=keep_exact)
    whole, alone = decoded(gen, latents), decoded(gen, latents * region(latents))
    far = outside(gen)
    assert far.float().mean() > 0.2
    assert (whole - alone)[:, far].abs().max() < 1e-6
    assert (whole - alone)[:, ~far].abs().max() > 1e-3


@pytest.mark.parametrize("which", ["plain", "diff"])
def test_kept_exactly_it_is_the_audio_of_the_source_s_own_latents(make: Callable[..., Generator], which: str) -> None:
    """Without `keep_exact` kept frames are the model's copy of the source, as the released code decodes them."""
    gen = make(which)
    exact, copied = (generate_latents(gen, **SETTINGS, keep_exact=keep_exact) for keep_exact in (True, False))
    generator = torch.Generator().manual_seed(3)
    torch.randn(exact.shape, generator=generator)
    padded = torch.nn.functional.pad(SOURCE, (0, exact.shape[-1] * FRAME - SOURCE.shape[1]))[None]
    with torch.no_grad():
        own = gen.model.autoencoder.encode(padded, generator=generator)
    kept = region(exact).bool()
    assert torch.equal(exact[..., kept], own[..., kept])
    assert torch.equal(exact[..., ~kept], copied[..., ~kept])
    far = outside(gen)
    difference = decoded(gen, exact) - decoded(gen, own * region(own))
    assert difference[:, far].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("ends", "length", "durations"),
    [
        ([(0.5, 1.0), (1.5, 2.0)], SECONDS, [SECONDS, 2.41]),
        ([(0.0, 0.77)], SECONDS, [SECONDS, SECONDS]),
        ([(2.0, SECONDS)], 2.0, [SECONDS, SECONDS]),
    ],
    ids=["two regions, two lengths", "at the start", "a continuation"],
)
def test_kept_exactly_every_sample_around_the_regions_is_the_source_s(
    make: Callable[..., Generator], ends: list[tuple[float, float]], length: float, durations: list[float]
) -> None:
    source = SOURCE[:, : int(length * 44100)]
    settings = SETTINGS | inpaint((44100, source), *(list(each) for each in zip(*ends, strict=True)))
    settings |= {"prompt": ["low hum", "rain"], "duration": durations}
    exact, copied = (make("plain").generate(**settings, keep_exact=keep_exact).audio for keep_exact in (True, False))
    kept = torch.ones(SOURCE.shape[1], dtype=torch.bool)
    made = ~kept
    for start, end in ends:
        first, stop = int(start * 44100), int(end * 44100)
        made[first:stop] = True
        kept[max(0, first - FADE) : stop + FADE] = False
    for item, decoded_item in zip(exact, copied, strict=True):
        here, there = kept[: item.shape[1]], made[: item.shape[1]]
        assert torch.equal(item[:, here], fit(source, item.shape[1])[:, here])
        assert (item[:, there] != 0).all() and (item - fit(source, item.shape[1]))[:, there].abs().max() > 1e-3
        assert not torch.equal(decoded_item[:, here], item[:, here])
    assert kept.float().mean() > 0.5
