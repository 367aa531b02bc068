"""The plan of a run: what was chosen is checked, composed by the trainer, tried, and put in words."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sa3train.core.errors import SA3Error
from sa3train.data.shards.index import DataSummary, summarize_data
from sa3train.studio.runs import estimate
from sa3train.studio.runs.estimate import RunRequest, Trial
from sa3train.studio.server.workspace import Workspace

CONFIG: dict[str, Any] = {
    "trainer": {"max_steps": 1000, "accumulate": 2},
    "data": {"batch_size": 4, "pack_frames": None, "crop_seconds": 10.0},
    "adapter": {"adapter_type": "dora-rows", "rank": 8},
    "model": {"name": "nano-base"},
    "callbacks": {
        "validation": {"enabled": True, "clips": 16, "every": 250, "strengths": [1.25]},
        "demos": {
            "enabled": True, "every": 500, "prompts": [], "heldout_prompts": 2, "inpaint": True,
            "strengths": [0.5, 1.0], "steps": None, "duration": 10.0,
        },
    },
}  # fmt: skip
DATA = DataSummary(100, 900.0, 10, "nano", 1, 9000)
TRIAL = Trial(2.0, 1.5, "1 × CPU", {"weights": 2**30, "adapter": 2**20})


def test_the_recipes_that_are_offered_each_make_one_run() -> None:
    assert {"instrument", "style", "sfx", "continue"} <= estimate.list_recipes().keys()
    assert "sweep" not in estimate.list_recipes()
    assert all(estimate.list_recipes().values())
    assert "Card" not in "".join(estimate.list_recipes().values())


@pytest.mark.parametrize(
    "line",
    [
        "data=/etc", "+data=/etc", "adapter=../../x", "callbacks=/etc/x", "data.more.0.path=/etc",
        "run_dir=/etc", "paths.runs=/etc", "hydra.run.dir=/etc", "resume=/etc", "model.name=/etc", "data.dir=/etc",
        "data.more=[{path: /etc}]", "adapter.start_from=/etc/x", "--config-dir=/etc", "-m", "optimizer", "~optimizer",
        "seed=${oc.env:HOME}", "data.prompts.trigger=$\\{oc.env:HOME\\}", "data.prompts.trigger='\\\\${oc.env:HOME}'",
        "+run_dir=/etc", "++data.dir=/etc", "data@x=y", "hydra/launcher=basic", "launcher=slurm",
    ],
)  # fmt: skip
def test_settings_that_reach_beyond_the_run_are_refused(line: str) -> None:
    with pytest.raises(SA3Error):
        estimate.parse_settings(f"optimizer.lr=1e-3\n{line}")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("recipe=sfx", "Recipe"), ("data=mine", "Latents"), ("++data.dir=mine", "Latents"),
        ("data.more=[]", "Latents"), ("model.name=nano", "Base model"), ("run_dir=mine", "Run folder"),
        ("adapter.start_from=mine", "Start from adapter"),
    ],
)  # fmt: skip
def test_a_setting_that_the_form_makes_is_told_with_its_field(line: str, field: str) -> None:
    with pytest.raises(SA3Error, match=f"is set by the field {field}") as told:
        estimate.parse_settings(line)
    assert "start with" not in str(told.value)
    with pytest.raises(SA3Error, match="cannot be set here. Settings start with data,"):
        estimate.parse_settings("paths.runs=mine")


@given(st.text(st.sampled_from("\\\\\\${}\"'()[]:,.a "), max_size=14))
@hypothesis_settings(max_examples=400, deadline=None)
def test_no_setting_reaches_the_environment(around: str) -> None:
    """Whatever Hydra makes of an accepted line, nothing in it is looked up."""
    for value in (around, around.replace("a", "${oc.env:HOME}"), around.replace("a", "$\\{oc.env:HOME\\}")):
        try:
            (line,) = estimate.parse_settings(f"data.prompts.trigger={value}x")
            parsed = OverridesParser.create().parse_override(line)
        except (SA3Error, HydraException):
            continue
        if not parsed.is_sweep_override():
            config = OmegaConf.create({"a": parsed.value()})
            assert os.environ["HOME"] not in str(OmegaConf.to_container(config, resolve=True))


def test_settings_are_one_a_line() -> None:
    text = "\n optimizer.lr=1e-3 \n\nadapter=lora\ncallbacks.demos.prompts=[a b, 'c=d']\nseed=1"
    assert estimate.parse_settings(text) == (
        "optimizer.lr=1e-3", "adapter=lora", "callbacks.demos.prompts=[a b, 'c=d']", "seed=1"
    )  # fmt: skip


def test_the_trainer_itself_composes_and_refuses(workspace: Workspace, latents: Path) -> None:
    choice = RunRequest("instrument", latents, "nano-base", workspace.sources[0] / "run", 20, ("optimizer.lr=0.5",))
    config = estimate.compose_config(choice)
    assert (config["trainer"]["max_steps"], config["optimizer"]["lr"]) == (20, 0.5)
    assert not choice.run_dir.exists()
    with pytest.raises(SA3Error, match="optimizer.lr"):
        estimate.compose_config(
            RunRequest("instrument", latents, "nano-base", workspace.sources[0] / "run", 20, ("optimizer.lrr=0.5",))
        )


def test_the_data_is_what_its_index_says(latents: Path, tmp_path: Path) -> None:
    assert summarize_data(latents) == DataSummary(4, 6.0, 2, "nano", 1, 64)
    with pytest.raises(SA3Error, match="encode a folder of audio first"):
        summarize_data(tmp_path)
    (latents / "index.json").write_text("{")
    with pytest.raises(SA3Error, match="damaged"):
        summarize_data(latents)


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
        (folder / "system.json").write_text(json.dumps({"device": "1 × CPU", "plan": {"weights": 8, "ema": 0}}))
        return ""

    monkeypatch.setattr(estimate, "_run", run)
    settings = ("optimizer.lr=1", "logger=wandb", "callbacks.validation.every=5", "callbacks=base")
    trial = estimate.run_trial(RunRequest("style", latents, "nano-base", tmp_path / "run", 500, settings))
    assert trial == Trial(2 / (1 / 2 + 1 / 4), 1.5, "1 × CPU", {"weights": 8})
    assert set(estimate.TRIAL_SETTINGS) <= set(ran[0])
    assert "optimizer.lr=1" in ran[0]
    assert not {*settings[1:], "trainer.max_steps=500"} & set(ran[0])
    run_dir = Path(next(part for part in ran[0] if part.startswith("run_dir=")).partition("=")[2])
    assert not run_dir.parent.exists()
    assert not (tmp_path / "run").exists()


def test_commands_that_fail_say_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "find_program", lambda name: "/bin/sh")
    with pytest.raises(SA3Error, match="^no such clip; fix it$"):
        estimate._run(["sa3-train", "-c", "echo noise >&2; echo 'error: no such clip;\n       fix it' >&2; exit 1"], 10)
    with pytest.raises(SA3Error, match="exit code 3"):
        estimate._run(["sa3-train", "-c", "exit 3"], 10)
    with pytest.raises(SA3Error, match="did not finish"):
        estimate._run(["sa3-train", "-c", "sleep 5"], 0.1)


def test_the_plan_in_words() -> None:
    said = dict(estimate.describe_plan(CONFIG, DATA))
    assert said["Data"] == "100 clips, 15 min; 10 held out; encoded by nano"
    assert said["Steps"] == "1,000 with a batch of 8 clips"
    assert said["Epochs"] == "80"
    assert "Note" not in said
    assert "held out" in dict(estimate.describe_plan(CONFIG, DataSummary(1, 1.0, 0, "nano", 0, 1)))["Note"]
    assert dict(estimate.describe_plan(CONFIG, DATA, 3))["Note"].startswith("3 of 110 clips have no caption")
    packed = CONFIG | {"data": CONFIG["data"] | {"pack_frames": 258}}
    assert dict(estimate.describe_plan(packed, DATA))["Steps"] == "1,000 with a batch of 8 packed rows"


def test_time_is_steps_validation_and_demos() -> None:
    row = 0.5 / 8 / 2  # a step of 0.5 s, 8 rows, half of it forward
    assert estimate.estimate_validation_seconds(CONFIG, DATA, TRIAL) == pytest.approx((5 * (10 + 16) + 10) * 10 * row)
    assert estimate.estimate_demo_seconds(CONFIG, TRIAL) == pytest.approx(3 * (1 + 2 * 2) * 50 * 2 * row)
    silent = {part: {**values, "enabled": False} for part, values in CONFIG["callbacks"].items()}
    assert estimate.estimate_validation_seconds(CONFIG | {"callbacks": silent}, DATA, TRIAL) == 0
    assert estimate.estimate_demo_seconds(CONFIG | {"callbacks": silent}, TRIAL) == 0
    said = dict(estimate.describe_trial(CONFIG, DATA, TRIAL))
    assert said["Time"].startswith("about 10 min on 1 × CPU: steps 8 min at 2 per second, validation 44 s, demos 47 s")
    assert said["Memory plan"] == "1.00 GiB: weights 1.00 GiB, adapter 1.0 MiB"
