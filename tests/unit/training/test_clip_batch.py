"""Packed rows and rows of one clip are the same clips, and train the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.shards import make_data_module
from helpers.training import Trial, make_module
from sa3train.adapters.spec import AdapterSpec
from sa3train.data.loading.clip_batch import ClipBatch, make_clip_batch, pack_rows, unpack_rows
from sa3train.training.module import LoraModule
from sa3train.training.settings import LossSettings, TrainingSettings
from sa3train.training.step import StepDraw


@pytest.fixture(scope="module")
def module() -> LoraModule:
    settings = TrainingSettings(loss=LossSettings(silence_seconds=0.0))
    module = make_module(AdapterSpec("dora-rows", rank=4), settings)
    with torch.no_grad():
        for parameter in module.injected.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return module


def packed_batch(shards: Path) -> dict[str, Any]:
    return next(iter(make_data_module(shards, 2, pack_frames=40, seed=2).train_dataloader()))


def test_rows_become_clips_and_clips_rows(shards: Path) -> None:
    batch = packed_batch(shards)
    clips = make_clip_batch(batch)
    ids = batch["segment_ids_BT"]
    assert len(clips) == len(batch["keys"]) > 2 and not clips.at_end_S.any()
    for number in range(len(clips)):
        row = int((ids == number).any(dim=1).nonzero()[0, 0])
        expected = batch["latents_BCT"][row][:, ids[row] == number]
        length = expected.shape[1]
        assert torch.equal(clips.data_SCF[number, :, :length], expected)
        assert clips.attention_mask_SF[number].tolist() == [True] * length + [False] * (
            clips.data_SCF.shape[2] - length
        )
    back = pack_rows(clips.data_SCF, ids, clips.attention_mask_SF)
    real = (ids >= 0)[:, None, :]
    assert torch.equal(back, torch.where(real, batch["latents_BCT"], 0.0))
    assert torch.equal(unpack_rows(back, ids, clips.attention_mask_SF), clips.data_SCF)


def test_a_packed_batch_trains_as_its_clips_one_by_one(shards: Path, module: LoraModule) -> None:
    clips = make_clip_batch(packed_batch(shards))
    draw = module.draw(clips, 5)
    together = module.compute_losses(clips, draw)
    apart = []
    for row in range(len(clips)):
        length = int(clips.attention_mask_SF[row].sum())
        one = ClipBatch(
            clips.data_SCF[row : row + 1, :, :length], clips.attention_mask_SF[row : row + 1, :length],
            clips.seconds_S[row : row + 1], clips.at_end_S[row : row + 1], [clips.prompts[row]], [clips.keys[row]],
        )  # fmt: skip
        own = StepDraw(*(getattr(draw, name)[row : row + 1] for name in StepDraw.__dataclass_fields__))
        cut = StepDraw(
            own.noise_BCT[:, :, :length], own.t_B, own.attention_mask_BT[:, :length],
            own.inpaint_mask_B1T[:, :, :length], own.dropped_B,
        )  # fmt: skip
        apart.append(module.compute_losses(one, cut))
    items = torch.cat([losses.item_loss_B for losses in apart])
    torch.testing.assert_close(together.item_loss_B, items, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.loss, torch.stack([losses.loss for losses in apart]).mean())


def test_packed_training_runs(shards: Path, tmp_path: Path) -> None:
    run = Trial(
        shards, tmp_path / "packed", max_steps=2, data={"pack_frames": 40}, loss=LossSettings(silence_seconds=0.0)
    )
    run.tail = 0.0
    assert run.run().steps == 2
