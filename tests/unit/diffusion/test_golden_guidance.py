"""Every golden guidance case, with the DiT of both checkpoints."""

import functools

import pytest
import torch

from helpers.golden import DEVICE, GOLDEN, GoldenSet
from sa3train.diffusion.guidance import Condition, Guidance, compute_guided_velocity
from sa3train.models.checkpoint import load_checkpoint
from sa3train.models.dit import DiT

ROOT = GOLDEN
SETS = {which: GoldenSet(f"{which}/cases") for which in ("plain", "diff")}
CASES = [(which, case) for which, golden in SETS.items() for case in golden.names("dit.")]
TOLERANCE = 1e-4


@functools.cache
def dit(which: str) -> DiT:
    return load_checkpoint(ROOT / which, DEVICE, parts=("dit",)).dit


@pytest.mark.parametrize(("which", "case"), CASES)
def test_guided_velocity(which: str, case: str) -> None:
    tensors, settings = SETS[which].tensors(case, DEVICE), SETS[which].settings(case)
    condition = Condition(
        tensors["cross_attn_cond"],
        tensors["global_cond"],
        tensors["local_add_cond"],
        tensors.get("padding_mask"),
        tensors.get("negative_cross_attn_cond"),
        tensors.get("negative_mask"),
    )
    settings.pop("note", None)
    if "cfg_interval" in settings:
        settings["cfg_interval"] = tuple(settings["cfg_interval"])
    with torch.no_grad():
        velocity = compute_guided_velocity(dit(which), tensors["x"], tensors["t"], condition, Guidance(**settings))
    difference = (velocity - tensors["velocity"]).abs()
    if "padding_mask" in tensors:
        difference = difference * tensors["padding_mask"][:, None]
    assert difference.max() <= TOLERANCE
