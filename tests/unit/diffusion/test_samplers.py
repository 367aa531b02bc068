"""Samplers and schedules beyond the recorded cases."""

import pytest
import torch

from sa3train.diffusion.samplers import SAMPLERS, Velocity
from sa3train.diffusion.schedule import build_schedule


class Cancelled(Exception):
    pass


def straight(data: torch.Tensor, noise: torch.Tensor) -> Velocity:
    return lambda x, t: noise - data


@pytest.mark.parametrize("name", ["dpmpp", "euler", "rk4"])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_straight_path_leads_to_the_data(name: str, steps: int) -> None:
    data = torch.randn(2, 3, 7)
    noise = torch.randn(2, 3, 7)
    generator = torch.Generator().manual_seed(0)
    result = SAMPLERS[name].sample(straight(data, noise), noise, build_schedule(steps), generator=generator)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_callback_sees_each_step_and_may_cancel(name: str) -> None:
    seen: list[tuple[int, int, float]] = []

    def watch(step: int, total: int, sigma: float, denoised: torch.Tensor) -> None:
        seen.append((step, total, sigma))
        if step == 2:
            raise Cancelled

    sigmas = build_schedule(5)
    with pytest.raises(Cancelled):
        SAMPLERS[name].sample(lambda x, t: x, torch.randn(1, 2, 3), sigmas, callback=watch)
    assert seen == [(step, 5, sigmas[step].item()) for step in range(3)]


def test_a_schedule_from_below_one_may_rise_first_as_released() -> None:
    sigmas = build_schedule(50, 0.5)
    assert sigmas[0] == 0.5
    assert sigmas[1] > 0.7
    assert sigmas[-1] == 0


@pytest.mark.parametrize(("steps", "sigma_max"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, 1.1)])
def test_a_schedule_out_of_range_is_refused(steps: int, sigma_max: float) -> None:
    with pytest.raises(ValueError, match=r"schedule|sigma_max"):
        build_schedule(steps, sigma_max)


def test_pingpong_ends_on_its_last_denoised_estimate() -> None:
    seen: list[torch.Tensor] = []
    sigmas = build_schedule(4)
    generator = torch.Generator().manual_seed(0)
    result = SAMPLERS["pingpong"].sample(
        lambda x, t: torch.sin(x),
        torch.randn(1, 2, 3),
        sigmas,
        generator=generator,
        callback=lambda step, total, sigma, denoised: seen.append(denoised),
    )
    assert torch.equal(result, seen[-1])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_draws_what_its_row_declares(name: str) -> None:
    shape, steps = (2, 3, 4), 3
    used, expected = (torch.Generator().manual_seed(0) for _ in range(2))
    SAMPLERS[name].sample(lambda x, t: x, torch.ones(shape), build_schedule(steps), generator=used)
    for _ in range(steps if SAMPLERS[name].is_stochastic else 0):
        torch.randn(shape, generator=expected)
    assert torch.equal(used.get_state(), expected.get_state()), (
        f"Correct is_stochastic in the row of {name!r} in SAMPLERS: True draws one noise like x in every step. "
        "GPUs prefetch exactly that noise."
    )
