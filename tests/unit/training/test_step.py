"""Each option of the objective against its formula."""

import math
import random

import numpy as np
import pytest
import torch

from sa3train.core.errors import ConfigError
from sa3train.core.seeds import derive_seed
from sa3train.diffusion import masks, objective, schedule
from sa3train.training import module
from sa3train.training.settings import LossSettings
from sa3train.training.step import (
    DRAWS_VERSION,
    StepDraw,
    compute_loss_weights,
    compute_step_losses,
    derive_clip_seeds,
    draw_step,
    list_sampled_noise_levels,
    make_noisy_inputs,
)

SHAPE = (6, 4, 20)
LENGTHS = torch.tensor([20, 15, 10, 5, 20, 8])
MASK = masks.build_attention_mask(LENGTHS, 20)
FRAMES = torch.tensor([300, 15, 4000, 5, 20, 8])
SECOND = 44100 / 4096


def draw(settings: LossSettings, seeds: list[int] | None = None, at_end: torch.Tensor | None = None) -> StepDraw:
    return draw_step(settings, seeds or list(range(6)), range(6), SHAPE, MASK, FRAMES, SECOND, at_end)


def random_step(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, StepDraw]:
    """Data, a predicted velocity, and a draw in which every item has generated and kept frames."""
    generator = torch.Generator().manual_seed(seed)
    data, velocity, noise = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    kept = torch.zeros(6, 1, 20)
    kept[:, :, :2] = 1
    t = torch.rand(6, generator=generator)
    return data, velocity, StepDraw(noise, t, MASK, kept, torch.zeros(6, dtype=torch.bool))


def by_hand(error: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.stack([error[row, :, where[row]].mean() for row in range(6)])


@pytest.mark.parametrize("name", ["trunc_logit_normal", "log_snr", "log_snr_uniform", "uniform"])
@pytest.mark.parametrize("shift", ["none", "full", "full.sine", "flux"])
def test_t_is_the_samplers_shifted_by_each_items_effective_length(name: str, shift: str) -> None:
    found = draw(LossSettings(timesteps=name, shift=shift)).t_B  # type: ignore[arg-type]
    for row in range(6):
        t = objective.TIMESTEP_SAMPLERS[name](1, torch.Generator().manual_seed(row))
        expected = schedule.SHIFTS[shift](t, FRAMES[row : row + 1])
        assert torch.equal(found[row : row + 1], expected)


def test_levels_are_those_at_which_the_sampler_calls_the_model() -> None:
    settings = LossSettings(timesteps="levels", sampler_steps=8, shift="none")
    levels = list_sampled_noise_levels(settings)
    assert torch.equal(levels, schedule.build_schedule(8)[:-1]) and levels[0] == 1.0
    seen = set(draw(settings, list(range(6))).t_B.tolist())
    for start in range(6, 120, 6):
        seen |= set(draw(settings, list(range(start, start + 6))).t_B.tolist())
    assert seen == set(levels.tolist())


def test_silence_follows_only_where_the_clip_ends() -> None:
    at_end = torch.tensor([True, True, False, True, False, True])
    found = draw(LossSettings(silence_seconds=1.0), at_end=at_end).attention_mask_BT.sum(1)
    assert (found >= LENGTHS).all() and torch.equal(found[~at_end], LENGTHS[~at_end])
    assert (found > LENGTHS).any()
    assert torch.equal(draw(LossSettings(silence_seconds=0.0)).attention_mask_BT, MASK)
    starts, settings = range(0, 1200, 6), LossSettings(silence_seconds=0.1)
    many = torch.stack([draw(settings, list(range(n, n + 6))).attention_mask_BT.sum(1) - LENGTHS for n in starts])
    expected = 1 / (math.exp(1 / (0.1 * SECOND)) - 1)  # the mean of an exponential draw rounded down
    assert float(many[:, [2, 3, 5]].float().mean()) == pytest.approx(expected, abs=0.15), "clips with room behind them"


@pytest.mark.parametrize("kind", ["segments", "full", "continuation", "spans"])
def test_inpainting_masks_are_of_the_kinds_asked_for_and_stay_in_the_real_part(kind: str) -> None:
    settings = LossSettings(inpainting={kind: 1.0}, silence_seconds=0.0)
    found = draw(settings).inpaint_mask_B1T
    for row in range(6):
        expected = masks.draw_inpainting_masks(MASK[row : row + 1], random.Random(row), {kind: 1.0})
        assert torch.equal(found[row : row + 1], expected)
    assert not (found[:, 0] * ~MASK).any()


def test_prompts_are_dropped_at_their_share() -> None:
    starts, settings = range(100, 700, 6), LossSettings(cfg_dropout=0.3)
    dropped = torch.cat([draw(settings, list(range(start, start + 6))).dropped_B for start in starts])
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.06)
    assert (
        not draw(LossSettings(cfg_dropout=0.0)).dropped_B.any() and draw(LossSettings(cfg_dropout=1.0)).dropped_B.all()
    )


