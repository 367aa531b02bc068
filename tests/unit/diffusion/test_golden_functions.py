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
    "shift.logsnr.default": schedule.logsnr_shift,
    "shift.logsnr.rate1": partial(schedule.logsnr_shift, rate=1.0),
    "shift.full": schedule.full_shift,
    "shift.full.sine": schedule.full_sine_shift,
    "shift.flux": schedule.flux_shift,
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
    single = {"silence_extension", "resize_padding_mask", "coupling", "masked_loss"}
    assert {name for name in GOLDEN.cases if not name.startswith(families)} == single


@pytest.mark.parametrize("case", GOLDEN.names("shift."))
def test_shift(case: str) -> None:
    tensors = GOLDEN.tensors(case)
    shift = SHIFTS[case.rsplit(".", 1)[0]]
    assert_near(shift(tensors["t"], GOLDEN.settings(case)["length"]), tensors["shifted"])


@pytest.mark.parametrize("case", GOLDEN.names("schedule."))
def test_schedule(case: str) -> None:
    settings = GOLDEN.settings(case)
    assert settings["shift"] == "logsnr.default"
    assert_near(schedule.sampling_schedule(settings["steps"], settings["sigma_max"]), GOLDEN.tensors(case)["sigmas"])


@pytest.mark.parametrize("case", GOLDEN.names("sampler."))
def test_sampler(case: str) -> None:
    tensors = GOLDEN.tensors(case, DEVICE)
    assert GOLDEN.settings(case)["velocity"] == "sin(x)*t + 0.3*x"
    sample = samplers.SAMPLERS[case.split(".")[1]]
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
    mask = masks.inpainting_masks(tensors["padding_mask"], rng, MASK_KINDS[case.split(".")[1]])
    assert torch.equal(mask, tensors["mask"])


def test_silence_extension() -> None:
    tensors = GOLDEN.tensors("silence_extension")
    extended = masks.extend_into_silence(tensors["padding_mask"], seeded("silence_extension"))
    assert torch.equal(extended, tensors["extended"])


def test_resize_padding_mask() -> None:
    tensors, settings = GOLDEN.tensors("resize_padding_mask"), GOLDEN.settings("resize_padding_mask")
    resized = masks.resize_padding_mask(tensors["lengths"], settings["source_length"], settings["target"])
    assert torch.equal(resized, tensors["resized"])


def test_coupling() -> None:
    tensors = GOLDEN.tensors("coupling", DEVICE)
    assert torch.equal(objective.coupling_columns(tensors["data"], tensors["noise"]), tensors["columns"])


def test_masked_loss() -> None:
    tensors = GOLDEN.tensors("masked_loss", DEVICE)
    assert_near(objective.masked_loss(tensors["mse"], tensors["generated"]), tensors["loss"])
