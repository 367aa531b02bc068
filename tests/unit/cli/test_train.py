"""`sa3-train` from the command line: what it leaves, what it refuses, how it ends."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors import safe_open

from helpers.golden import PLAIN
from helpers.training import make_shards, read_losses
from helpers.wandb_servers import use_faulty_server
from sa3train.adapters.adapter import DECODER, Adapter
from sa3train.adapters.formats.io import save_adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.cli import train_setup
from sa3train.cli.compare import format_table
from sa3train.cli.train import main
from sa3train.cli.train_config import TrainConfig
from sa3train.models.checkpoint import load_checkpoint
from sa3train.models.conditioners import TextEncoder
from sa3train.reports.comparison import compare_runs
from sa3train.reports.run_files import load_settings, read_metrics
from sa3train.training.module import LoraModule
from sa3train.training.prompt_embeddings import PromptEmbedder

GOLDEN = PLAIN
QUICK = (
    "trainer=cpu", "trainer.max_steps=2", "trainer.log_every=1", "trainer.threads=1", "data.num_workers=0",
    "data.batch_size=2", "data.crop_seconds=null", "data.silence_tail_seconds=0.3", "adapter.rank=4",
    "scheduler.warmup_steps=0", f"model={GOLDEN}", "callbacks=none",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that the golden model's autoencoder could have made."""
    fingerprint = load_checkpoint(GOLDEN, parts=("dit",)).autoencoder_fingerprint()
    return make_shards(tmp_path_factory.mktemp("d"), [8, 9, 10, 11], heldout=1, fingerprint=fingerprint)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs go to a folder of their own, and no launcher is around."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("WORLD_SIZE", "RANK", "SA3TRAIN_RUN_STAMP"):
            monkeypatch.delenv(name)
    yield tmp_path
    os.environ.pop("SA3TRAIN_RUN_STAMP", None)


def run(shards: Path, *arguments: str) -> int:
    return main([f"data={shards}", *QUICK, *arguments])


