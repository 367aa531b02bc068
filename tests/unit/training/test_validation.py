"""The fixed evaluation: the same question each time, the base as its zero line, and what is decided by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.golden import GOLDEN
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import ConfigError
from sa3train.data.loading.datamodule import LatentDataModule
from sa3train.diffusion.objective import squared_error
from sa3train.models.checkpoint import load_checkpoint
from sa3train.reports.run_files import read_metrics
from sa3train.training.callbacks.validation import LEVELS, heldout_items, loss_table, training_items, verdict
from sa3train.training.module import LoraModule
from sa3train.training.prompt_embeddings import PromptBank
from sa3train.training.run import make_module
from sa3train.training.settings import JudgeSettings, LoopSettings, Objective, OptimizerSettings, ScheduleSettings
from sa3train.training.step import Draw, seed_of

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def module() -> LoraModule:
    model = load_checkpoint(GOLDEN / "plain", parts=("dit", "conditioner"))
    torch.manual_seed(0)
    injected = inject(model.adaptable(), AdapterSpec("lora", rank=2))
    return make_module(
        model, injected, PromptBank(model.conditioner), objective=Objective(loss="huber", huber_delta=0.1),
        optimizer=OptimizerSettings(), schedule=ScheduleSettings(), loop=LoopSettings(), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(shards: Path) -> LatentDataModule:
    return LatentDataModule(str(shards), 3, seed=5, crop_frames=10)


def test_the_items_are_fixed_and_held_out_ones_are_not_trained_on(data: LatentDataModule) -> None:
    held, trained = heldout_items(data, 100), training_items(data, 5)
    assert [item.key for item in held] == [f"clip-{n:03d}" for n in range(12, 16)] and len(trained) == 5
    assert len(heldout_items(data, 2)) == 2 and not {item.key for item in held} & {item.key for item in trained}
    again = training_items(LatentDataModule(data.sources, 7, seed=5, crop_frames=10), 5)
    for one, two in zip(trained, again, strict=True):
        assert one.key == two.key and torch.equal(one.clip.data_SCF, two.clip.data_SCF)


def test_each_entry_is_the_plain_squared_error_at_its_level_on_the_clips_own_noise(
    module: LoraModule, data: LatentDataModule
) -> None:
    items = heldout_items(data, 3)
    table = loss_table(module, items, seed=9, rows=20)
    assert table.loss_IN.shape == (3, 10) and table.keys == tuple(item.key for item in items)
    for number in (0, 2):
        clip = items[number].clip
        frames, channels = clip.data_SCF.shape[2], clip.data_SCF.shape[1]
        generator = torch.Generator().manual_seed(seed_of(9, "fixed", items[number].key))
        noise = torch.randn(frames, channels, generator=generator).T[None]
        for level in (0, 6):
            t = torch.tensor([LEVELS[level]])
            draw = Draw(noise, t, clip.padding_mask_SF, torch.zeros(1, 1, frames), torch.zeros(1, dtype=torch.bool))
            with torch.no_grad():
                error = squared_error(module(clip, draw), noise - clip.data_SCF)
            assert float(table.loss_IN[number, level]) == pytest.approx(float(error.mean()), rel=1e-4)


def test_the_numbers_do_not_depend_on_how_the_work_is_cut_and_touch_no_random_state(
    module: LoraModule, data: LatentDataModule
) -> None:
    items = heldout_items(data, 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = loss_table(module, items, seed=0, rows=10), loss_table(module, items, seed=0, rows=1000)
    torch.testing.assert_close(one.loss_IN, two.loss_IN, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.trained.values())
    assert one.mean == pytest.approx(sum(one.by_item) / 4) == pytest.approx(sum(one.by_level) / 10)


def test_a_run_is_judged_against_the_base_at_every_interval(trial: Make) -> None:
    run = trial("judged", max_steps=6, judge=JudgeSettings(every=2, clips=3))
    result = run.run()
    found = json.loads((run.run_dir / "heldout.json").read_text())
    assert [row["step"] for row in found["history"]] == [0, 2, 4, 6]
    for part in ("heldout", "train"):
        assert found["history"][0][part]["loss"] == pytest.approx(found["base"][part]["loss"], abs=1e-6), (
            "no change yet"
        )
        assert found["history"][-1][part]["loss"] < found["base"][part]["loss"], "it learns"
        assert len(found["base"][part]["by_level"]) == 10
        assert {item["key"] for item in found["items"][part]} and all(item["adapter"] for item in found["items"][part])
    assert "held-out clips: base" in result.verdict[0] and "-" in result.verdict[0]
    _, rows = read_metrics(run.run_dir / "metrics.csv")
    last = {name: float(value) for name, value in rows[-1].items()}
    held, train = found["history"][-1]["heldout"], found["history"][-1]["train"]
    assert last["heldout/loss"] == held["loss"] and last["heldout/gap"] == held["loss"] - train["loss"]
    assert [last[f"heldout/level/{level:.2f}"] for level in LEVELS] == held["by_level"]
    assert any(name.startswith("train/level/") for name in last)


def test_the_base_is_the_zero_line_even_when_an_earlier_adapter_is_continued(trial: Make) -> None:
    first = trial("first", max_steps=3, judge=JudgeSettings(every=3, clips=2))
    first.run()
    second = trial("second", max_steps=1, judge=JudgeSettings(every=1, clips=2))
    second.start_from = load_adapter(first.run_dir / "adapter.safetensors")
    second.run()
    one, two = (json.loads((run.run_dir / "heldout.json").read_text()) for run in (first, second))
    assert two["base"]["heldout"] == one["base"]["heldout"]
    assert two["history"][0]["heldout"]["loss"] == pytest.approx(one["history"][-1]["heldout"]["loss"], abs=1e-4)


def test_the_best_adapter_is_kept_and_a_run_without_progress_stops(trial: Make) -> None:
    """A rate so high that the first judgement after the base is already worse."""
    run = trial(
        "best",
        max_steps=12,
        optimizer=OptimizerSettings(lr=0.5),
        judge=JudgeSettings(every=2, clips=2, select_best=True, patience=2),
        save_every=100,
    )
    result = run.run()
    found = json.loads((run.run_dir / "heldout.json").read_text())
    losses = {row["step"]: row["heldout"]["loss"] for row in found["history"]}
    best = min(losses, key=lambda step: losses[step])
    assert found["best_step"] == best and result.steps < 12 and result.steps == best + 4
    assert load_adapter(result.adapter).metadata["step"] == str(best)
    assert f"best held-out loss {losses[best]:.4f} was at step {best}" in result.verdict
    assert run.run(resume=True).steps == result.steps, "it stays stopped"


def test_selection_without_held_out_clips_is_refused(trial: Make, shard_maker: Make) -> None:
    whole = shard_maker("whole", [8] * 6, heldout=0)
    with pytest.raises(ConfigError, match="this data has none"):
        trial("x", shards=whole, judge=JudgeSettings(clips=2, select_best=True)).run()
    run = trial("y", shards=whole, max_steps=1, judge=JudgeSettings(clips=2, every=1))
    assert "training clips" in run.run().verdict[0]
    with pytest.raises(ConfigError, match="no effect with enabled=false"):
        JudgeSettings(enabled=False, patience=1)


def test_the_verdict_is_in_words() -> None:
    summary = {
        "base": {"heldout": {"loss": 2.0}},
        "history": [{"step": 4, "heldout": {"loss": 1.0}}, {"step": 8, "heldout": {"loss": 1.5}}],
        "best_step": 4,
        "best_loss": 1.0,
    }
    lines = verdict(summary)
    assert "held-out clips: base 2.0000 -> adapter 1.5000 (-25.0 %) at step 8" in lines[0]
    assert lines[1] == "best held-out loss 1.0000 was at step 4"
