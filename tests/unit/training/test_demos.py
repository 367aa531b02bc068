"""Demos: same seeds, base against adapter, levels untouched, and training none the wiser."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch

from helpers.golden import GOLDEN
from helpers.shards import make_data_module
from helpers.training import Trial, read_adapter, read_losses
from sa3train.adapters.formats.io import load_adapter
from sa3train.core.errors import ConfigError
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_checkpoint
from sa3train.reports.run_files import list_demos, read_metrics
from sa3train.training.callbacks.demos import DemoCallback, list_demo_models, plan_demos
from sa3train.training.callbacks.validation import list_heldout_clips
from sa3train.training.checks import match_demo_steps
from sa3train.training.loggers import LoggerCollection
from sa3train.training.settings import CallbackSettings, DemoSettings, LossSettings, TrainingSettings

SETTINGS = DemoSettings(
    every=2, prompts=["a hum"], heldout_prompts=1, duration=0.6, steps=2, cfg_scale=2.0, strengths=[0.5, 1.0], seed=4
)


@pytest.fixture(scope="module")
def played(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two runs of three steps, one with demos."""
    folder = tmp_path_factory.mktemp("demos")
    with_demos, without = (Trial(shards, folder / name, max_steps=3) for name in ("with", "without"))
    with_demos.demos = SETTINGS
    with_demos.run()
    without.run()
    return with_demos, without


@pytest.mark.slow
def test_demos_are_at_step_0_every_interval_and_the_end(played: Any) -> None:
    found = list_demos(played[0].run_dir)
    assert [(entry.step, entry.strength) for entry in found if entry.demo == "prompt0"] == [
        (0, 0.0), (2, 0.5), (2, 1.0), (3, 0.5), (3, 1.0)
    ]  # fmt: skip
    assert {entry.demo for entry in found} == {"prompt0", "heldout0", "inpaint"}
    assert {entry.mode for entry in found} == {"text", "inpaint"}
    assert {entry.prompt for entry in found if entry.demo == "heldout0"} == {"caption 0"}, "of a held-out clip"
    for entry in found:
        audio, rate = soundfile.read(played[0].run_dir / entry.file)
        assert rate == 44100 and audio.shape[1] == 2 and (played[0].run_dir / entry.picture).stat().st_size > 1000
        assert set(entry.measures) >= {"loudness_lufs", "true_peak_db", "spectral_centroid_hz", "stereo_width"}
    assert len({entry.seed for entry in found if entry.demo == "prompt0"}) == 1, "the same seed every time"