def test_a_run_leaves_adapter_settings_metrics_and_state(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validated = ("callbacks.validation.enabled=true", "callbacks.validation.every=2", "callbacks.report=true")
    assert run(shards, "run_dir=out", "adapter=dora-rows", "data.prompts.trigger=zmx", *validated) == 0
    folder = Path("out")
    with safe_open(folder / "adapter.safetensors", framework="pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    config = json.loads(metadata["lora_config"])
    assert config["rank"] == 4 and config["adapter_type"] == "dora-rows"
    assert metadata["step"] == "2" and metadata["base_model"] == str(GOLDEN) and metadata["trigger"] == "zmx"
    assert metadata["base_hash"] == load_checkpoint(GOLDEN, parts=("dit",)).fingerprint()
    index = json.loads((shards / "index.json").read_text())
    assert metadata["data_manifest"] == index["manifest"] and metadata["sa3train_version"]
    assert json.loads(metadata["training_config"])["trainer"]["max_steps"] == 2
    assert len(json.loads(metadata["prompts"])) == 3 and metadata["data_summary"].startswith("3 clips")
    assert json.loads(metadata["prompts"])[0] in (folder / "README.md").read_text()
    assert "model.transformer.layers.0.self_attn.to_qkv.parametrizations.weight.0.lora_A" in keys
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["optimizer"]["lr"] == 1e-4 and settings["data"]["dir"] == str(shards)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "metrics.csv").is_file() and (folder / "report.html").is_file()
    assert list((folder / "checkpoints").glob("*.safetensors"))
    printed = capsys.readouterr().out
    assert "loss on fixed noise and timesteps, held-out clips: base" in printed
    assert "\nnext:    Measure on 5 held-out clips or more (split" in printed
    assert "adapter: out/adapter.safetensors" in printed


def test_no_autoencoder_is_loaded_and_prompts_are_encoded_once_on_a_machine(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SA3TRAIN_CACHE", str(tmp_path / "cache"))
    seen: list[Any] = []
    asked: list[list[str]] = []
    whole, encode = LoraModule.on_fit_start, TextEncoder.__call__

    def look(self: LoraModule) -> None:
        seen.append((self.model.autoencoder, self.model.conditioner.text_encoder.is_loaded))
        whole(self)

    def count(self: TextEncoder, prompts: Any, device: Any) -> Any:
        asked.append(list(prompts))
        return encode(self, prompts, device)

    monkeypatch.setattr(LoraModule, "on_fit_start", look)
    monkeypatch.setattr(TextEncoder, "__call__", count)
    assert run(shards, "run_dir=a") == 0 and run(shards, "run_dir=b", "trainer.max_steps=3") == 0
    assert seen == [(None, False), (None, False)]
    assert sorted(prompt for prompts in asked for prompt in prompts) == [f"caption {n}" for n in range(4)]


def test_a_run_goes_on_from_another_folder_with_the_paths_that_it_was_started_with(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, "here/latents")
    shutil.copytree(GOLDEN, "here/model", ignore=shutil.ignore_patterns("cases*", "adapters"))
    monkeypatch.chdir("here")
    assert main(["data=latents", *QUICK, "model=model", "run_dir=runs/a", "trainer.max_steps=1"]) == 0
    monkeypatch.chdir("runs")
    assert main(["resume=a", "trainer.max_steps=2"]) == 0
    shutil.move("../latents", "../../moved")
    monkeypatch.chdir("../..")
    again = ["resume=here/runs/a", "trainer.max_steps=3"]
    assert main(again) == 1
    assert "trained on latents, which is not there. If it moved, set data=FOLDER" in capsys.readouterr().err
    assert main([*again, "data=moved"]) == 0
    assert json.loads(Path("here/runs/a/run.json").read_text())["steps"] == 3


def test_a_run_goes_on_where_it_was_and_not_as_another(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shards, "run_dir=out", "loss=released", "trainer.ema_decay=null") == 0
    assert run(shards, "run_dir=out") == 1
    assert "already holds a run. Resume it: sa3-train resume=out" in capsys.readouterr().err
    assert main(["resume=out", "trainer.max_steps=3", "adapter.dropout=0.5"]) == 1
    said, error = capsys.readouterr()
    assert "adapter.dropout: 0.0 -> 0.5" in error and "allow_resume_changes=[adapter.dropout]" in error
    assert "nothing to do" not in said
    assert main(["resume=out", "trainer.max_steps=3"]) == 0
    assert "resume=out trainer.max_steps=6" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert main(["resume=out"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("nothing to do: out is at step 3 of 3.\nlonger:  sa3-train resume=out trainer.max_steps=6")
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    record = json.loads(Path("out/run.json").read_text())
    assert record["steps"] == 3 and record["resumed"][-1]["step"] == 2
    kept = load_settings(Path("out/config.yaml"))
    assert (kept["loss"]["timesteps"], kept["trainer"]["ema_decay"]) == ("trunc_logit_normal", None), "as it was begun"
    assert main(["resume=out", "recipe=style"]) == 1
    assert "recipe=style cannot be chosen" in capsys.readouterr().err
    hints = {"nowhere": "such as resume=", "outt": "Did you mean out?", "out@2": "adapter.start_from=out@2"}
    for name, message in hints.items():
        assert main([f"resume={name}"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_of_a_finished_run_what_is_missing_or_asked_for_is_made(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(shards, "run_dir=out", "callbacks.report=true") == 0
    losses = read_losses(Path("out"))
    for name in ("report.html", "README.md"):
        Path("out", name).unlink()
    assert main(["resume=out"]) == 0 and Path("out/report.html").is_file() and Path("out/README.md").is_file()
    demos = ("callbacks.demos.enabled=true", "callbacks.demos.duration=0.2", "callbacks.demos.steps=1")
    assert main(["resume=out", *demos, "callbacks.demos.memorization_clips=1"]) == 0
    assert Path("out/memorization.json").is_file() and losses and read_losses(Path("out")) == losses
    assert main(["resume=out", *demos]) == 1
    assert "callbacks.demos.enabled: False -> True (all of its 2 steps are done" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(shards, "run_dir=out", "callbacks.report=true") == 0
    assert capsys.readouterr().out.startswith("nothing to do")
    code = "import sys; from sa3train.cli.train import main; main(['resume=out']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "nothing heavy is loaded to say so"
    assert run(shards, "run_dir=out", "callbacks.report=true", "seed=7") == 1, "another run"
    assert "seed: 0 -> 7" in capsys.readouterr().err


def test_a_signal_ends_the_run_with_its_exit_code_and_the_way_on(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LoraModule.training_step

    def stopped(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LoraModule, "training_step", stopped)
        assert run(shards, "run_dir=out") == 128 + signal.SIGTERM
    assert "sa3-train resume=out" in capsys.readouterr().out
    assert json.loads(Path("out/run.json").read_text())["status"] == "interrupted"
    assert main(["resume=out"]) == 0


def test_a_signal_before_the_first_step_leaves_nothing_and_the_next_of_a_sweep_is_not_started(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def stopped(*_: Any) -> None:
        started.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PromptEmbedder, "prepare", stopped)
        assert run(shards, "run_dir=out") == 128 + signal.SIGTERM
        assert run(shards, "hydra.mode=MULTIRUN", "seed=1,2") == 128 + signal.SIGTERM
    assert len(started) == 2
    assert capsys.readouterr().err.count("nothing is saved. The same command starts again.") == 2
    with monkeypatch.context() as patch:
        patch.setattr(train_setup, "make_data_module", stopped)
        assert run(shards, "run_dir=out") == 128 + signal.SIGTERM
    assert "by SIGTERM before the training began: nothing new is saved. The same command" in capsys.readouterr().err
    assert not Path("out").exists() and not list(Path("runs").rglob("run.json"))


def test_an_unexpected_error_leaves_no_folder_in_the_way_of_the_same_command(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(PromptEmbedder, "prepare", lambda *_: 1 / 0)
        run(shards, "run_dir=out")
    assert not Path("out").exists()
    assert run(shards, "run_dir=out") == 0


def test_a_run_folder_that_goes_away_is_an_error_and_is_not_made_again(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LoraModule.training_step

    def removed(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            shutil.rmtree("out")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoraModule, "training_step", removed)
    for every in (2, 1):  # steps between two lines of metrics: what notices it
        arguments = ("trainer.max_steps=4", "callbacks.checkpoint.every=3", f"trainer.log_every={every}")
        assert run(shards, "run_dir=out", *arguments) == 1
        error = capsys.readouterr().err
        assert "out was removed" in error and "since step 3 is lost" in error and not Path("out").exists()


def test_continuing_an_adapter_starts_from_it(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shards, "run_dir=first", "optimizer.lr=1e-2") == 0
    start = "adapter.start_from=first/adapter.safetensors"
    assert run(shards, "recipe=continue", "run_dir=second", "optimizer.lr=1e-9", start, "trainer.max_steps=1") == 0
    with (
        safe_open("first/adapter.safetensors", framework="pt") as a,
        safe_open("second/adapter.safetensors", "pt") as b,
    ):
        for key in a.keys():  # noqa: SIM118 (not a dict)
            assert (a.get_tensor(key) - b.get_tensor(key)).abs().max() < 1e-3
    for other, advice in (("adapter=lora", "Set adapter=dora-rows."), ("adapter.rank=3", "Set adapter.rank=")):
        assert run(shards, "recipe=continue", "run_dir=third", start, other) == 1
        said, error = capsys.readouterr()
        assert advice in error and "loading" not in said + error, "before the base is loaded"
    tensors = {f"{DECODER}layers.1": {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}}
    save_adapter(Path("decoder.safetensors"), Adapter(AdapterSpec("lora", rank=4), tensors))
    assert run(shards, "recipe=continue", "run_dir=third", "adapter.start_from=decoder.safetensors") == 1
    said, error = capsys.readouterr()
    assert "is on the autoencoder's decoder, and this training is not" in error and "loading" not in said + error


def test_a_base_in_bf16_trains_nearly_the_same(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for dtype in ("fp32", "bf16"):
        assert run(shards, "trainer.precision=auto", f"model.dtype={dtype}", f"run_dir={dtype}") == 0
        losses.append([float(row["train/loss"]) for row in read_metrics(Path(dtype) / "metrics.csv")[1]])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert run(shards, "run_dir=x", "model.dtype=bf16") == 1, "trainer=cpu computes in fp32"
    assert "trainer.precision=fp32 has no effect on a base in bf16" in capsys.readouterr().err


def test_prior_preservation_mixes_in_another_set_and_validates_only_ones_own(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regularisation set keeps the model from forgetting: it has its share of clips and no held-out ones."""
    fingerprint = json.loads((shards / "index.json").read_text())["model"]["fingerprint"]
    prior = make_shards(tmp_path / "prior", [9] * 6, heldout=1, fingerprint=fingerprint, prefix="prior")
    shown: list[str] = []
    step = LoraModule.training_step

    def look(self: LoraModule, batch: Any, batch_idx: int) -> Any:
        shown.extend(batch["keys"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoraModule, "training_step", look)
    more = ("data.more=[{path: %s, role: prior}]" % prior, "data.prior_share=0.25")  # noqa: UP031 (braces)
    validated = ("callbacks.validation.enabled=true", "callbacks.validation.every=100")
    assert run(shards, "run_dir=out", *more, *validated, "trainer.max_steps=12") == 0
    assert sum(key.startswith("prior") for key in shown) == 6 and len(shown) == 24
    items = json.loads(Path("out/validation.json").read_text())["items"]
    assert not any(item["key"].startswith("prior") for part in items.values() for item in part)


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["500", "silence"])
def test_a_run_outlives_its_wandb_server(
    shards: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything is in the run folder, and in wandb's own record, to be sent later."""
    with use_faulty_server(answer, monkeypatch):
        assert run(shards, "run_dir=out", "logger=wandb", "logger.timeout=2") == 0
    said = capsys.readouterr().err
    assert "does not answer" in said and "launch/wandb_sync.sh" in said
    assert [row["step"] for row in read_metrics(Path("out/metrics.csv"))[1]] == ["1", "2"]
    assert Path("out/adapter.safetensors").is_file()
    (record,) = Path("out/wandb/wandb").glob("offline-run-*/run-*.wandb")
    until = time.monotonic() + 30  # wandb's own process writes its file a moment after the run has ended
    while record.stat().st_size <= 1000:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_step=3"], "unknown setting 'trainer.max_step'. Did you mean trainer.max_steps?"),
        (["+extra.thing=1"], "unknown setting 'extra.thing'"),
        (["adapter=lra"], "adapter=lra is unknown. Did you mean lora?"),
        (["recipe=zzz"], "recipe=zzz is unknown. Choose from: continue, "),
        (["loss.function=l1"], "loss.function"),
        (["optimizer.lr=fast"], "'optimizer.lr' must be a number"),
        (["optimizer.options.amsgard=true"], "Did you mean amsgrad"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["logger.mode=offline"], "no effect with logger=csv"),
        (["adapter.include=[nothing.here]"], "nothing.here"),
        (
            ["data.pack_frames=64", "data.silence_tail_seconds=0", "loss.silence_seconds=1"],
            "no effect with data.pack_frames",
        ),
        (["trainer.devices=2", "trainer.num_nodes=2"], "asks for 4 ranks, but 1"),
        (["callbacks.validation.every=2"], "callbacks.validation.every has no effect"),
        (["callbacks.demos.duration=2"], "no effect with callbacks.demos.enabled=false"),
        (["data.batch_size=1", "loss.coupling=true"], "loss.coupling has no effect"),
        (["loss.silence_seconds=0", "data.silence_tail_seconds=1"], "no effect with loss.silence_seconds=0"),
        (["data.repeats=2"], "data.repeats has no effect"),
        (["name=../x"], "name=../x names no folder"),
        (["resume="], "resume=runs/NAME"),
        (["trainer.strategy=fsdp"], "trainer.strategy has no effect with one rank"),
        (["logger.timeout=3"], "no effect with logger=csv"),
        (["allow_resume_changes=[all]"], "no effect with a run that is not resumed"),
        (["optimizer=schedule-free", "trainer.ema_decay=0.9"], "trainer.ema_decay=0.9"),
        (["data.prior_share=0.2"], "prior_share"),
        (["adapter.start_from=missing.safetensors"], "no adapter at missing.safetensors"),
        (["model=no-such-model"], "no-such-model"),
    ],
)
def test_bad_settings_end_with_one_line(
    shards: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(shards, "run_dir=out", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert "Config search path" not in error, "nothing of Hydra's insides"
    assert not Path("out").exists(), "a run that never began does not keep the folder"


def test_wrong_data_and_a_taken_folder_are_named_before_the_base_is_loaded(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A medium base takes gigabytes and, the first time, a download."""

    def loaded(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the base was loaded")

    assert run(shards, "run_dir=held", "trainer.max_steps=1") == 0
    held = FileLock("held/run.lock")
    monkeypatch.setattr("sa3train.models.checkpoint.load_checkpoint", loaded)
    monkeypatch.setattr("sa3train.training.run_dir.LOCK_SECONDS", 0)
    for arguments, message in (
        (["data=nowhere", "run_dir=out"], "nowhere"),
        ([f"data={shards}", "run_dir=held"], "already holds a run"),
        (["resume=held", "seed=7", "allow_resume_changes=[all]"], "seed: 0 -> 7 (all of its 1 steps are done"),
        (["resume=held", "run_dir=out"], "run_dir has no effect"),
        (["resume=held", "trainer.max_steps=2"], "is in use"),
    ):
        with held if "use" in message else contextlib.nullcontext():
            assert main([*([] if "resume" in arguments[0] else QUICK), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not Path("out").exists() and json.loads(Path("held/run.json").read_text())["status"] == "finished"


def test_data_of_another_autoencoder_or_none_is_refused(
    shards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    index = json.loads((shards / "index.json").read_text())
    for name in shards.iterdir():
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name.name).write_bytes(name.read_bytes())
    index["model"] |= {"fingerprint": "0" * 64, "name": "medium"}
    (tmp_path / "other" / "index.json").write_text(json.dumps(index))
    assert run(tmp_path / "other", "run_dir=out") == 1
    assert "autoencoder of 'medium'" in capsys.readouterr().err
    assert run(tmp_path / "empty", "run_dir=out") == 1
    assert "sa3-encode" in capsys.readouterr().err
    assert main([*QUICK, "run_dir=out"]) == 1
    assert "'data.dir' must be given" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("in the way")
    for folder, message in {
        "file/run": "cannot write file/run", "file": "cannot write file", "": "run_dir",
        str(shards): "is inside the data", str(shards / "run"): "is inside the data",
    }.items():  # fmt: skip
        assert run(shards, f"run_dir={folder}") == 1
        assert message in capsys.readouterr().err
    assert Path("file").read_text() == "in the way" and not Path("run.json").exists()


def test_ranks_that_were_started_but_not_asked_for_are_an_error(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(shards, "run_dir=out") == 1
    assert "4 ranks were started but 1 would train together" in capsys.readouterr().err


def test_several_devices_become_torchrun(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command starts itself again, once per rank, under a name that all of them know."""
    executed: list[list[str]] = []

    def instead(path: str, command: list[str]) -> None:
        executed.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(train_setup.os, "execv", instead)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    with pytest.raises(SystemExit):
        run(shards, "run_dir=out", "trainer.devices=2")
    command = executed[0]
    assert command[1:5] == ["-m", "sa3train.cli.ranks", "--standalone", "--nproc-per-node=2"]
    assert command[5:7] == ["-m", "sa3train.cli.train"] and f"data.dir={shards}" in command
    assert os.environ["SA3TRAIN_RUN_STAMP"]
    assert os.environ["PYTHONSAFEPATH"], "a folder named sa3train in the current one would hide the package"


@pytest.mark.slow
def test_a_sweep_is_a_folder_of_runs_that_can_be_compared(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validated = (
        "callbacks.validation.enabled=true",
        "callbacks.validation.every=1",
        "callbacks.validation.select_best=false",
    )
    assert run(shards, "recipe=sweep", "adapter.rank=4", "optimizer.lr=1e-4,1e-2", "run_dir=sw", *validated) == 0
    folders = sorted(path.parent for path in Path("sw").glob("*/run.json"))
    assert [folder.name for folder in folders] == ["000", "001"]
    printed = capsys.readouterr().out
    assert "job 001: adapter.rank=4 optimizer.lr=0.01\n" in printed and "sw, best first:" in printed
    rows = compare_runs([folders[0].parent])
    assert {row["optimizer.lr"] for row in rows} == {1e-4, 1e-2} and "adapter.rank" not in rows[0], "what varies"
    assert [row["best"] for row in rows] == sorted(row["best"] for row in rows) and set(rows[0]) >= {
        "run",
        "base",
        "last",
    }
    assert len(format_table(rows)) == 3 and "optimizer.lr" in format_table(rows)[0]


def test_every_key_of_the_configuration_is_typed() -> None:
    from sa3train.core.config import list_keys

    assert {"adapter.rank", "callbacks.validation.patience", "data.prompts.trigger"} <= set(list_keys(TrainConfig))


def test_a_run_without_memory_says_what_helps_and_goes_on_with_it(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, steps = LoraModule.training_step, []

    def full(self: LoraModule, *args: Any) -> Any:
        steps.append(1)
        if len(steps) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return step(self, *args)

    monkeypatch.setattr(LoraModule, "training_step", full)
    most = 0
    assert run(shards, "run_dir=r", "trainer.max_steps=4", "callbacks.checkpoint.every=2") == 1
    said = capsys.readouterr().err
    assert "Out of memory while training on 2 x " in said and "trainer.activation_checkpointing=blocks; " in said
    assert "Traceback" not in said and "resume=" not in said and not Path("r/checkpoints").exists()
    most, run_dir = len(steps) + 3, "r2"
    assert run(shards, f"run_dir={run_dir}", "trainer.max_steps=4", "callbacks.checkpoint.every=2") == 1
    assert f"sa3-train resume={run_dir}" in capsys.readouterr().err
    most = 1000
    assert main([f"resume={run_dir}", "trainer.activation_checkpointing=blocks"]) == 0
    assert yaml.safe_load(Path(run_dir, "config.yaml").read_text())["trainer"]["activation_checkpointing"] == "blocks"
    assert [row["step"] for row in read_metrics(Path(run_dir, "metrics.csv"))[1]] == ["1", "2", "3", "4"]
