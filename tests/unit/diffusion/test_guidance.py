"""Guidance on a stand-in model; the recorded cases with the DiT are in test_golden_guidance.py."""

from typing import Unpack

import pytest
import torch
from torch import Tensor

from sa3train.diffusion.guidance import (
    Condition,
    Guidance,
    VelocityInputs,
    combine_velocities,
    compute_guided_velocity,
)

T = torch.full((2,), 0.6)


class Linear:
    """A velocity that shows its condition; counts its calls and their batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_BCT: Tensor, t_B: Tensor, **inputs: Unpack[VelocityInputs]) -> Tensor:
        self.batches.append(len(x_BCT))
        return x_BCT * 0.3 + inputs["cross_attn_cond_BLD"].mean(dim=(1, 2))[:, None, None] * torch.sin(x_BCT)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def condition() -> Condition:
    return Condition(torch.ones(2, 5, 6), torch.ones(2, 6))


def test_scale_one_and_outside_the_interval_run_the_condition_alone(x: Tensor, condition: Condition) -> None:
    model = Linear()
    bare = compute_guided_velocity(model, x, T, condition, Guidance(1.0))
    outside = compute_guided_velocity(model, x, T, condition, Guidance(5.0, cfg_interval=(0.7, 1.0)))
    assert torch.equal(bare, outside)
    assert model.batches == [2, 2]


def test_interval_ends_are_inclusive(x: Tensor, condition: Condition) -> None:
    model = Linear()
    for interval in ((0.6, 1.0), (0.0, 0.6)):
        compute_guided_velocity(model, x, T, condition, Guidance(5.0, cfg_interval=interval))
    assert model.batches == [4, 4]


def test_plain_guidance_is_the_textbook_formula(x: Tensor, condition: Condition) -> None:
    v_cond, v_uncond = 0.3 * x + torch.sin(x), 0.3 * x
    guided = compute_guided_velocity(Linear(), x, T, condition, Guidance(4.0, apg_scale=0.0))
    torch.testing.assert_close(guided, v_uncond + 4.0 * (v_cond - v_uncond))


def test_projection_leaves_nothing_along_the_denoised_estimate(x: Tensor) -> None:
    v_cond, v_uncond = torch.randn_like(x), torch.randn_like(x)
    v = combine_velocities(x, T, v_cond, v_uncond, None, Guidance(4.0))
    sigma = T[:, None, None]
    step = (x - sigma * v) - (x - sigma * v_cond)
    along = (step * (x - sigma * v_cond)).sum(dim=(1, 2))
    torch.testing.assert_close(along, torch.zeros(2), rtol=0, atol=1e-3)


def test_the_norm_cap_bounds_the_difference(x: Tensor) -> None:
    v_cond, v_uncond = torch.randn_like(x), torch.randn_like(x)
    guidance = Guidance(2.0, apg_scale=0.0, cfg_norm_threshold=0.05)
    v = combine_velocities(x, T, v_cond, v_uncond, None, guidance)
    moved = T[:, None, None] * (v_cond - v)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((2,), 0.05), rtol=1e-3, atol=0)


def test_rescale_restores_the_spread_over_channels(x: Tensor) -> None:
    v_cond, v_uncond = torch.randn_like(x), torch.randn_like(x)
    v = combine_velocities(x, T, v_cond, v_uncond, None, Guidance(6.0, scale_phi=1.0))
    torch.testing.assert_close(v.std(dim=1), v_cond.std(dim=1))


def test_padding_does_not_touch_real_frames(x: Tensor) -> None:
    v_cond, v_uncond = torch.randn_like(x), torch.randn_like(x)
    mask = torch.arange(9)[None, :] < torch.tensor([9, 5])[:, None]
    guidance = Guidance(3.0, cfg_norm_threshold=1.0)
    first = combine_velocities(x, T, v_cond, v_uncond, mask, guidance)
    other = torch.where(mask[:, None, :], v_uncond, torch.full_like(v_uncond, 40.0))
    second = combine_velocities(x, T, v_cond, other, mask, guidance)
    assert torch.equal(first[1, :, :5], second[1, :, :5])


def test_a_negative_prompt_replaces_the_empty_condition(x: Tensor, condition: Condition) -> None:
    padded = torch.tensor([[True] * 4 + [False]]).expand(2, 5)
    negative = Condition(
        condition.cross_attn_cond_BLD,
        condition.global_cond_BD,
        negative_cross_attn_cond_BLD=torch.full((2, 5, 6), 0.5),
        negative_mask_BL=padded,
    )
    v_cond, v_negative = 0.3 * x + torch.sin(x), 0.3 * x + 0.4 * torch.sin(x)
    guided = compute_guided_velocity(Linear(), x, T, negative, Guidance(3.0, apg_scale=0.0))
    torch.testing.assert_close(guided, v_negative + 3.0 * (v_cond - v_negative))
