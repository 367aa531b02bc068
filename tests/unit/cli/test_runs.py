"""`sa3-runs`: what it prints as text and as JSON, and its exit codes."""

import json
from pathlib import Path

import pytest
import torch

from helpers.run_dirs import make_run, write_record
from sa3train.cli.compare import format_table
from sa3train.cli.runs import main
from sa3train.core import processes
from sa3train.core.safetensors_file import write_tensors
from sa3train.reports.comparison import read_changes
from sa3train.reports.run_files import EVALUATION_FILE
from sa3train.reports.verdict import ALL_COPIES


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two validated runs that differ in rank, and one that is somebody else's or failed."""
    monkeypatch.chdir(tmp_path)
    for name, rank, losses in (("one", 8, (0.5, 0.6)), ("two", 16, (0.7, 0.4))):
        folder = make_run(tmp_path / "runs" / name, "finished", adapter={"rank": rank})
        rows = [
            {"step": 20 * (number + 1), "val": {"loss": loss, "by_clip": [loss / 2, loss * 2]}}
            for number, loss in enumerate(losses)
        ]
        base = {"val": {"loss": 0.8, "by_clip": [0.8, 0.8]}}
        items = {"val": [{"base": 0.8, "adapter": losses[-1] * share} for share in (0.5, 2)]}
        (folder / "validation.json").write_text(json.dumps({"base": base, "history": rows, "items": items}))
        (folder / "adapter.safetensors").touch()
    write_record(tmp_path / "runs" / "failed")
    (tmp_path / "runs" / "failed" / processes.LOG_FILE).write_text("$ sa3-train\nerror: no such data\n")
    return tmp_path / "runs"


def read(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_every_verb_prints_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert {Path(run["path"]).name: run["state"] for run in json.loads(read(capsys))} == {
        "one": "finished", "two": "finished", "failed": "failed",
    }  # fmt: skip
    assert main(["show", "runs/two", "--json"]) == 0
    shown = json.loads(read(capsys))
    assert (shown["step"], shown["total"], shown["adapter"]) == (40, 100, "runs/two/adapter.safetensors")
    assert main(["watch", "runs/one", "--json"]) == 0
    assert json.loads(read(capsys))["state"] == "finished"
    assert main(["compare", "runs", "--json"]) == 0
    rows = json.loads(read(capsys))
    assert [(row["adapter.rank"], row["best"], row["best step"]) for row in rows] == [(16, 0.4, 40), (8, 0.5, 20)]
    assert main(["best", "runs/one", "runs/two", "--json"]) == 0
    best = json.loads(read(capsys))
    assert (best["adapter"], best["step"]) == ("runs/two/adapter.safetensors", 40)
    assert len(best["notes"]) == 1 and best["notes"][0].startswith("Cannot tell: ") and not best["is_better"]
    assert best["change"] == pytest.approx(-0.5)


def test_text_says_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "runs"])
    assert "runs/one     finished  " in read(capsys)
    assert main(["watch", "runs/failed"]) == 1
    assert "no such data" in read(capsys)
    main(["compare", "runs"])
    table = read(capsys)
    assert "adapter.rank" in table and "evaluated" not in table and table.index("two") < table.index("one")
    main(["best", "runs"])
    assert "Cannot tell: loss on held-out clips is" in (said := read(capsys))
    assert "to try it all the same: --lora runs/two/adapter.safetensors=1" in said


def test_many_settings_are_listed_below_the_ranking() -> None:
    rows = [{"run": f"runs/{n}", **{f"section.setting_{k}": n * k for k in range(20)}, "best": 0.1} for n in (1, 2)]
    lines = format_table(rows)
    assert [line.split() for line in lines[:3]] == [["run", "best"], ["#1", "runs/1", "0.1"], ["#2", "runs/2", "0.1"]]
    assert [line.split() for line in lines[3:]] == [
        [], ["#1", "#2"], *([f"section.setting_{k}", str(k), str(2 * k)] for k in range(20)),
    ]  # fmt: skip


def test_runs_with_another_measure_are_ranked_by_themselves(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "two" / "validation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"measure": "round_trips"}))
    assert main(["compare", "runs", "--json"]) == 0
    said = capsys.readouterr()
    assert [(row["run"], row["measure"]) for row in json.loads(said.out)] == [
        ("runs/one", None), ("runs/two", "round_trips"),
    ]  # fmt: skip
    assert "each kind is ranked by itself" in said.err
    assert main(["best", "runs"]) == 0
    assert "best: runs/one" in (best := capsys.readouterr().out) and "best of the decoder runs: runs/two" in best


def test_the_best_step_may_be_gone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["best", "runs/one", "--json"]) == 0
    assert "not that of step 20" in json.loads(read(capsys))["notes"][0]
    (runs / "one" / "checkpoints").mkdir()
    (runs / "one" / "checkpoints" / "step-00000020.safetensors").touch()
    assert main(["best", "runs/one", "--json"]) == 0
    assert json.loads(read(capsys))["adapter"] == "runs/one@20"


