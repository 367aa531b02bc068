"""Packed rows and rows of one clip are the same clips, and train the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.golden import GOLDEN
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.batch import Clips, clips_of, to_clips, to_rows
from sa3train.training.module import LoraModule
from sa3train.training.prompt_embeddings import PromptBank
from sa3train.training.run import make_module
from sa3train.training.settings import LoopSettings, Objective, OptimizerSettings, ScheduleSettings
from sa3train.training.step import Draw


@pytest.fixture(scope="module")
def module() -> LoraModule:
    model = load_checkpoint(GOLDEN / "plain", parts=("dit", "conditioner"))
    torch.manual_seed(0)
    injected = inject(model.adaptable(), AdapterSpec("dora-rows", rank=4))
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return make_module(
        model, injected, PromptBank(model.conditioner), objective=Objective(silence_seconds=0.0),
        optimizer=OptimizerSettings(), schedule=ScheduleSettings(), loop=LoopSettings(), seed=0,
    )  # fmt: skip


def packed_batch(shards: Path) -> dict[str, Any]:
    return next(iter(LatentDataModule(str(shards), 2, pack_frames=40, seed=2).train_dataloader()))


def test_rows_become_clips_and_clips_rows(shards: Path) -> None:
    batch = packed_batch(shards)
    clips = clips_of(batch)
    ids = batch["segment_ids_BT"]
    assert len(clips) == len(batch["keys"]) > 2 and not clips.at_end_S.any()
    for number in range(len(clips)):
        row = int((ids == number).any(dim=1).nonzero()[0, 0])
        expected = batch["latents_BCT"][row][:, ids[row] == number]
        length = expected.shape[1]
        assert torch.equal(clips.data_SCF[number, :, :length], expected)
        assert clips.padding_mask_SF[number].tolist() == [True] * length + [False] * (clips.data_SCF.shape[2] - length)
    back = to_rows(clips.data_SCF, ids, clips.padding_mask_SF)
    real = (ids >= 0)[:, None, :]
    assert torch.equal(back, torch.where(real, batch["latents_BCT"], 0.0))
    assert torch.equal(to_clips(back, ids, clips.padding_mask_SF), clips.data_SCF)


def test_a_packed_batch_trains_as_its_clips_one_by_one(shards: Path, module: LoraModule) -> None:
    clips = clips_of(packed_batch(shards))
    draw = module.draw(clips, 5)
    together = module.losses(clips, draw)
    apart = []
    for row in range(len(clips)):
        length = int(clips.padding_mask_SF[row].sum())
        one = Clips(
            clips.data_SCF[row : row + 1, :, :length], clips.padding_mask_SF[row : row + 1, :length],
            clips.seconds_S[row : row + 1], clips.at_end_S[row : row + 1], [clips.prompts[row]], [clips.keys[row]],
        )  # fmt: skip
        own = Draw(*(getattr(draw, name)[row : row + 1] for name in Draw.__dataclass_fields__))
        cut = Draw(
            own.noise_BCT[:, :, :length], own.t_B, own.padding_mask_BT[:, :length],
            own.inpaint_mask_B1T[:, :, :length], own.dropped_B,
        )  # fmt: skip
        apart.append(module.losses(one, cut))
    items = torch.cat([losses.item_loss_B for losses in apart])
    torch.testing.assert_close(together.item_loss_B, items, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.loss, torch.stack([losses.loss for losses in apart]).mean())


def test_packed_training_runs(trial: Callable[..., Any]) -> None:
    run = trial("packed", max_steps=2, data={"pack_frames": 40}, objective=Objective(silence_seconds=0.0))
    run.tail = 0.0
    assert run.run().steps == 2
