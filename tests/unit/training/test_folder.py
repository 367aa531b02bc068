"""A run folder is begun once and resumed as what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sa3train.core.errors import ConfigError
from sa3train.reports.run_files import dump_settings, load_settings
from sa3train.training.callbacks.checkpoint import newest_state, save_state, state_path
from sa3train.training.run_dir import open_run, requeued

SETTINGS: dict[str, Any] = {
    "run_dir": "a", "adapter": {"rank": 4}, "logger": {"name": "csv"}, "data": {"num_workers": 0, "crop": (1, 2)},
    "callbacks": {"demos": {"every": 5}, "judge": {"every": 5}}, "trainer": {"max_steps": 10, "log_every": 1},
}  # fmt: skip
IDENTITY = {"data": "abc", "base": "def"}


def changed(**values: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(SETTINGS))
    for key, value in values.items():
        *sections, name = key.split("__")
        place = copy
        for section in sections:
            place = place[section]
        place[name] = value
    return copy


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def begin(path: Path) -> Path:
    open_run(path, SETTINGS, IDENTITY, resume=False)
    return path


def test_a_run_is_recorded_with_its_settings_and_keeps_its_id(tmp_path: Path) -> None:
    first = open_run(tmp_path / "r", SETTINGS, IDENTITY, resume=False)
    assert first.state is None and load_settings(tmp_path / "r" / "config.yaml")["adapter"] == {"rank": 4}
    again = open_run(tmp_path / "r", SETTINGS, IDENTITY, resume=True)
    assert again.run_id == first.run_id and len(again.record["resumed"]) == 1


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run.*resume="):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=False)


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=True)


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_requeued_job_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    begin(tmp_path)
    monkeypatch.setenv(name, "1")
    assert requeued() and open_run(tmp_path, SETTINGS, IDENTITY, resume=False).record["resumed"]


def test_what_differs_is_listed_and_can_be_allowed_by_name(tmp_path: Path) -> None:
    begin(tmp_path)
    other = changed(adapter__rank=8, trainer__max_steps=20)
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path, other, {"data": "xyz", "base": "def"}, resume=True)
    message = str(caught.value)
    assert "adapter.rank: 4 -> 8" in message and "trainer.max_steps: 10 -> 20" in message
    assert "identity.data: abc -> xyz" in message
    assert "resume_changes=[adapter.rank,trainer.max_steps,identity.data]" in message
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        open_run(tmp_path, other, IDENTITY, resume=True, allowed=["trainer.max_steps"])
    run = open_run(tmp_path, other, IDENTITY, resume=True, allowed=["trainer", "adapter.*"])
    assert run.changes == {"adapter.rank": (4, 8), "trainer.max_steps": (10, 20)}
    assert run.record["resumed"][-1]["changes"] == {"adapter.rank": [4, 8], "trainer.max_steps": [10, 20]}
    assert load_settings(tmp_path / "config.yaml")["adapter"] == {"rank": 8}, "the next resume compares with this"
    open_run(tmp_path, other, {"data": "new", "base": "new"}, resume=True, allowed=["all"])


def test_what_does_not_touch_learning_may_change(tmp_path: Path) -> None:
    begin(tmp_path)
    free = changed(
        run_dir="moved", logger__name="wandb", data__num_workers=4, callbacks__demos__every=9, trainer__log_every=7
    )
    assert open_run(tmp_path, free, IDENTITY, resume=True).changes == {}
    with pytest.raises(ConfigError, match=r"callbacks\.judge\.every"):
        open_run(tmp_path, changed(callbacks__judge__every=6), IDENTITY, resume=True)


def test_settings_survive_yaml_even_where_hydra_would_interpolate(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    settings = {"prompts": ["${not.an.interpolation}", "a: b # c", "{caption}", "ü"], "lr": 1e-4, "none": None}
    (tmp_path / "c.yaml").write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(tmp_path / "c.yaml") == settings
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "c.yaml"), resolve=True) == settings


def test_a_half_written_newest_state_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6):
        save_state(state_path(tmp_path, step), {"step": torch.tensor(step)})
    state_path(tmp_path, 6).write_bytes(state_path(tmp_path, 6).read_bytes()[:-9])
    (tmp_path / "checkpoints" / ".step-00000008.safetensors.x.part").write_bytes(b"torn")
    found = newest_state(tmp_path)
    assert found == (4, state_path(tmp_path, 4))
    assert newest_state(tmp_path / "nowhere") is None