def test_evaluations_decide_where_every_run_has_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, change in (("one", -0.3), ("two", -0.2)):
        row = {"adapter": f"elsewhere/{name}@20", "step": 20, "strength": 0.5}
        row["against_base"] = {"loss": {"change": change}}
        found = {"pick": {"candidate": 0, "text": "surely", "is_base": False}, "candidates": [row]}
        assert main(["best", "runs", "--json"]) == 0
        assert json.loads(read(capsys))["run"] == "runs/two", "one run has none"
        (runs / name / EVALUATION_FILE).write_text(json.dumps(found))
        (runs / name / "checkpoints").mkdir()
        (runs / name / "checkpoints" / "step-00000020.safetensors").touch()
    assert main(["best", "runs", "--json"]) == 0
    best = json.loads(read(capsys))
    notes = ["surely", "Later steps than 20 were not measured."]
    assert (best["adapter"], best["strength"], best["notes"]) == ("runs/one@20", 0.5, notes)
    main(["best", "runs"])
    assert "\nuse it: --lora runs/one@20=0.5" in read(capsys)
    (runs / "one" / "checkpoints" / "step-00000020.safetensors").unlink()
    assert main(["best", "runs", "--json"]) == 0
    assert json.loads(read(capsys))["adapter"] == "runs/two/adapter.safetensors", "what is gone cannot be used"
    evaluation = runs / "two" / EVALUATION_FILE
    for step, adapter in ((20, "runs/two@20"), (40, "runs/two/adapter.safetensors")):
        write_tensors(runs / "two" / "adapter.safetensors", {"a": torch.ones(1)}, {"step": "40"})
        row |= {"adapter": "elsewhere/two/adapter.safetensors", "step": step}
        evaluation.write_text(
            json.dumps({"pick": {"candidate": 0, "text": "surely", "is_base": False}, "candidates": [row]})
        )
        assert main(["best", "runs/two", "--json"]) == 0
        assert json.loads(read(capsys))["adapter"] == adapter, "the file of the end is of a later step"
    evaluation.write_text(json.dumps({"pick": None, "candidates": [row]}))
    assert main(["best", "runs/two", "--json"]) == 0
    assert f"sa3-eval picks the {ALL_COPIES}." in json.loads(read(capsys))["notes"]


def test_losses_of_other_clips_are_not_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "one" / "validation.json"
    validation = json.loads(file.read_text())
    validation["history"][0]["val"] = {"loss": 0.1}
    validation["history"].insert(1, {"step": 30, "val": {"loss": float("nan"), "by_clip": [0.5, float("nan")]}})
    file.write_text(json.dumps(validation))
    assert main(["compare", "runs", "--json"]) == 0
    rows = json.loads(read(capsys))
    assert [(row["best"], row["best step"]) for row in rows] == [(0.4, 40), (0.6, 40)]
    assert read_changes(runs / "one") == {40: pytest.approx(-0.25)}
    assert main(["best", "runs/one", "--json"]) == 0
    assert json.loads(read(capsys))["step"] == 40
    validation["history"] = validation["history"][:2]
    file.write_text(json.dumps(validation))
    assert main(["best", "runs/one"]) == 1 and main(["best", "runs"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "contains no run"),
        (["stop", "runs/one"], "is not running"),
        (["list", "nothing"], "There is no folder"),
        (["compare", "runs/failed"], "validation"),
    ],
)
def test_mistakes_are_explained(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_run_that_was_not_validated_has_no_best_step(
    runs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its adapter is measured before the first step, which is no validation."""
    content = {"base": {}, "history": [{"step": 0, "val": {"loss": 0.8}}], "best_step": 0, "best_loss": 0.8}
    (runs / "one" / "validation.json").write_text(json.dumps(content))
    assert main(["show", "runs/one"]) == 0
    shown = read(capsys)
    assert "not validated" in shown and "best step" not in shown
    assert main(["show", "runs/one", "--json"]) == 0
    assert json.loads(read(capsys))["best_step"] is None
    trained = json.loads((runs / "two" / "validation.json").read_text()) | {"best_step": 0}
    (runs / "one" / "validation.json").write_text(json.dumps(trained))
    assert main(["show", "runs/one"]) == 0
    assert "no step is better than its start" in read(capsys)
    (runs / "one" / "validation.json").unlink()
    assert main(["compare", "runs"]) == 0
    assert "not validated, so not compared: runs/failed, runs/one" in caplog.text