def test_the_model_sees_the_mixture_the_mask_and_what_is_kept() -> None:
    data, _, step = random_step()
    x, local = make_noisy_inputs(data, step)
    t = step.t_B[:, None, None]
    assert torch.allclose(x, (1 - t) * data + t * step.noise_BCT)
    assert torch.equal(local[:, :1], step.inpaint_mask_B1T) and torch.equal(local[:, 1:], data * step.inpaint_mask_B1T)


def test_the_loss_is_the_mean_over_items_of_their_own_means_plus_the_weighted_context() -> None:
    data, velocity, step = random_step()
    losses = compute_step_losses(LossSettings(context_weight=0.25), velocity, data, step)
    error = (velocity - (step.noise_BCT - data)) ** 2
    kept = step.inpaint_mask_B1T[:, 0].bool()
    assert torch.allclose(losses.item_loss_B, by_hand(error, MASK & ~kept))
    assert torch.allclose(losses.loss, by_hand(error, MASK & ~kept).mean())
    assert torch.allclose(losses.context_loss, by_hand(error, MASK & kept).mean())
    assert torch.allclose(losses.total, losses.loss + 0.25 * losses.context_loss)


def test_huber_is_the_square_up_to_delta_and_a_line_beyond() -> None:
    data, velocity, step = random_step()
    delta = 0.7
    size = (velocity - (step.noise_BCT - data)).abs()
    expected = torch.where(size <= delta, size**2, 2 * delta * size - delta**2)
    losses = compute_step_losses(LossSettings(function="huber", huber_delta=delta), velocity, data, step)
    assert torch.allclose(losses.item_loss_B, by_hand(expected, MASK & ~step.inpaint_mask_B1T[:, 0].bool()))


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        ("min_snr", lambda t: min((1 - t) ** 2, 5 * t**2)),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
        ([1.0, 3.0, 0.0], lambda t: 1 + 4 * t if t < 0.5 else 3 - 6 * (t - 0.5)),
    ],
)
def test_weights_by_noise_level_multiply_each_items_loss(weighting: object, formula: object) -> None:
    data, velocity, step = random_step()
    settings = LossSettings(weighting=weighting)  # type: ignore[arg-type]
    expected = torch.tensor([formula(t) for t in step.t_B.tolist()])  # type: ignore[operator]
    found = compute_loss_weights(settings, step.t_B)
    assert found is not None and torch.allclose(found, expected, atol=1e-6)
    losses, plain = (
        compute_step_losses(settings, velocity, data, step),
        compute_step_losses(LossSettings(), velocity, data, step),
    )
    assert torch.allclose(losses.loss, (plain.item_loss_B * expected).mean())
    assert torch.allclose(losses.item_loss_B, plain.item_loss_B), "what is reported is not weighted"


