"""Every golden `functions` case: schedules, shifts, samplers, timesteps, masks, coupling, loss."""

import random
from functools import partial

import pytest
import torch

from helpers.golden import DEVICE, GoldenSet
from sa3train.diffusion import masks, objective, samplers, schedule

GOLDEN = GoldenSet("functions")
TOLERANCE = 1e-4

SHIFTS = {
    "shift.logsnr.default": schedule.shift_logsnr,
    "shift.logsnr.rate1": partial(schedule.shift_logsnr, rate=1.0),
    "shift.full": schedule.shift_full,
    "shift.full.sine": schedule.shift_full_sine,
    "shift.flux": schedule.shift_flux,
}
MASK_KINDS = {
    "random_segments": "segments",
    "full_mask": "full",
    "causal_mask": "continuation",
    "random_spans": "spans",
    "mixture": None,
}


def seeded(case: str) -> torch.Generator:
    return torch.Generator().manual_seed(GOLDEN.settings(case)["manual_seed"])


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_every_case_has_a_test() -> None:
    families = ("shift.", "schedule.", "sampler.", "timesteps.", "inpaint_mask.")
    single = {"silence_extension", "coupling", "masked_loss"}
    not_needed = {"resize_padding_mask"}  # clips are padded in latent frames, so no mask is resampled
    assert {name for name in GOLDEN.cases if not name.startswith(families)} == single | not_needed


@pytest.mark.parametrize("case", GOLDEN.names("shift."))
def test_shift(case: str) -> None:
    tensors = GOLDEN.tensors(case)
    shift = SHIFTS[case.rsplit(".", 1)[0]]
    assert_near(shift(tensors["t"], GOLDEN.settings(case)["length"]), tensors["shifted"])


@pytest.mark.parametrize("case", GOLDEN.names("schedule."))
def test_schedule(case: str) -> None:
    settings = GOLDEN.settings(case)
    assert settings["shift"] == "logsnr.default"
    assert_near(schedule.build_schedule(settings["steps"], settings["sigma_max"]), GOLDEN.tensors(case)["sigmas"])


@pytest.mark.parametrize("case", GOLDEN.names("sampler."))
def test_sampler(case: str) -> None:
    tensors = GOLDEN.tensors(case, DEVICE)
    assert GOLDEN.settings(case)["velocity"] == "sin(x)*t + 0.3*x"
    sample = samplers.SAMPLERS[case.split(".")[1]].sample
    result = sample(
        lambda x, t: torch.sin(x) * t + 0.3 * x, tensors["noise"], tensors["sigmas"].cpu(), generator=seeded(case)
    )
    assert_near(result, tensors["result"])


@pytest.mark.parametrize("case", GOLDEN.names("timesteps."))
def test_timesteps(case: str) -> None:
    value = GOLDEN.tensors(case)["value"]
    name = case.split(".")[1]
    t_B = objective.TIMESTEP_SAMPLERS[name](len(value), seeded(case))
    assert_near(t_B, 1 - value if name == "trunc_logit_normal" else value)


@pytest.mark.parametrize("case", GOLDEN.names("inpaint_mask."))
def test_inpainting_mask(case: str) -> None:
    tensors = GOLDEN.tensors(case)
    rng = random.Random(GOLDEN.settings(case)["python_random_seed"])
    kind = MASK_KINDS[case.split(".")[1]]
    mask = masks.draw_inpainting_masks(tensors["padding_mask"], rng, {kind: 1.0} if kind else masks.DEFAULT_MIX)
    assert torch.equal(mask, tensors["mask"])


def test_silence_extension() -> None:
    tensors = GOLDEN.tensors("silence_extension")
    extended = masks.extend_into_silence(tensors["padding_mask"], seeded("silence_extension"))
    assert torch.equal(extended, tensors["extended"])


def test_coupling() -> None:
    tensors = GOLDEN.tensors("coupling", DEVICE)
    assert torch.equal(objective.match_noise(tensors["data"], tensors["noise"]), tensors["columns"])


def test_masked_loss() -> None:
    tensors = GOLDEN.tensors("masked_loss", DEVICE)
    assert_near(objective.compute_masked_loss(tensors["mse"], tensors["generated"]), tensors["loss"])
