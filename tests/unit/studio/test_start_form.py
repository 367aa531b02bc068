"""The form that starts a run is checked before anything is started."""

import threading
from pathlib import Path
from typing import Any

import pytest

from helpers.run_dirs import make_run
from sa3train.core.errors import SA3Error
from sa3train.studio.runs import estimate, start_form
from sa3train.studio.runs.estimate import Trial
from sa3train.studio.server import folders, widgets
from sa3train.studio.server.workspace import Workspace


def test_the_form_becomes_a_command(workspace: Workspace, latents: Path) -> None:
    root = workspace.folder
    request = start_form.parse_request(workspace, "instrument", "latents", "nano-base", 20, "runs/a", "seed=1", "")
    assert request.build_command() == [
        "sa3-train", "recipe=instrument", f"data={latents}", "model=nano-base", f"run_dir={root / 'runs' / 'a'}",
        "trainer.max_steps=20", "seed=1",
    ]  # fmt: skip
    odd = start_form.parse_request(workspace, "instrument", "latents", "nano-base", "", "${oc.env:HOME}, x", "", "")
    assert odd.run_dir == root / "runs" / "${oc.env:HOME}, x"
    assert odd.build_command()[-1] == f'run_dir="{root}/runs/\\${{oc.env:HOME}}, x"'
    adapter = "adapters/one.safetensors"
    continued = start_form.parse_request(workspace, "continue", "latents", "nano-base", None, "", "", adapter)
    assert f"adapter.start_from={workspace.sources[0] / adapter}" in continued.build_command()
    assert not any("max_steps" in part for part in continued.build_command())
    assert continued.run_dir.parent == root / "runs"


def test_a_start_tells_of_its_steps_and_of_a_run_that_is_going_on(
    workspace: Workspace, latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ("style", "latents", "nano-base", "", "mine", "", "")
    request = start_form.parse_request(workspace, *values)
    config = {"trainer": {"max_steps": 2000, "accumulate": 1}, "data": {"batch_size": 4, "pack_frames": None},
              "adapter": {"adapter_type": "lora", "rank": 8}, "model": {"name": "nano-base"},
              "callbacks": {"validation": {"enabled": False}, "demos": {"enabled": False}}}  # fmt: skip
    started: list[Path] = []
    monkeypatch.setattr(estimate, "compose_config", lambda request: config)
    monkeypatch.setattr(estimate, "count_uncaptioned", lambda folder: 0)
    monkeypatch.setattr(estimate, "_run", lambda *_: "")
    monkeypatch.setattr(estimate, "read_trial", lambda folder: Trial(2.0, 1.0, "1 × CPU", {}))
    monkeypatch.setattr(start_form.runs, "start_run", lambda folder, command: started.append(folder))
    *_, (_, told, shown, _, known) = start_form.stream_start(workspace, (), *values)
    assert "Started runs/mine" in told and started == [request.run_dir] and known == ()
    assert "2,000 with a batch of 4 clips" in shown and "about" not in shown
    estimate.run_trial(request)
    make_run(workspace.folder / "runs" / "other", old=False)
    folders.forget_folders()
    *_, (_, told, shown, _, known) = start_form.stream_start(workspace, (), *values)
    assert len(started) == 1, "nothing was started"
    assert "runs/other" in told and "Press Start again" in told and "about 17 min on 1 × CPU" in shown
    *_, (_, told, *_) = start_form.stream_start(workspace, known, *values)
    assert len(started) == 2 and "Started runs/mine" in told


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "sweep"}, "no recipe"),
        ({"data": ""}, "Latents are missing"),
        ({"data": "/etc"}, "outside the folders"),
        ({"data": "nothing"}, "no folder of latents"),
        ({"model": "../../etc"}, "outside the folders"),
        ({"folder": "../x"}, "inside the workspace"),
        ({"folder": "/etc/x"}, "inside the workspace"),
        *(
            ({"steps": steps}, "Steps")
            for steps in (0, "0", -1, 1.5, "x", "nan", float("nan"), float("inf"), 1e12, 1e300, True)
        ),
        ({"steps": 5, "settings": "trainer.max_steps=6"}, "set twice"),
        ({"settings": "seed=1\nseed=2"}, "set twice"),
        ({"recipe": "continue"}, "Start from adapter"),
        ({"recipe": "continue", "adapter": "/etc/passwd"}, "outside the folders"),
    ],
)
def test_invalid_requests_are_refused(
    workspace: Workspace, latents: Path, changed: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {"recipe": "instrument", "data": "latents", "model": "nano-base", "steps": ""}
    values |= {"folder": "", "settings": "", "adapter": ""}
    with pytest.raises(SA3Error, match=message):
        start_form.parse_request(workspace, **values | changed)


def test_a_plan_tells_at_once_and_all_the_time_what_it_waits_for(
    workspace: Workspace, latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widgets, "SHOW_SECONDS", 0.01)
    going_on = threading.Event()

    def compose(_: Any) -> Any:
        assert going_on.wait(10)
        raise SA3Error("no such recipe")

    monkeypatch.setattr(estimate, "compose_config", compose)
    updates = start_form.stream_plan(workspace, "style", "latents", "nano-base", "", "mine", "", "")
    assert all("Checking the settings… 0 s" in next(updates)[1] for _ in range(2))
    going_on.set()
    with pytest.raises(SA3Error, match="no such recipe"):
        list(updates)
