"""A packed batch goes through the model as its clips would one by one."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.golden import GOLDEN
from helpers.shards import make_data_module, make_store
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

LENGTHS = [5, 9, 12, 3, 7, 20, 4, 11, 6, 8]


@pytest.fixture(scope="module", params=["plain", "diff"])
def model(request: pytest.FixtureRequest) -> StableAudio3:
    return load_checkpoint(GOLDEN / request.param, parts=("dit", "conditioner"))


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A packed batch of two rows from shards of random latents."""
    folder = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    make_store(folder, LENGTHS, make=lambda frames, _: rng.standard_normal((64, frames)), channels=64)
    loader = make_data_module(folder, 2, pack_frames=48, seed=1).train_dataloader()
    found: dict[str, Any] = next(iter(loader))
    return found


def test_outputs_and_loss_equal_the_clips_one_by_one(model: StableAudio3, batch: dict[str, Any]) -> None:
    ids_BT, latents_BCT = batch["segment_ids_BT"], batch["latents_BCT"]
    clips = len(batch["keys"])
    assert clips > 5
    generator = torch.Generator().manual_seed(0)
    noise_BCT = torch.randn(latents_BCT.shape, generator=generator)
    t_S = torch.rand(clips, generator=generator)
    t_BT = torch.where(ids_BT >= 0, t_S[ids_BT.clamp(min=0)], 0)
    x_BCT = (1 - t_BT[:, None]) * latents_BCT + t_BT[:, None] * noise_BCT
    local_BCT = torch.cat((torch.zeros_like(x_BCT[:, :1]), torch.zeros_like(x_BCT)), dim=1)
    with torch.no_grad():
        given = model.conditioner(batch["prompts"], batch["seconds_total_S"])
        packed_BCT = model.dit(
            x_BCT,
            t_S,
            cross_attn_cond_BLD=given.cross_attn_cond_BLD,
            global_cond_BD=given.global_cond_BD,
            local_add_cond_BCT=local_BCT,
            segment_ids=ids_BT,
        )
        for clip in range(clips):
            row = int(torch.nonzero((ids_BT == clip).any(dim=1))[0, 0])
            frames = ids_BT[row] == clip
            alone = model.conditioner([batch["prompts"][clip]], batch["seconds_total_S"][clip : clip + 1])
            alone_1CT = model.dit(
                x_BCT[row : row + 1, :, frames],
                t_S[clip : clip + 1],
                cross_attn_cond_BLD=alone.cross_attn_cond_BLD,
                global_cond_BD=alone.global_cond_BD,
                local_add_cond_BCT=local_BCT[row : row + 1, :, frames],
            )
            mine_CT, target_CT = packed_BCT[row, :, frames], (noise_BCT - latents_BCT)[row, :, frames]
            assert torch.allclose(mine_CT, alone_1CT[0], rtol=0, atol=1e-4)
            losses = [(velocity_CT - target_CT).square().mean() for velocity_CT in (mine_CT, alone_1CT[0])]
            assert abs(losses[0] - losses[1]) < 1e-4


def test_a_clip_never_sees_its_neighbours(model: StableAudio3, batch: dict[str, Any]) -> None:
    ids_BT = batch["segment_ids_BT"]
    given = model.conditioner(batch["prompts"], batch["seconds_total_S"])
    conditions = {"cross_attn_cond_BLD": given.cross_attn_cond_BLD, "global_cond_BD": given.global_cond_BD}
    changed_BCT = batch["latents_BCT"].clone()
    others = ids_BT != 0
    changed_BCT += others[:, None] * 5.0
    with torch.no_grad():
        t_S = torch.full((len(batch["keys"]),), 0.5)
        one = model.dit(batch["latents_BCT"], t_S, segment_ids=ids_BT, **conditions)
        two = model.dit(changed_BCT, t_S, segment_ids=ids_BT, **conditions)
    same = (ids_BT == 0)[:, None].expand_as(one)
    assert torch.allclose(one[same], two[same], rtol=0, atol=1e-5)
    assert not torch.allclose(one[~same], two[~same], rtol=0, atol=1e-2)


def test_every_clip_is_there_in_full(batch: dict[str, Any]) -> None:
    for number, key in enumerate(batch["keys"]):
        assert int((batch["segment_ids_BT"] == number).sum()) == LENGTHS[int(key[-1])]
