"""Training on the autoencoder's decoder: its losses, its clips, and whole runs that are stopped and resumed."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from helpers.audio import tone
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.cli.train import main
from sa3train.core.errors import ConfigError, DataError
from sa3train.models.checkpoint import load_checkpoint
from sa3train.reports.run_files import read_metrics, read_run
from sa3train.reports.run_report import render_report
from sa3train.training.callbacks.checkpoint import CheckpointCallback
from sa3train.training.decoder.clips import AudioClips, CropLoader
from sa3train.training.decoder.losses import compute_stft_loss, compute_waveform_loss, split_mid_side
from sa3train.training.decoder.module import DecoderModule, count_crop_samples
from sa3train.training.decoder.round_trips import RoundTripDemoCallback, measure_round_trips, play_round_trips
from sa3train.training.decoder.settings import (
    DecoderDemoSettings,
    DecoderLossSettings,
    DecoderSettings,
    DecoderValidationSettings,
)
from sa3train.training.loggers import LoggerCollection
from sa3train.training.settings import TrainerSettings

QUICK = (
    "recipe=decoder", "model=nano-base", "trainer.max_steps=2", "trainer.threads=1", "trainer.log_every=1",
    "scheduler.warmup_steps=0", "data.crop_seconds=0.2", "data.batch_size=2", "callbacks.checkpoint.every=1",
    "callbacks.validation.clips=1", "callbacks.validation.seconds=0.3", "callbacks.validation.round_trips=2",
    "callbacks.validation.every=2", "callbacks.demos.clips=1", "callbacks.demos.every=2", "trainer.ema_decay=0.5",
    "adapter.dropout=0.1",
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tones, one of them captioned, a silent clip and a damaged one."""
    folder = tmp_path_factory.mktemp("audio")
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", tone(0.5 + 0.1 * number, 200.0 * (number + 1)), 44100)
    (folder / "0.txt").write_text("a low tone")
    soundfile.write(folder / "silent.wav", 0 * tone(0.5), 44100)
    (folder / "damaged.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture(scope="module")
def clips(folder: Path) -> AudioClips:
    return AudioClips(str(folder), 44100, 0.2)


def test_losses_are_zero_for_equal_audio_and_count_decibels() -> None:
    real = noise(2, 2, 8192)
    assert float(compute_stft_loss(real, real)) == 0 == float(compute_waveform_loss(real, real))
    assert float(compute_stft_loss(real, real / 2)) == pytest.approx(0.69, abs=0.03), "6 dB are 0.69 nepers"
    assert float(compute_waveform_loss(real, 0 * real)) == pytest.approx(0.69, abs=0.01), "ln 2"
    soft = compute_stft_loss(0.01 * real, 0.01 * noise(2, 2, 8192, seed=1))
    assert float(soft) == pytest.approx(float(compute_stft_loss(real, noise(2, 2, 8192, seed=1))), rel=0.01)
    assert float(split_mid_side(real[:, :1].expand(-1, 2, -1))[:, 1].abs().max()) == 0


def test_silence_in_both_does_not_count() -> None:
    real, made = noise(1, 2, 8192), noise(1, 2, 8192, seed=1)
    padded = [torch.nn.functional.pad(each, (0, 40000)) for each in (real, made)]
    assert float(compute_stft_loss(*padded)) == pytest.approx(float(compute_stft_loss(real, made)), rel=0.1)


def test_clips_are_read_checked_and_split_by_content(
    folder: Path, clips: AudioClips, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    again = AudioClips(str(folder), 44100, 0.2)
    assert "clips that cannot be used are left out (2)" in caplog.text
    assert (len(clips.train), len(clips.heldout)) == (5, 1)
    assert again.manifest == clips.manifest != AudioClips(str(folder), 44100, 0.0).manifest
    assert sorted(clip.prompts[0] for clip in (*clips.train, *clips.heldout))[-1] == "a low tone"
    (tmp_path / "only.wav").write_bytes((folder / "silent.wav").read_bytes())
    (tmp_path / "metadata.csv").write_text("file_name,caption\nabsent.wav,a bell\n")
    with pytest.raises(DataError, match="no clip to train on"):
        AudioClips(str(tmp_path), 44100, 0.2)
    assert "only.wav: it is silent" in caplog.text and "metadata.csv:2: " in caplog.text


def test_a_clip_that_changes_during_a_run_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("[0-5].wav"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    clips = AudioClips(str(tmp_path), 44100, 0.0)
    clips._cache.clear()
    soundfile.write(tmp_path / "0.wav", tone(0.5, 50.0), 44100)
    with pytest.raises(DataError, match=r"0\.wav.*changed"):
        [clips.read(clip) for clip in clips.train]


def test_crops_depend_on_seed_rank_and_number_alone(clips: AudioClips) -> None:
    def take(seed: int, rank: int, start: int = 0) -> list[Tensor]:
        loader = CropLoader(clips, 4096, 2, seed, rank)
        loader.load_state_dict({"number": start})
        batches = iter(loader)
        return [next(batches)["audio_BCN"] for _ in range(3 - start)]

    whole = take(1, 0)
    assert whole[0].shape == (2, 2, 4096)
    assert torch.equal(torch.stack(take(1, 0, start=1)), torch.stack(whole[1:]))
    assert not torch.equal(whole[0], take(2, 0)[0]) and not torch.equal(whole[0], take(1, 1)[0])


def test_only_the_adapter_learns_and_every_term_reaches_it() -> None:
    model = load_checkpoint("nano-base", parts=("autoencoder",))
    before = {name: tensor.clone() for name, tensor in model.autoencoder.state_dict().items()}
    injected = inject(model.get_adapter_root("decoder"), AdapterSpec("lora", rank=2))
    samples = count_crop_samples(model.autoencoder, 0.2)
    assert samples % (2 * 4096) == 0
    for term in ("stft", "waveform", "mid_side"):
        weights: dict[str, Any] = dict.fromkeys(("stft", "waveform", "mid_side", "round_trip"), 0.0) | {term: 1.0}
        module = DecoderModule(model, injected, DecoderSettings(loss=DecoderLossSettings(**weights)))
        losses = module.compute_losses(noise(1, 2, samples), torch.Generator().manual_seed(0))
        assert "round_trip" not in losses
        losses["loss"].backward()
        assert any(parameter.grad.abs().max() > 0 for parameter in injected.parameters() if parameter.grad is not None)
        module.zero_grad()
    module = DecoderModule(model, injected, DecoderSettings(loss=DecoderLossSettings(round_trip=2.0)))
    losses = module.compute_losses(noise(1, 2, samples), torch.Generator().manual_seed(0))
    once = losses["stft"] + 0.05 * losses["waveform"] + 0.5 * losses["mid_side"]
    torch.testing.assert_close(losses["loss"], once + 2 * losses["round_trip"])
    injected.remove()
    after = model.autoencoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_round_trips_are_repeatable_and_measured_against_the_clip() -> None:
    autoencoder = load_checkpoint("nano-base", parts=("autoencoder",)).autoencoder
    real = noise(2, 20000)
    played, latents = play_round_trips(autoencoder, real, 2, seed=3)
    assert all(audio.shape == real.shape and float(audio.abs().max()) <= 1 for audio in played)
    table = measure_round_trips(real, played, latents, 44100)
    assert table.shape == (3, 2) and table[2, 0] == (latents[1] - latents[0]).norm() / latents[0].norm()
    assert torch.equal(table, measure_round_trips(real, *play_round_trips(autoencoder, real, 2, seed=3), 44100))


def test_demos_are_played_without_dropout(clips: AudioClips, tmp_path: Path) -> None:
    model = load_checkpoint("nano-base", parts=("autoencoder",))
    injected = inject(model.get_adapter_root("decoder"), AdapterSpec("lora", rank=2, dropout=0.5))
    for number, parameter in enumerate(injected.parameters()):
        parameter.data = 0.1 * noise(*parameter.shape, seed=number)
    module = DecoderModule(model, injected, DecoderSettings()).train()
    checkpoint = CheckpointCallback(tmp_path, every=1, keep_last=1, metadata={})
    trips = DecoderValidationSettings(seconds=0.3, round_trips=1)
    demos = RoundTripDemoCallback(tmp_path, LoggerCollection(), DecoderDemoSettings(clips=1), clips, trips, checkpoint)
    for step in (1, 2):
        demos.play_module(module, step)
    first, second = (path.read_bytes() for path in sorted(tmp_path.rglob("*.wav")))
    assert first == second and module.training


@pytest.mark.parametrize(
    ("trainer", "key"),
    [({"quantize": "nf4"}, "quantize"), ({"compile": True}, "compile"), ({"strategy": "fsdp"}, "strategy")],
)
def test_settings_of_the_dit_are_refused(trainer: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"trainer.{key} has no effect"):
        DecoderSettings(trainer=TrainerSettings(**trainer))
    with pytest.raises(ConfigError, match="nothing is learned"):
        DecoderLossSettings(stft=0.0, waveform=0.0, mid_side=0.0)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its start to its end."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*QUICK, f"source={folder}", f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.mark.slow
def test_a_run_leaves_what_every_run_leaves(whole: Path) -> None:
    adapter = load_adapter(whole)
    assert adapter.part == "decoder" and len(adapter.tensors) == 13
    assert adapter.metadata["base_model"] == "nano-base" and adapter.metadata["step"] == "2"
    assert adapter.metadata["data_summary"].startswith("5 clips, ")
    card = (whole / "README.md").read_text()
    assert "log-mel distance after 2 round trips on held-out clips" in card and "ComfyUI" not in card
    run = read_run(whole)
    validation = json.loads((whole / "validation.json").read_text())
    assert validation["measure"] == "round_trips" and validation["levels"] == [1.0, 2.0]
    last = validation["history"][-1]
    assert last["step"] == 2 and last["val"]["loss"] == last["val"]["log_mel"][1] == run.rows[-1]["val/log_mel_2"]
    columns = read_metrics(whole / "metrics.csv")[0]
    assert {"train/stft", "train/round_trip", "val/si_sdr_1", "val/drift_2"} <= set(columns)
    assert {demo.step for demo in run.demos} == {0, 2}
    assert {demo.demo.partition(", ")[2] for demo in run.demos} == {"as it is", "1 round trip", "2 round trips"}
    page = render_report(run)
    assert "Round trips" in page and "Noise levels" not in page


@pytest.mark.slow
def test_a_stopped_run_ends_as_the_whole_one_does(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = DecoderModule.training_step

    def stop(self: DecoderModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    arguments = [*QUICK, f"source={folder}", f"run_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(DecoderModule, "training_step", stop)
        assert main(arguments) == 128 + signal.SIGTERM
    assert main(arguments) == 1, "a run folder is not overwritten"
    assert "already holds a run" in capsys.readouterr().err
    assert main([f"resume={tmp_path / 'run'}", "data.batch_size=3"]) == 1, "another run is not resumed"
    shutil.copytree(folder, tmp_path / "moved")
    assert main([f"resume={tmp_path / 'run'}", f"source={tmp_path / 'moved'}"]) == 0
    assert load_adapter(tmp_path / "run").fingerprint == load_adapter(whole).fingerprint
    assert (tmp_path / "run" / "validation.json").read_text() == (whole / "validation.json").read_text()