def test_an_items_randomness_is_its_own() -> None:
    """By showing and step, not by place: other items, another order or a longer batch change nothing."""
    shown = [7, 2**61, 9, 4, 3, 1]
    seeds = derive_clip_seeds(3, 17, shown)
    assert (
        len(set(seeds)) == 6
        and derive_clip_seeds(3, 18, shown)[0] != seeds[0]
        and derive_clip_seeds(4, 17, shown)[0] != seeds[0]
    )
    assert derive_clip_seeds(3, 17, [4, 2**61]) == [seeds[3], seeds[1]]
    settings = LossSettings(timesteps="uniform")
    whole, mask = draw(settings, seeds), masks.build_attention_mask(LENGTHS[3:4], 24)
    part = draw_step(settings, seeds[3:4], [3], (1, 4, 24), mask, FRAMES[3:4], SECOND)
    assert torch.equal(part.t_B, whole.t_B[3:4]) and torch.equal(part.dropped_B, whole.dropped_B[3:4])
    assert torch.equal(part.noise_BCT[:, :, :16], whole.noise_BCT[3:4, :, :16])
    assert derive_seed("x", 1) == derive_seed("x", 1) and 0 <= derive_seed("x", 1) < 2**63


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inpainting": {"segmnts": 1.0}}, "Did you mean segments"),
        ({"inpainting": {"full": 0.0}}, "loss.inpainting"),
        ({"weighting": "min_sn"}, "Did you mean min_snr"),
        ({"huber_delta": 2.0}, "no effect without loss.function=huber"),
        ({"sampler_steps": 8}, "loss.sampler_steps"),
        ({"timesteps": "levels"}, "loss.sampler_steps"),
        ({"timesteps": "levels", "sampler_steps": 8}, "loss.shift=none"),
    ],
)
def test_values_out_of_range_or_without_effect_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossSettings(**values)  # type: ignore[arg-type]


def test_the_names_in_the_settings_are_those_of_the_mathematics() -> None:
    from typing import get_args, get_type_hints

    hints = get_type_hints(LossSettings)
    assert set(get_args(hints["timesteps"])) == {*objective.TIMESTEP_SAMPLERS, "low_discrepancy", "levels"}
    assert set(get_args(hints["shift"])) == set(schedule.SHIFTS)
    for kind in masks.MASK_KINDS:
        LossSettings(inpainting={kind: 1.0})
    for name in objective.WEIGHTINGS:
        LossSettings(weighting=name)


def test_noise_levels_are_spread_over_the_clips_of_a_run_whatever_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LossSettings(shift="none")

    def spread(ranks: int, steps: int = 8, clips: int = 6, seed: int = 3) -> list[float]:
        found = []
        for step in range(steps):
            for rank in range(ranks):
                monkeypatch.setattr(module, "get_rank_and_world_size", lambda rank=rank: (rank, ranks))
                numbers = module.list_clip_numbers(seed, step, clips // ranks)
                mask = masks.build_attention_mask(LENGTHS[: len(numbers)], 16)
                shape = (len(numbers), 1, 16)
                found += draw_step(settings, numbers, numbers, shape, mask, FRAMES, SECOND).t_B.tolist()
        return sorted(found)

    whole = spread(1)
    assert whole == spread(2) == spread(3) and whole != spread(1, seed=4)
    gaps = np.diff([whole[-1] - 1, *whole])
    assert gaps.max() < 2 / 48 and gaps.min() > 0.3 / 48, "three-distance theorem: no gap is far from the mean"
    late = objective.place_timesteps([10**7, 10**7 + 1])
    assert float((late[1] - late[0]) % 1) == pytest.approx(objective.GOLDEN_RATIO, abs=1e-6)


def test_the_draws_are_those_of_their_version() -> None:
    """A resumed run continues with these very draws."""
    mask = masks.build_attention_mask(torch.tensor([12, 7]), 16)
    settings = LossSettings(timesteps="trunc_logit_normal", inpainting={"segments": 1.0})
    frames, seeds, numbers = torch.tensor([12, 7]), derive_clip_seeds(5, 2, [11, 12]), module.list_clip_numbers(5, 2, 2)
    step = draw_step(settings, seeds, numbers, (2, 4, 16), mask, frames, SECOND)
    spread = draw_step(LossSettings(), seeds, numbers, (2, 4, 16), mask, frames, SECOND)
    found = [
        *spread.t_B.tolist(), *step.t_B.tolist(), *step.noise_BCT[:, 0, 0].tolist(),
        *step.attention_mask_BT.sum(dim=1).tolist(), *step.inpaint_mask_B1T.sum(dim=2).flatten().tolist(),
        *step.dropped_B.tolist(),
    ]  # fmt: skip
    expected = [0.4830353, 0.9876247, 0.4781041, 0.5279416, 1.3090804, 0.1690919, 16, 16, 9, 5, False, False]
    assert DRAWS_VERSION == 1 and found == pytest.approx(expected, abs=1e-6), (
        "draw_step gives other draws for the same seeds, so older runs cannot be resumed exactly: raise "
        "sa3train.training.step.DRAWS_VERSION, and pin the new values here"
    )
