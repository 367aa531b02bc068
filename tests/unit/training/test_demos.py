"""Demos: the same seeds at every step, base beside adapter, on both twins, nothing normalised, training undisturbed."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from sa3train.adapters.formats import load_adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.data.datamodule import LatentDataModule
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.demos import demos_of, played_demos, players
from sa3train.training.fixed import heldout_items
from sa3train.training.folder import open_run
from sa3train.training.run import train
from sa3train.training.settings import (
    DemoSettings,
    JudgeSettings,
    LoopSettings,
    Objective,
    OptimizerSettings,
    SaveSettings,
    ScheduleSettings,
)
from sa3train.training.text import PromptBank
from sa3train.training.tracking import CsvSink, Tracker

SETTINGS = DemoSettings(every=2, prompts=["warm pads"], heldout_prompts=1, duration=1.0, strengths=[0.5, 1.0], steps=2)


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.sounds: dict[tuple[str, int], torch.Tensor] = {}
        self.images: dict[tuple[str, int], bytes] = {}

    def metrics(self, values: Any, step: int) -> None:
        pass

    def audio(self, name: str, audio_CN: torch.Tensor, sample_rate: int, step: int, caption: str) -> None:
        self.sounds[name, step] = audio_CN

    def image(self, name: str, png: bytes, step: int, caption: str) -> None:
        self.images[name, step] = png

    def adapter(self, path: Path, metadata: Any, aliases: Any) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    model = load_checkpoint("nano-base", parts=("dit",))
    return Path(helpers.make_shards(tmp_path_factory.mktemp("demo") / "d", [12, 14, 12, 13], 1, model.latent_channels))


def run(folder: Path, latents: Path, demos: DemoSettings | None, report: bool = False) -> Recorder:
    torch.set_num_threads(1)
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    data = LatentDataModule(str(latents), 2, tail_seconds=0.3, seed=1, pool=2)
    data.setup()
    text = PromptBank(model.conditioner)
    text.prepare(data.distinct_prompts() or [])
    opened = open_run(folder, {"demos": demos is not None}, {"data": data.manifest}, resume=False)
    recorder = Recorder()
    loop = LoopSettings(max_steps=2, log_every=1, accelerator="cpu", activation_checkpointing="none")
    train(
        run=opened, model=model, data=data, text=text, spec=AdapterSpec("dora-rows", rank=2, dropout=0.1),
        objective=Objective(), optimizer=OptimizerSettings(lr=1e-2), schedule=ScheduleSettings(), loop=loop,
        save=SaveSettings(2, 1), judge=JudgeSettings(every=2, clips=1), demos=demos, report=report,
        tracker=Tracker([CsvSink(folder / "metrics.csv"), recorder]), provenance={"base_model": "nano-base"}, seed=3,
    )  # fmt: skip
    return recorder


@pytest.fixture(scope="module")
def played(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run(folder, latents, SETTINGS, report=True)


def test_base_once_then_the_adapter_at_each_strength_on_both_twins(played: tuple[Path, Recorder]) -> None:
    found = played_demos(played[0])
    kinds = {(entry.step, entry.strength) for entry in found}
    assert kinds == {(0, 0.0), (2, 0.5), (2, 1.0)}
    assert {entry.model for entry in found} == {"nano-base", "nano"}
    assert {(entry.demo, entry.mode) for entry in found} == {
        ("prompt0", "text"), ("heldout0", "text"), ("inpaint", "inpaint"),
    }  # fmt: skip
    assert len(found) == 3 * 2 * 3
    for demo in {entry.demo for entry in found}:
        assert len({(entry.seed, entry.prompt) for entry in found if entry.demo == demo}) == 1


def test_every_demo_has_its_files_and_reaches_the_trackers(played: tuple[Path, Recorder]) -> None:
    folder, recorder = played
    for entry in played_demos(folder):
        assert (folder / entry.picture).read_bytes().startswith(b"\x89PNG")
        name = f"demos/{entry.model}/{entry.demo}/{entry.strength:g}"
        sound, rate = soundfile.read(folder / entry.file, always_2d=True)
        tracked = recorder.sounds[name, entry.step]
        assert rate == 44100
        assert sound.shape == (tracked.shape[1], 2)
        assert abs(sound - tracked.clamp(-1, 1).T.numpy()).max() < 1e-4, "the level is the generation's own"
        assert (f"{name}/mel", entry.step) in recorder.images


def test_what_is_played_is_what_the_adapter_gives(played: tuple[Path, Recorder]) -> None:
    folder, recorder = played
    generator = Generator.from_pretrained("nano-base", device="cpu", precision="fp32")
    wanted = {"prompt": "warm pads", "duration": 1.0, "steps": 2, "seed": 0}
    base = generator.generate(**wanted).audio[0]
    torch.testing.assert_close(recorder.sounds["demos/nano-base/prompt0/0", 0], base)
    generator.load_adapter(load_adapter(folder / "adapter.safetensors"), strength=0.5)
    half = generator.generate(**wanted).audio[0]
    heard = recorder.sounds["demos/nano-base/prompt0/0.5", 2]
    assert not torch.equal(heard, base)
    torch.testing.assert_close(heard, half, atol=2e-3, rtol=2e-3)  # the file is fp16


def test_measures_are_curves(played: tuple[Path, Recorder]) -> None:
    with (played[0] / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    for measure in ("loudness_lufs", "true_peak_db", "spectral_centroid_hz", "stereo_width"):
        assert rows[0][f"demos/nano/0/{measure}"]
        assert rows[2][f"demos/nano-base/0.5/{measure}"]
        assert rows[2][f"demos/nano/1/{measure}"]


def test_training_is_the_same_without_demos(
    played: tuple[Path, Recorder], latents: Path, tmp_path: Path, helpers: Any
) -> None:
    run(tmp_path / "silent", latents, None)
    assert helpers.losses_of(tmp_path / "silent") == helpers.losses_of(played[0])
    silent, loud = helpers.adapter_of(tmp_path / "silent"), helpers.adapter_of(played[0])
    assert all(torch.equal(silent[name], loud[name]) for name in loud)
    assert (tmp_path / "silent/heldout.json").read_text() == (played[0] / "heldout.json").read_text()
    assert not (tmp_path / "silent/demos").exists()
    assert not (tmp_path / "silent/report.html").exists()


def test_the_report_of_a_real_run_has_its_demos_and_its_end(played: tuple[Path, Recorder]) -> None:
    page = (played[0] / "report.html").read_text()
    assert "finished" in page
    assert page.count("<audio") == len(played_demos(played[0]))
    for file in ("data.json", "inspection.json", "machine.json"):
        assert json.loads((played[0] / file).read_text())
    inspection = json.loads((played[0] / "inspection.json").read_text())
    assert inspection["step"] == 2
    assert 0 < inspection["effect"]["all"] < 1
    assert len(inspection["layers"]) > 10


def test_what_is_played_follows_the_settings(latents: Path) -> None:
    data = LatentDataModule(str(latents), 1)
    data.setup()
    heldout = heldout_items(data, 4)
    names = [demo.name for demo in demos_of(SETTINGS, heldout)]
    assert names == ["prompt0", "heldout0", "inpaint"]
    assert [demo.name for demo in demos_of(SETTINGS, [])] == ["prompt0"]
    assert demos_of(DemoSettings(heldout_prompts=0, inpaint=False), heldout) == []


def test_the_twin_is_played_only_when_wanted() -> None:
    model = load_checkpoint("nano-base", parts=("dit",))
    assert players(model, "nano-base", sibling=True) == ["nano-base", "nano"]
    assert players(model, "nano-base", sibling=False) == ["nano-base"]


def test_a_demo_that_cannot_be_played_does_not_end_the_run(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sa3train.errors import AdapterError

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AdapterError("it holds NaN")

    monkeypatch.setattr(Generator, "load_adapter", refuse)
    run(tmp_path / "run", latents, SETTINGS)
    assert (tmp_path / "run/adapter.safetensors").is_file()
    assert "no demos at step 2: it holds NaN" in caplog.text
    assert {entry.step for entry in played_demos(tmp_path / "run")} == {0}