@pytest.mark.slow
def test_training_does_not_notice(played: Any) -> None:
    one, two = played
    assert read_losses(one.run_dir) == read_losses(two.run_dir)
    expected, found = read_adapter(two.run_dir), read_adapter(one.run_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_demos_of_a_stopped_run_are_played_when_it_is_resumed(played: Any, shards: Path, tmp_path: Path) -> None:
    part = Trial(shards, tmp_path / "part", max_steps=3, demos=SETTINGS, stop_after=2)
    part.run()
    assert {entry.step for entry in list_demos(part.run_dir)} == {0}
    part.stop_after = None
    part.run(resume=True)
    expected = list_demos(played[0].run_dir)
    assert list_demos(part.run_dir) == expected
    for entry in expected:
        assert (part.run_dir / entry.file).read_bytes() == (played[0].run_dir / entry.file).read_bytes(), entry


@pytest.mark.slow
def test_a_stop_in_the_last_demos_leaves_them_for_the_resumed_run(played: Any, shards: Path, tmp_path: Path) -> None:
    part = Trial(shards, tmp_path / "part", max_steps=3, demos=SETTINGS, stop_after=3)
    part.run()
    assert {entry.step for entry in list_demos(part.run_dir)} == {0, 2}
    part.stop_after = None
    part.run(resume=True)
    assert list_demos(part.run_dir) == list_demos(played[0].run_dir)


@pytest.mark.slow
def test_what_is_played_is_what_the_adapter_plays_at_its_own_level(played: Any) -> None:
    run_dir = played[0].run_dir
    generator = Generator.from_pretrained(GOLDEN / "plain", device="cpu", precision="fp32")
    entries = {(entry.step, entry.strength): entry for entry in list_demos(run_dir) if entry.demo == "prompt0"}
    settings: dict[str, Any] = {"prompt": "a hum", "duration": 0.6, "steps": 2, "cfg_scale": 2.0, "seed": 4}
    base = generator.generate(**settings).audio[0]
    generator.load_adapter(load_adapter(run_dir / "adapter.safetensors"), strength=1.0)
    adapted = generator.generate(**settings).audio[0]
    for key, expected in (((0, 0.0), base), ((3, 1.0), adapted)):
        audio, _ = soundfile.read(run_dir / entries[key].file, dtype="float32")
        torch.testing.assert_close(torch.from_numpy(audio.T), expected, atol=2e-3, rtol=0)  # 16-bit audio, F16 adapter
    assert not torch.equal(base, adapted)


@pytest.mark.slow
def test_measures_are_curves_by_model_and_strength(played: Any) -> None:
    _, rows = read_metrics(played[0].run_dir / "metrics.csv")
    by_step = {int(row["step"]): row for row in rows}
    assert "demos/plain/0/loudness_lufs" in by_step[0] and "demos/plain/1/stereo_width" in by_step[2]
    index = json.loads((played[0].run_dir / "demos" / "step-00000002" / "demos.json").read_text())
    values = [entry["measures"]["true_peak_db"] for entry in index if entry["strength"] == 0.5]
    assert float(by_step[2]["demos/plain/0.5/true_peak_db"]) == pytest.approx(sum(values) / len(values))


def test_the_twin_is_played_when_it_is_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nano = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    assert list_demo_models(nano, "nano-base", also_sibling=True) == ["nano-base", "nano"]
    assert list_demo_models(nano, "nano-base", also_sibling=False) == ["nano-base"]
    golden = load_checkpoint(GOLDEN / "plain", parts=("dit", "conditioner"))
    assert list_demo_models(golden, "here", also_sibling=True) == ["here"]


def test_demos_come_from_the_recipe_and_from_held_out_captions(shards: Path) -> None:
    items = list_heldout_clips(make_data_module(shards, 2), 10)
    found = plan_demos(DemoSettings(prompts=["x", "y"], heldout_prompts=3, duration=5.0), items)
    assert [demo.name for demo in found] == ["prompt0", "prompt1", "heldout0", "heldout1", "heldout2", "inpaint"]
    assert len({demo.seed for demo in found}) == 6 and found[-1].duration == 2.0, "no longer than the clip"
    assert plan_demos(DemoSettings(heldout_prompts=0, inpaint=False, memorization_clips=2), items) == []
    assert plan_demos(DemoSettings(), []) == []


def test_steps_are_those_of_the_trained_model_and_its_twin_plays_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the post-trained model itself is trained: few steps are its few."""
    asked: list[tuple[str, Any, Any]] = []

    def generate(self: Generator, **settings: Any) -> Any:
        asked.append((self.model.name, settings.get("steps"), settings.get("cfg_scale")))
        return SimpleNamespace(audio=[torch.zeros(2, 4410)])

    monkeypatch.setattr(Generator, "generate", generate)
    settings = DemoSettings(prompts=["x"], steps=3, cfg_scale=2.0)
    DemoCallback(tmp_path, LoggerCollection(), settings, [], ["nano", "nano-base"]).play(None, 0)
    assert asked == [("nano", 3, 2.0), ("nano-base", None, None)]


def test_what_is_trained_at_a_samplers_levels_is_played_in_its_steps() -> None:
    few, every = LossSettings(timesteps="levels", sampler_steps=4, shift="none"), LossSettings()
    for demos, loss, expected in (
        (DemoSettings(), few, 4),
        (DemoSettings(steps=8), few, 8),
        (DemoSettings(), every, None),
    ):
        settings = TrainingSettings(loss=loss, callbacks=CallbackSettings(demos=demos))
        assert match_demo_steps(settings).callbacks.demos.steps == expected


def test_demos_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.demos has nothing"):
        DemoSettings(heldout_prompts=0, inpaint=False)
