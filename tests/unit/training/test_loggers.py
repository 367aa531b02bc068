"""Metrics reach every logger under the same names; no logger, server or torn line stops a run."""

import errno
import inspect
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.wandb_servers import DyingServer, use_faulty_server
from sa3train.audio.metrics import plot_mel_spectrogram
from sa3train.core.errors import SA3Error
from sa3train.reports.run_files import read_metrics
from sa3train.training.loggers import CSVLogger, LoggerCollection, TensorBoardLogger, WandbLogger
from sa3train.training.settings import LoggingSettings

AUDIO = 0.1 * torch.sin(torch.linspace(0, 500, 4410)).repeat(2, 1)


def test_csv_grows_columns_and_merges_a_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "m.csv")
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 0.1 + 0.2}, 2)
    logger.log_metrics({"b": 3.0}, 2)
    columns, rows = read_metrics(tmp_path / "m.csv")
    assert columns == ["step", "a", "b"]
    assert rows == [{"step": "1", "a": "1.0"}, {"step": "2", "a": "0.30000000000000004", "b": "3.0"}], "every digit"


def test_a_resumed_csv_drops_what_will_be_logged_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    logger = CSVLogger(path)
    for step in range(1, 6):
        logger.log_metrics({"a": float(step)}, step)
    path.write_text(path.read_text() + "6,6.")
    again = CSVLogger(path, keep_through=3)
    again.log_metrics({"a": 40.0}, 4)
    assert [(row["step"], row["a"]) for row in read_metrics(path)[1]] == [
        ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "40.0")
    ]  # fmt: skip


def test_a_row_that_cannot_be_written_and_a_folder_that_is_gone_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path / "run" / "m.csv")
    logger.log_metrics({"a": 1.0}, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SA3Error, match=r"m\.csv: No space left"):
        patch.setattr(Path, "open", full)
        logger.log_metrics({"a": 1.0}, 2)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SA3Error, match="run was removed"):
        logger.log_metrics({"a": 1.0}, 3)
    assert not (tmp_path / "run").exists()


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    loggers = LoggerCollection([CSVLogger(tmp_path / "m.csv")])
    loggers.log_metrics({"a": math.nan, "b": 1.0, "c": math.inf}, 1)
    assert read_metrics(tmp_path / "m.csv")[1] == [{"step": "1", "b": "1.0"}]


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    class Fails:
        def log_metrics(self, values: Any, step: int) -> None:
            raise OSError("gone")

    loggers = LoggerCollection([Fails(), CSVLogger(tmp_path / "m.csv")])  # type: ignore[list-item]
    loggers.log_metrics({"a": 1.0}, 1)
    loggers.log_metrics({"a": 2.0}, 2)
    assert len(read_metrics(tmp_path / "m.csv")[1]) == 2 and len(loggers.loggers) == 1


