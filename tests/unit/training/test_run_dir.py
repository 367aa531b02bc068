"""A run folder is begun once and resumed as what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sa3train.core.errors import ConfigError
from sa3train.reports.run_files import format_settings, load_settings
from sa3train.training.callbacks.checkpoint import (
    StateVersionError,
    find_latest_checkpoint,
    get_checkpoint_path,
    save_state,
)
from sa3train.training.run_dir import is_requeued, open_run

SETTINGS: dict[str, Any] = {
    "run_dir": "a", "adapter": {"rank": 4}, "logger": {"name": "csv"}, "data": {"num_workers": 0, "crop": (1, 2)},
    "callbacks": {"demos": {"every": 5}, "validation": {"every": 5}}, "trainer": {"max_steps": 10, "log_every": 1},
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
    assert is_requeued() and open_run(tmp_path, SETTINGS, IDENTITY, resume=False).record["resumed"]


def test_what_differs_is_listed_and_can_be_allowed_by_name(tmp_path: Path) -> None:
    begin(tmp_path)
    other = changed(adapter__rank=8, trainer__max_steps=20)
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path, other, {"data": "xyz", "base": "def"}, resume=True)
    message = str(caught.value)
    assert "adapter.rank: 4 -> 8" in message and "trainer.max_steps: 10 -> 20" in message
    assert "identity.data: abc -> xyz" in message
    assert "allow_resume_changes=[adapter.rank,trainer.max_steps,identity.data]" in message
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
    with pytest.raises(ConfigError, match=r"callbacks\.validation\.every"):
        open_run(tmp_path, changed(callbacks__validation__every=6), IDENTITY, resume=True)


def test_settings_survive_yaml_even_where_hydra_would_interpolate(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    settings = {"prompts": ["${not.an.interpolation}", "a: b # c", "{caption}", "ü"], "lr": 1e-4, "none": None}
    (tmp_path / "c.yaml").write_text(format_settings(settings), encoding="utf-8")
    assert load_settings(tmp_path / "c.yaml") == settings
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "c.yaml"), resolve=True) == settings


def test_a_half_written_newest_state_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6):
        save_state(get_checkpoint_path(tmp_path, step), {"step": torch.tensor(step)})
    get_checkpoint_path(tmp_path, 6).write_bytes(get_checkpoint_path(tmp_path, 6).read_bytes()[:-9])
    (tmp_path / "checkpoints" / ".step-00000008.safetensors.x.part").write_bytes(b"torn")
    found = find_latest_checkpoint(tmp_path)
    assert found == (4, get_checkpoint_path(tmp_path, 4))
    assert find_latest_checkpoint(tmp_path / "nowhere") is None


def test_a_run_with_other_random_draws_is_not_resumed_and_the_reason_is_given(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"identity\.draws: None -> 2 \(this version of sa3train draws"):
        open_run(tmp_path, SETTINGS, IDENTITY | {"draws": "2"}, resume=True)
    open_run(tmp_path, SETTINGS, IDENTITY | {"draws": "2"}, resume=True, allowed=["identity.draws"])


def test_states_of_another_version_are_refused_and_not_passed_over(tmp_path: Path) -> None:
    begin(tmp_path)
    save_file({"x": torch.ones(1)}, ensure_parent(get_checkpoint_path(tmp_path, 3)), {"format": "sa3train-state-1"})
    with pytest.raises(StateVersionError, match="sa3train-state-1"):
        open_run(tmp_path, SETTINGS, IDENTITY, resume=True)


def ensure_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
