"""The plan of a run: what was chosen is checked, composed by the trainer, tried, and put in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from sa3train.core.errors import SA3Error
from sa3train.data.shards.index import DataSummary, summarise
from sa3train.studio.runs import estimate, start_form
from sa3train.studio.runs.estimate import Choice, Trial
from sa3train.studio.server.workspace import Workspace

CONFIG: dict[str, Any] = {
    "trainer": {"max_steps": 1000, "accumulate": 2},
    "data": {"batch_size": 4, "pack_frames": None, "crop_seconds": 10.0},
    "adapter": {"kind": "dora-rows", "rank": 8},
    "model": {"name": "nano-base"},
    "callbacks": {
        "judge": {"enabled": True, "clips": 16, "every": 250},
        "demos": {
            "enabled": True, "every": 500, "prompts": [], "heldout_prompts": 2, "inpaint": True,
            "strengths": [0.5, 1.0], "steps": None, "duration": 10.0,
        },
    },
}  # fmt: skip
DATA = DataSummary(100, 900.0, 10, 90.0, "nano", 1, 9000)
TRIAL = Trial(2.0, 1.5, "1 × CPU", {"weights": 2**30, "adapter": 2**20})


@pytest.fixture
def latents(workspace: Workspace) -> Path:
    folder = workspace.roots[0] / "latents"
    folder.mkdir()
    split = {"clips": 4, "frames": 64, "seconds": 6.0}
    index = {
        "format": "sa3train-latents", "version": 1, "model": {"name": "nano"}, "shards": [], "manifest": "m",
        "splits": {"train": split, "heldout": split | {"clips": 2}}, "rejected": 1,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_the_recipes_that_are_offered_each_make_one_run() -> None:
    assert {"instrument", "style", "sfx", "continue"} <= estimate.recipes().keys()
    assert "sweep" not in estimate.recipes()
    assert all(estimate.recipes().values())
    assert "Card" not in "".join(estimate.recipes().values())


@pytest.mark.parametrize(
    "line",
    [
        "data=/etc", "+data=/etc", "adapter=../../x", "callbacks=/etc/x", "data.more.0.path=/etc",
        "run_dir=/etc", "paths.runs=/etc", "hydra.run.dir=/etc", "resume=/etc", "model.name=/etc", "data.dir=/etc",
        "data.more=[{path: /etc}]", "adapter.start_from=/etc/x", "--config-dir=/etc", "-m", "optimizer", "~optimizer",
        "seed=${oc.env:HOME}", "+run_dir=/etc", "++data.dir=/etc", "data@x=y", "hydra/launcher=basic", "launcher=slurm",
    ],
)  # fmt: skip
def test_settings_that_reach_beyond_the_run_are_refused(line: str) -> None:
    with pytest.raises(SA3Error):
        estimate.further_settings(f"optimizer.lr=1e-3\n{line}")


def test_settings_are_one_a_line() -> None:
    text = "\n optimizer.lr=1e-3 \n\nadapter=lora\ncallbacks.demos.prompts=[a b, 'c=d']\nseed=1"
    assert estimate.further_settings(text) == (
        "optimizer.lr=1e-3", "adapter=lora", "callbacks.demos.prompts=[a b, 'c=d']", "seed=1"
    )  # fmt: skip


def test_a_wish_becomes_a_command(workspace: Workspace, latents: Path) -> None:
    root = workspace.roots[0]
    choice = start_form.wish(workspace, "instrument", "latents", "nano-base", 20, "runs/a", "seed=1", "")
    assert choice.command() == [
        "sa3-train", "recipe=instrument", f"data={latents}", "model=nano-base", f"run_dir={root / 'runs' / 'a'}",
        "trainer.max_steps=20", "seed=1",
    ]  # fmt: skip
    going_on = start_form.wish(workspace, "continue", "latents", "nano-base", 0, "", "", "adapters/one.safetensors")
    assert f"adapter.start_from={root / 'adapters' / 'one.safetensors'}" in going_on.command()
    assert not any("max_steps" in part for part in going_on.command())
    assert going_on.run_dir.parent == root / "runs"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"recipe": "sweep"}, "no recipe"),
        ({"data": ""}, "choose the latents"),
        ({"data": "/etc"}, "outside the folders"),
        ({"data": "nothing"}, "there is no folder of latents"),
        ({"model": "../../etc"}, "outside the folders"),
        ({"folder": "../x"}, "outside the folders"),
        ({"folder": "/etc/x"}, "outside the folders"),
        ({"steps": -1}, "not possible"),
        ({"steps": 1.5}, "not possible"),
        ({"recipe": "continue"}, "choose its file"),
        ({"recipe": "continue", "adapter": "/etc/passwd"}, "outside the folders"),
    ],
)
def test_wishes_that_cannot_be_are_refused(
    workspace: Workspace, latents: Path, changed: dict[str, Any], told: str
) -> None:
    wish: dict[str, Any] = {"recipe": "instrument", "data": "latents", "model": "nano-base", "steps": 0}
    wish |= {"folder": "", "further": "", "adapter": ""}
    with pytest.raises(SA3Error, match=told):
        start_form.wish(workspace, **wish | changed)


def test_the_trainer_itself_composes_and_refuses(workspace: Workspace, latents: Path) -> None:
    choice = Choice("instrument", latents, "nano-base", workspace.roots[0] / "run", 20, ("optimizer.lr=0.5",))
    config = estimate.compose(choice)
    assert (config["trainer"]["max_steps"], config["optimizer"]["lr"]) == (20, 0.5)
    assert not choice.run_dir.exists()
    with pytest.raises(SA3Error, match="optimizer.lr"):
        estimate.compose(
            Choice("instrument", latents, "nano-base", workspace.roots[0] / "run", 20, ("optimizer.lrr=0.5",))
        )


def test_the_data_is_what_its_index_says(latents: Path, tmp_path: Path) -> None:
    assert summarise(latents) == DataSummary(4, 6.0, 2, 6.0, "nano", 1, 64)
    with pytest.raises(SA3Error, match="encode a folder of audio first"):
        summarise(tmp_path)
    (latents / "index.json").write_text("{")
    with pytest.raises(SA3Error, match="damaged"):
        summarise(latents)


def test_a_trial_is_a_run_of_few_steps_that_leaves_nothing(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], seconds: float) -> str:
        ran.append(command)
        folder = Path(next(part for part in command if part.startswith("run_dir=")).partition("=")[2])
        folder.mkdir()
        (folder / "metrics.csv").write_text(
            "step,time/steps_per_second,time/peak_memory_gib\n1,0.1,1.0\n2,2.0,1.25\n3,4.0,1.5\n"
        )
        (folder / "machine.json").write_text(json.dumps({"device": "1 × CPU", "plan": {"weights": 8, "average": 0}}))
        return ""

    monkeypatch.setattr(estimate, "_run", run)
    settings = ("optimizer.lr=1", "logger=wandb", "callbacks.judge.every=5", "callbacks=default")
    trial = estimate.measure(Choice("style", latents, "nano-base", tmp_path / "run", 500, settings))
    assert trial == Trial(2 / (1 / 2 + 1 / 4), 1.5, "1 × CPU", {"weights": 8})
    assert set(estimate.TRIAL) <= set(ran[0])
    assert "optimizer.lr=1" in ran[0]
    assert not {*settings[1:], "trainer.max_steps=500"} & set(ran[0])
    run_dir = Path(next(part for part in ran[0] if part.startswith("run_dir=")).partition("=")[2])
    assert not run_dir.parent.exists()
    assert not (tmp_path / "run").exists()


def test_commands_that_fail_say_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "program", lambda name: "/bin/sh")
    with pytest.raises(SA3Error, match="^no such clip; mend it$"):
        estimate._run(
            ["sa3-train", "-c", "echo noise >&2; echo 'error: no such clip;\n       mend it' >&2; exit 1"], 10
        )
    with pytest.raises(SA3Error, match="exit code 3"):
        estimate._run(["sa3-train", "-c", "exit 3"], 10)
    with pytest.raises(SA3Error, match="has not answered"):
        estimate._run(["sa3-train", "-c", "sleep 5"], 0.1)


def test_the_outlook_in_words() -> None:
    said = dict(estimate.outlook(CONFIG, DATA))
    assert said["Data"] == "100 clips, 15 min; 10 held out; encoded by nano"
    assert said["Steps"] == "1,000, each of 8 clips"
    assert said["Passes"] == "each clip comes about 80 times"
    assert "Note" not in said
    assert "nothing is held out" in dict(estimate.outlook(CONFIG, DataSummary(1, 1.0, 0, 0.0, "nano", 0, 1)))["Note"]
    packed = CONFIG | {"data": CONFIG["data"] | {"pack_frames": 258}}
    assert dict(estimate.outlook(packed, DATA))["Steps"] == "1,000, each of 8 packed rows"


def test_time_is_steps_judging_and_demos() -> None:
    row = 0.5 / 8 / 2  # a step of 0.5 s, 8 rows, half of it forward
    assert estimate.judging_seconds(CONFIG, DATA, TRIAL) == pytest.approx(5 * (10 + 16) * 10 * row)
    assert estimate.playing_seconds(CONFIG, TRIAL) == pytest.approx(3 * (1 + 2 * 2) * 50 * 2 * row)
    silent = {part: {**values, "enabled": False} for part, values in CONFIG["callbacks"].items()}
    assert estimate.judging_seconds(CONFIG | {"callbacks": silent}, DATA, TRIAL) == 0
    assert estimate.playing_seconds(CONFIG | {"callbacks": silent}, TRIAL) == 0
    said = dict(estimate.expected(CONFIG, DATA, TRIAL))
    assert said["Time"].startswith("about 10 min on 1 × CPU: steps 8 min at 2 a second, judging 41 s, demos 47 s")
    assert said["Memory plan"] == "1.00 GiB: weights 1.00 GiB, adapter 1.0 MiB"