def test_tensorboard_holds_metrics_audio_pictures_and_the_adapter(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = LoggerCollection([TensorBoardLogger(tmp_path / "tb")])
    for step in (1, 2):
        loggers.log_metrics({"train/loss": float(step)}, step)
    loggers.log_audio("demos/x", AUDIO, 44100, 2, "a prompt")
    loggers.log_image("demos/x/mel", plot_mel_spectrogram(AUDIO, 44100), 2)
    loggers.log_adapter(tmp_path / "adapter.safetensors", {"base_model": "nano"})
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert events.Audio("demos/x")[0].sample_rate == 44100 and events.Images("demos/x/mel")
    assert any("adapter" in name for name in events.Tags()["tensors"])


def make_wandb_logger(folder: Path, mode: str, **values: Any) -> WandbLogger:
    config = values.pop("config", {"lr": 0.1})
    settings = LoggingSettings("wandb", mode, "p", **({"timeout": 5.0} | values))  # type: ignore[arg-type]
    return WandbLogger(folder, settings, name="run", run_id="abcd1234", config=config)


def log_chunks(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, as .wandb files are: 7 bytes of file header, blocks of 32 KiB, 7 bytes before each."""
    block, position, parts = 32768, 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(folder: Path) -> list[Any]:
    """Everything in the runs under `folder`, read from their files."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(200):  # wandb's own process ends its file a moment after `finish` has returned
        files = sorted(folder.glob("wandb/*run-*/run-*.wandb"))
        found = [Record.FromString(chunk) for path in files for chunk in log_chunks(path.read_bytes())]
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"no ended run under {folder}")


@pytest.mark.slow
def test_an_offline_wandb_run_holds_everything(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(b"an adapter")
    logger = make_wandb_logger(tmp_path / "w", "offline", config={"adapter": {"rank": 16}}, tags=["t"], group="g")
    logger.log_input("dataset", "data-abc", {"manifest": "abc"})
    logger.log_input("model", "base-def", {"hash": "def"})
    loggers = LoggerCollection([logger])
    loggers.log_metrics({"train/loss": 1.5}, 10)
    loggers.log_audio("demos/x", AUDIO, 44100, 10, "a prompt")
    loggers.log_image("demos/x/mel", plot_mel_spectrogram(AUDIO, 44100), 10)
    loggers.log_adapter(adapter, {"base_hash": "def"})
    loggers.close()
    found = records(tmp_path / "w")
    run = next(record.run for record in found if record.HasField("run"))
    assert run.run_id == "abcd1234" and run.run_group == "g" and list(run.tags) == ["t"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["adapter"] == {"rank": 16}
    history = [
        {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert any(row.get("train/loss") == "1.5" and row.get("step") == "10" for row in history)
    kinds = {json.loads(value) for row in history for key, value in row.items() if key.endswith("_type")}
    assert kinds == {"audio-file", "image-file"}
    wavs = list((tmp_path / "w").glob("wandb/offline-run-*/files/media/audio/**/*.wav"))
    assert len(wavs) == 1 and wavs[0].stat().st_size > 2 * 2 * 4410
    artifacts = [record.request.log_artifact.artifact for record in found if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in found if record.HasField("artifact")]
    by_type = {artifact.type: artifact for artifact in artifacts}
    assert set(by_type) == {"dataset", "model", "adapter"}
    assert json.loads(by_type["adapter"].metadata) == {"base_hash": "def"}
    uses = {artifact.type: artifact.use_after_commit for artifact in artifacts}
    assert uses == {"dataset": True, "model": True, "adapter": False}, "inputs and output: the lineage"
    assert [entry.path for entry in by_type["adapter"].manifest.contents] == ["adapter.safetensors"]


@pytest.fixture(params=["500", "silence", "refusal"])
def dead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that answers 500, or takes connections and says nothing, or is not there."""
    with use_faulty_server(request.param, monkeypatch):
        yield


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_an_offline_run(
    tmp_path: Path, dead: None, caplog: pytest.LogCaptureFixture
) -> None:
    logger = make_wandb_logger(tmp_path / "w", "online", timeout=1.0)
    loggers = LoggerCollection([logger])
    loggers.log_metrics({"train/loss": 1.5}, 1)
    loggers.close()
    assert any(record.HasField("history") for record in records(tmp_path / "w"))
    assert "does not answer" in caplog.text and "launch/wandb_sync.sh" in caplog.text


@pytest.mark.slow
def test_a_server_that_dies_during_the_run_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with use_faulty_server("death", monkeypatch):
        logger = make_wandb_logger(tmp_path / "w", "online", timeout=3.0)
        assert not logger.run.offline
        adapter = tmp_path / "adapter.safetensors"
        adapter.write_bytes(b"an adapter")
        started = time.monotonic()
        logger.log_metrics({"train/loss": 1.0}, 1)
        assert DyingServer.dead.wait(30), "the server has seen metrics, and is silent from here on"
        for step in range(2, 102):
            logger.log_metrics({"train/loss": 1.0}, step)
        logger.log_input("dataset", "data-abc", {"manifest": "abc"})
        logger.log_adapter(adapter, {"base_hash": "def"}, ("latest",))
        logged = time.monotonic() - started
        logger.close(failed=False)
        closed = time.monotonic() - started - logged
    assert logged < 60 and closed < 60, "no bar on speed: nothing waits for a server that never answers"
    found = records(tmp_path / "w")
    kinds = {record.artifact.type for record in found if record.HasField("artifact")}
    assert sum(record.HasField("history") for record in found) == 101 and kinds == {"dataset", "adapter"}, (
        "everything is on disk, to be sent later"
    )


def test_a_disabled_wandb_run_takes_everything_and_keeps_nothing(tmp_path: Path) -> None:
    logger = make_wandb_logger(tmp_path / "w", "disabled")
    logger.log_input("dataset", "data-abc", {"manifest": "abc"})
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.log_adapter(Path(__file__), {}, ("latest",))
    logger.close(failed=False)
    assert not list((tmp_path / "w").rglob("*.wandb"))


def test_an_error_of_wandb_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    class Fails:
        def log_adapter(self, path: Path, metadata: Any, aliases: Any) -> None:
            raise wandb.errors.AuthenticationError("cannot be asked")

    loggers = LoggerCollection([Fails()])  # type: ignore[list-item]
    loggers.log_adapter(tmp_path / "a", {})
    assert "cannot be asked" in caplog.text


def test_wandb_still_has_the_private_calls_that_publish_an_artifact() -> None:
    from wandb.sdk.interface.interface import InterfaceBase
    from wandb.sdk.wandb_run import Run

    found = {
        *inspect.signature(Run._prepare_artifact).parameters,
        *inspect.signature(InterfaceBase.publish_artifact).parameters,
    }
    assert {"aliases", "is_user_created", "use_after_commit"} <= found and "_interface" in inspect.getsource(Run), (
        "wandb has changed: see sa3train.training.loggers.publish_artifact, the only user of these"
    )
