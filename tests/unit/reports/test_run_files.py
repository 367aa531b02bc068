"""A run folder is read as it is, and what its metrics say is said."""

import json
import os
from pathlib import Path

import pytest

from helpers.run_folder import make_items, make_losses, write_json
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.run_files import read_run
from sa3train.reports.run_report import render_report
from sa3train.reports.verdict import summarize_run


def test_what_the_metrics_say(run: Path) -> None:
    files = read_run(str(run))
    assert files.seconds == 90.0
    assert files.peak_memory_gib == 1.5
    summary = " ".join(summarize_run(files))
    assert "20.0% lower per clip than the base model's (±30.2%, 12 clips: within noise) at step 10" in summary
    assert "At step 10; since then the loss has risen by 12.5%" in summary
    assert "may be copies" in summary


@pytest.mark.parametrize(("loss", "is_said"), [(1.6, True), (1.05, False)])
def test_worse_on_held_out_clips_is_said_where_it_is_beyond_chance(run: Path, loss: float, is_said: bool) -> None:
    validation = json.loads((run / "validation.json").read_text())
    validation["history"].append({"step": 30, **make_losses(loss, 0.4)})
    validation["items"] = {"val": make_items(loss, 12), "train_eval": make_items(0.4, 12)}
    write_json(run / "validation.json", validation)
    assert ("got worse on held-out clips" in " ".join(summarize_run(read_run(run)))) == is_said
    assert f'class="{"bad" if is_said else ""}">+{loss - 1:.1%}' in render_report(read_run(run))


def test_an_empty_folder_is_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "demos" / "step-1").mkdir(parents=True)
    os.mkfifo(tmp_path / "demos" / "step-1" / "demos.json")
    files = read_run(tmp_path)
    assert (files.step, files.seconds, files.peak_memory_gib) == (0, 0.0, None)
    assert summarize_run(files) == []


def test_a_run_of_which_the_base_alone_is_validated_has_no_result(run: Path) -> None:
    path = run / "validation.json"
    validation = json.loads(path.read_text())
    assert compute_loss_change(read_run(run).validation, "val") is not None
    path.write_text(json.dumps(validation | {"history": [row | {"step": 0} for row in validation["history"][:1]]}))
    assert compute_loss_change(read_run(run).validation, "val") is None
