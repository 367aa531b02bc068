"""The fixed evaluation: the same question each time, the base as its zero line, and what is decided by it."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from helpers.shards import make_data_module
from helpers.training import Trial, make_module, make_shards
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import ConfigError
from sa3train.core.seeds import derive_seed
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.diffusion.objective import compute_squared_error
from sa3train.reports.run_files import read_metrics
from sa3train.training.callbacks.validation import (
    LEVELS,
    ValidationCallback,
    list_heldout_clips,
    list_training_clips,
    measure_module_losses,
)
from sa3train.training.module import LoraModule
from sa3train.training.settings import LossSettings, OptimizerSettings, TrainingSettings, ValidationSettings
from sa3train.training.step import make_plain_draw


@pytest.fixture(scope="module")
def module() -> LoraModule:
    settings = TrainingSettings(loss=LossSettings(function="huber", huber_delta=0.1))
    return make_module(AdapterSpec("lora", rank=2), settings)


@pytest.fixture(scope="module")
def data(shards: Path) -> LatentDataModule:
    return make_data_module(shards, 3, seed=5, crop_frames=10)


def test_the_items_are_fixed_and_held_out_ones_are_not_trained_on(data: LatentDataModule) -> None:
    held, trained = list_heldout_clips(data, 100), list_training_clips(data, 5)
    assert [clip.keys[0] for clip in held] == [f"clip-{n:03d}" for n in range(12, 16)] and len(trained) == 5
    assert len(list_heldout_clips(data, 2)) == 2 and not {clip.keys[0] for clip in held} & {
        clip.keys[0] for clip in trained
    }
    again = list_training_clips(make_data_module(data.sources, 7, seed=5, crop_frames=10), 5)
    for one, two in zip(trained, again, strict=True):
        assert one.keys == two.keys and torch.equal(one.data_SCF, two.data_SCF)


def test_each_entry_is_the_plain_squared_error_at_its_level_on_the_clips_own_noise(
    module: LoraModule, data: LatentDataModule
) -> None:
    items = list_heldout_clips(data, 3)
    loss_IN = measure_module_losses(module, items, seed=9, batch_size=20)
    assert loss_IN.shape == (3, 10)
    for number in (0, 2):
        clip = items[number]
        frames, channels = clip.data_SCF.shape[2], clip.data_SCF.shape[1]
        generator = torch.Generator().manual_seed(derive_seed(9, "fixed", clip.keys[0]))
        noise = torch.randn(frames, channels, generator=generator).T[None]
        for level in (0, 6):
            t = torch.tensor([LEVELS[level]])
            draw = make_plain_draw(noise, t, clip.attention_mask_SF)
            with torch.no_grad():
                error = compute_squared_error(module(clip, draw), noise - clip.data_SCF)
            assert float(loss_IN[number, level]) == pytest.approx(float(error.mean()), rel=1e-4)


def test_the_numbers_do_not_depend_on_how_the_work_is_cut_and_touch_no_random_state(
    module: LoraModule, data: LatentDataModule
) -> None:
    items = list_heldout_clips(data, 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = (
        measure_module_losses(module, items, seed=0, batch_size=10),
        measure_module_losses(module, items, seed=0, batch_size=1000),
    )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.trainable.values())


@pytest.mark.slow
def test_a_run_is_judged_against_the_base_at_every_interval(shards: Path, tmp_path: Path) -> None:
    run = Trial(shards, tmp_path / "judged", max_steps=6, validation=ValidationSettings(every=2, clips=3))
    result = run.run()
    found = json.loads((run.run_dir / "validation.json").read_text())
    assert [row["step"] for row in found["history"]] == [0, 2, 4, 6]
    for part in ("val", "train_eval"):
        assert found["history"][0][part]["loss"] == pytest.approx(found["base"][part]["loss"], abs=1e-6), (
            "no change yet"
        )
        assert found["history"][-1][part]["loss"] < found["base"][part]["loss"], "it learns"
        assert len(found["base"][part]["by_level"]) == 10
        assert {item["key"] for item in found["items"][part]} and all(item["adapter"] for item in found["items"][part])
    assert "held-out clips: base" in result.summary[0] and "-" in result.summary[0]
    _, rows = read_metrics(run.run_dir / "metrics.csv")
    last = {name: float(value) for name, value in rows[-1].items()}
    held, train = found["history"][-1]["val"], found["history"][-1]["train_eval"]
    assert last["val/loss"] == held["loss"] and last["val/gap"] == held["loss"] - train["loss"]
    assert last["val/loss_delta"] == held["loss"] - found["base"]["val"]["loss"]
    assert [last[f"val/level/{level:.2f}"] for level in LEVELS] == held["by_level"]
    assert any(name.startswith("train/level/") for name in last)


@pytest.mark.slow
def test_the_base_is_the_zero_line_even_when_an_earlier_adapter_is_continued(shards: Path, tmp_path: Path) -> None:
    first = Trial(shards, tmp_path / "first", max_steps=3, validation=ValidationSettings(every=3, clips=2))
    first.run()
    second = Trial(shards, tmp_path / "second", max_steps=1, validation=ValidationSettings(every=1, clips=2))
    second.start_from = load_adapter(first.run_dir / "adapter.safetensors")
    second.run()
    one, two = (json.loads((run.run_dir / "validation.json").read_text()) for run in (first, second))
    assert two["base"]["val"] == one["base"]["val"]
    assert two["history"][0]["val"]["loss"] == pytest.approx(one["history"][-1]["val"]["loss"], abs=1e-4)


def test_the_best_adapter_is_kept_and_a_run_without_progress_stops(shards: Path, tmp_path: Path) -> None:
    """A rate so high that the first judgement after the base is already worse."""
    run = Trial(
        shards,
        tmp_path / "best",
        max_steps=12,
        optimizer=OptimizerSettings(lr=0.5),
        validation=ValidationSettings(every=2, clips=2, select_best=True, patience=2),
        save_every=100,
    )
    result = run.run()
    found = json.loads((run.run_dir / "validation.json").read_text())
    losses = {row["step"]: row["val"]["loss"] for row in found["history"]}
    best = min(losses, key=lambda step: losses[step])
    assert found["best_step"] == best and result.steps < 12 and result.steps == best + 4
    assert load_adapter(result.adapter).metadata["step"] == str(best)
    assert f"best validation loss {losses[best]:.4f} was at step {best}" in result.summary
    assert run.run(resume=True).steps == result.steps, "it stays stopped"


def test_selection_without_held_out_clips_is_refused(shards: Path, tmp_path: Path) -> None:
    whole = make_shards(tmp_path / "whole", [8] * 6, heldout=0)
    with pytest.raises(ConfigError, match="this data has none"):
        Trial(whole, tmp_path / "x", validation=ValidationSettings(clips=2, select_best=True)).run()
    run = Trial(whole, tmp_path / "y", max_steps=1, validation=ValidationSettings(clips=2, every=1))
    assert "training clips" in run.run().summary[0]
    with pytest.raises(ConfigError, match="no effect with enabled=false"):
        ValidationSettings(enabled=False, patience=1)


@pytest.mark.parametrize(("first", "is_known"), [(0, True), (1, False)])
def test_a_resumed_run_pairs_the_same_clips_only(
    data: LatentDataModule, tmp_path: Path, first: int, is_known: bool
) -> None:
    every, nothing = list_heldout_clips(data, 4), cast(Any, None)

    def make(clips: list[ClipBatch]) -> ValidationCallback:
        return ValidationCallback(tmp_path, nothing, nothing, clips, [], ValidationSettings())

    before, resumed = make(every[:3]), make(every[first : first + 3])
    before.base["val"] = before.last["val"] = torch.ones(3, 10)
    before.history = [{"step": 2, "val": {"loss": 1.0, "by_clip": [1.0] * 3}}]
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    assert ("val" in resumed.base) == ("by_clip" in resumed.history[0]["val"]) == is_known


def test_the_verdict_is_in_words() -> None:
    summary = {
        "base": {"val": {"loss": 2.0}},
        "history": [{"step": 4, "val": {"loss": 1.0}}, {"step": 8, "val": {"loss": 1.5}}],
        "best_step": 4,
        "best_loss": 1.0,
        "items": {"val": [{"base": 2.0, "adapter": 1.4}, {"base": 2.0, "adapter": 1.6}]},
    }
    lines = ValidationCallback.describe(summary)
    assert (
        "base 2.0000 -> adapter 1.5000, 25.2% lower per clip (±100.0%, 2 clips: too few to tell), at step 8" in lines[0]
    )
    assert lines[1] == "best validation loss 1.0000 was at step 4"
