"""Each objective option against its formula."""

import math

import pytest
import torch

from helpers.golden import GoldenSet
from sa3train.diffusion import masks, objective, schedule

T = torch.linspace(0.01, 0.99, 50)


def test_noised_ends_are_data_and_noise_and_the_velocity_joins_them() -> None:
    data, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(objective.add_noise(data, noise, torch.zeros(2)), data)
    assert torch.equal(objective.add_noise(data, noise, torch.ones(2)), noise)
    t = torch.tensor([0.3, 0.8])
    x = objective.add_noise(data, noise, t)
    torch.testing.assert_close(x - t[:, None, None] * objective.compute_velocity_target(data, noise), data)


@pytest.mark.parametrize("name", sorted(objective.TIMESTEP_SAMPLERS))
def test_timesteps_lie_in_range_and_repeat_by_seed(name: str) -> None:
    draw = objective.TIMESTEP_SAMPLERS[name]
    first, second = (draw(2000, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.min() >= -1e-6
    assert first.max() <= 1 + 1e-6


def test_level_timesteps_are_only_the_given_levels() -> None:
    levels = schedule.build_schedule(8)[:-1]
    t = objective.sample_levels(levels, 200, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == set(levels.tolist())


def test_training_shift_takes_a_length_per_item() -> None:
    t, lengths = torch.tensor([0.4, 0.4]), torch.tensor([300, 4000])
    shifted = schedule.shift_full(t, lengths)
    for index, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(shifted[index], schedule.shift_full(t[index], length))
    assert shifted[1] > shifted[0]


def test_effective_frames_rounds_up_after_cutting_to_whole_samples() -> None:
    assert objective.count_effective_frames(2.0, 44100, 4096) == math.ceil(88200 / 4096)
    assert objective.count_effective_frames(4096 / 44100, 44100, 4096) == 1
    assert objective.count_effective_frames(4097.5 / 44100, 44100, 4096) == 2


def test_min_snr_weights_the_data_estimate_by_the_smaller_of_snr_and_gamma() -> None:
    snr = ((1 - T) / T) ** 2
    torch.testing.assert_close(objective.compute_min_snr_weights(T, 5.0), T**2 * snr.clamp(max=5.0))


def test_cosmap_is_a_density() -> None:
    t = torch.linspace(0, 1, 10001)
    assert torch.trapezoid(objective.compute_cosmap_weights(t), t).item() == pytest.approx(1.0, abs=1e-4)


def test_level_weighting_joins_its_weights_by_lines() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    weights = objective.interpolate_weights(t, [1.0, 3.0, 0.0])
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 3.0, 1.5, 0.0]))
    with pytest.raises(ValueError, match="at least two"):
        objective.interpolate_weights(t, [1.0])


def test_huber_is_the_square_near_and_a_line_far() -> None:
    error = torch.tensor([[[0.5, -0.5, 3.0]]])
    result = objective.compute_huber_error(error, torch.zeros_like(error), delta=1.0)
    torch.testing.assert_close(result, torch.tensor([[[0.25, 0.25, 2 * 3.0 - 1.0]]]))


def test_losses_ignore_padding_and_weigh_items() -> None:
    error = torch.ones(2, 3, 6)
    error[:, :, 4:] = math.inf
    padding = masks.build_attention_mask(torch.tensor([4, 4]), 6)
    inpaint = torch.zeros(2, 1, 6)
    inpaint[1, :, :2] = 1
    loss, context = objective.compute_losses(error, inpaint, padding, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(2.0)
    assert context.item() == pytest.approx(1.5)


@pytest.mark.parametrize("which", ["plain", "diff"])
def test_losses_of_the_recorded_training_step(which: str) -> None:
    golden = GoldenSet(f"{which}/cases")
    step = golden.tensors("train.step")
    error = objective.compute_squared_error(
        step["velocity"], objective.compute_velocity_target(step["latents"], step["noise"])
    )
    loss, context = objective.compute_losses(error, step["inpaint_mask"], step["padding_mask"])
    torch.testing.assert_close(loss, step["loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(context, step["context_loss"], rtol=1e-4, atol=0)


def test_coupling_is_a_permutation_that_lowers_the_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(8, 4, 6, generator=generator), torch.randn(8, 4, 6, generator=generator)
    columns = objective.match_noise(data, noise)
    assert sorted(columns.tolist()) == list(range(8))
    assert (data - noise[columns]).square().sum() < (data - noise).square().sum()
