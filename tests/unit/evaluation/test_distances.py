"""Distances in latent space: copies of training clips score 0, new music about 1; Fréchet against closed forms."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from sa3train.evaluation.distances import (
    WINDOW,
    ReferenceClips,
    compute_frechet_distance,
    extract_windows,
    find_nearest,
    measure_spread,
)


def music(seed: int, count: int, frames: int = 40, channels: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loudness_C1 = torch.linspace(0.1, 10, channels)[:, None]
    return [torch.randn(channels, frames, generator=generator) * loudness_C1 for _ in range(count)]


def scored(made: Sequence[Tensor]) -> Any:
    training = music(0, 6)
    names = [f"clip-{number}" for number in range(6)]
    return ReferenceClips(music(1, 4), training, names).measure_memorization(made)


def test_windows_are_those_of_each_clip() -> None:
    long_CT, short_CT = torch.arange(2 * 24.0).view(2, 24), torch.arange(2 * 5.0).view(2, 5)
    rows_NK, owners_N = extract_windows([long_CT, short_CT], size=16, stride=4)
    assert owners_N.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(rows_NK[1].view(2, 16), long_CT[:, 4:20])
    torch.testing.assert_close(rows_NK[3].view(2, 16), short_CT.repeat(1, 4)[:, :16])


def test_nearest_is_the_root_mean_square_distance() -> None:
    queries, keys = torch.randn(300, 6), torch.randn(50, 6)
    distances, numbers = find_nearest(queries, keys, chunk=64)
    every = (queries[:, None] - keys[None]).square().mean(dim=2).sqrt()
    torch.testing.assert_close(distances, every.min(dim=1).values, atol=1e-5, rtol=1e-5)
    assert torch.equal(numbers, every.argmin(dim=1))


def test_copies_score_nothing_and_are_named() -> None:
    training = music(0, 6)
    found = scored([training[4], training[1]])
    assert found.score == pytest.approx(0, abs=1e-3)
    assert [row["training_clip"] for row in found.nearest] == ["clip-4", "clip-1"]
    assert found.generated_to_heldout > 0.5


def test_a_part_of_a_clip_is_found_wherever_it_was_taken() -> None:
    training = music(0, 6)
    found = scored([training[2][:, 8 : 8 + WINDOW]])
    assert found.nearest == [{"clip": 0, "training_clip": "clip-2", "distance": pytest.approx(0, abs=1e-3)}]


def test_new_music_scores_one_and_near_copies_lie_between() -> None:
    assert scored(music(9, 4)).score == pytest.approx(1, abs=0.1)
    halfway = [(a + b) / 2 for a, b in zip(music(0, 4), music(9, 4), strict=True)]
    assert 0.2 < scored(halfway).score < 0.8


def test_the_score_does_not_depend_on_the_loudness_of_channels() -> None:
    def louder(clips: Sequence[Tensor]) -> list[Tensor]:
        return [clip_CT * torch.linspace(5, 0.01, 8)[:, None] for clip_CT in clips]

    names = [str(number) for number in range(6)]
    plain = ReferenceClips(music(1, 4), music(0, 6), names).measure_memorization(music(9, 2))
    other = ReferenceClips(louder(music(1, 4)), louder(music(0, 6)), names).measure_memorization(louder(music(9, 2)))
    assert other.score == pytest.approx(plain.score, rel=1e-4)


def test_spread_is_the_standard_deviation_in_time() -> None:
    assert measure_spread([torch.tensor([[1.0, -1.0] * 500, [5.0] * 1000])]) == pytest.approx(0.5**0.5, rel=1e-2)


def test_frechet_is_that_of_the_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(200, 5, generator=rng) @ torch.randn(5, 5, generator=rng)
    second = torch.randn(90, 5, generator=rng) + 1.5
    a, b = (np.cov(x.double().numpy().T) for x in (first, second))
    shift = (first.double().mean(0) - second.double().mean(0)).square().sum().item()
    expected = shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert compute_frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("frames", [3, 40])
def test_frechet_of_scaled_and_shifted_copies(frames: int) -> None:
    """With Y = aX + b it is |b|² + (1 − a)² tr Σ, also with fewer frames than channels."""
    x = torch.randn(frames, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spread = float(torch.cov(x.T).trace())
    mean = float((-0.5 * x.mean(dim=0) + 2).square().sum())
    assert compute_frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert compute_frechet_distance(x, x / 2 + 2) == pytest.approx(mean + spread / 4)


def test_without_training_clips_there_are_distances_to_heldout_ones_alone() -> None:
    heldout = music(1, 4)
    clips = ReferenceClips(heldout, [], [])
    assert clips.measure_nearest([heldout[2], music(9, 1)[0]]) == [
        pytest.approx(0, abs=1e-3),
        pytest.approx(1, abs=0.5),
    ]
    distance, without = clips.measure_frechet(heldout)
    assert distance == pytest.approx(0, abs=1e-6) and len(without) == 4
    assert without[1] == pytest.approx(clips.measure_frechet([heldout[0], *heldout[2:]])[0])
    assert clips.measure_frechet(heldout[:1])[1] == [], "nothing is left without the only clip"
