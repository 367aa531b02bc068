"""The memorisation score: copies of training clips score 0, new music about 1; what is written when a run ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.shards import make_data_module
from helpers.training import make_shards
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.callbacks.validation import list_heldout_clips, list_training_clips
from sa3train.training.memorization import (
    WINDOW,
    evaluate_memorization,
    extract_windows,
    find_nearest,
    measure_memorization,
    measure_spread,
)
from sa3train.training.settings import DemoSettings


def music(seed: int, count: int, frames: int = 40, channels: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loudness_C1 = torch.linspace(0.1, 10, channels)[:, None]
    return [torch.randn(channels, frames, generator=generator) * loudness_C1 for _ in range(count)]


def scored(made: Sequence[Tensor]) -> Any:
    training = music(0, 6)
    return measure_memorization(made, training, music(1, 4), [f"clip-{number}" for number in range(6)])


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
    plain = measure_memorization(music(9, 2), music(0, 6), music(1, 4), names)
    other = measure_memorization(louder(music(9, 2)), louder(music(0, 6)), louder(music(1, 4)), names)
    assert other.score == pytest.approx(plain.score, rel=1e-4)


def test_spread_is_the_standard_deviation_in_time() -> None:
    assert measure_spread([torch.tensor([[1.0, -1.0] * 500, [5.0] * 1000])]) == pytest.approx(0.5**0.5, rel=1e-2)


@pytest.fixture(scope="module")
def nano_adapter() -> Any:
    """An adapter for nano whose low-rank products are not zero."""
    model = load_checkpoint("nano", parts=("dit", "conditioner"))
    injected = inject(model.get_adapter_root(), AdapterSpec("lora", rank=2))
    with torch.no_grad():
        for name, parameter in injected.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.fill_(0.01)
    return model, injected.export({})


@pytest.mark.slow
@pytest.mark.parametrize("heldout", [1, 0])
def test_the_end_of_a_run_writes_it_and_leaves_randomness_alone(
    nano_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, heldout: int
) -> None:
    model, adapter = nano_adapter
    folder = make_shards(tmp_path / "data", [18, 20, 22], heldout=heldout, channels=model.latent_channels)
    data = make_data_module(folder, 1)
    data.setup()
    before = torch.random.get_rng_state()
    settings = DemoSettings(memorization_clips=2, duration=1.0)
    training, held = list_training_clips(data, 2), list_heldout_clips(data, 2)
    evaluate_memorization(tmp_path, "nano", adapter, training, held, settings, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    found = json.loads((tmp_path / "memorization.json").read_text())
    assert set(found["spread"]) == {"data", "base", "adapter"}
    if heldout:
        assert found["memorization"]["score"] > 0
        assert [row["clip"] for row in found["memorization"]["nearest"]] == [0, 1]
    else:
        assert "memorization" not in found
        assert "no memorization score" in caplog.text
