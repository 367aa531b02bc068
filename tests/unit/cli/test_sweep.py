"""`sa3-sweep`: the space that it searches, and that every point is trained once, whatever is killed meanwhile."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from helpers.stub_commands import start_command, write_stubs
from sa3train.cli import sweep
from sa3train.cli.search_space import format_point, iterate_points, parse_space, read_space
from sa3train.core import processes
from sa3train.core.errors import ConfigError


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that take a moment."""
    monkeypatch.setattr(sys, "executable", str(write_stubs(tmp_path / "bin")))
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("expression", "distribution"),
    [
        ("choice(4,8)", CategoricalDistribution(["4", "8"])),
        ("lora,dora-rows", CategoricalDistribution(["lora", '"dora-rows"'])),
        ("choice([a,1],true)", CategoricalDistribution(["[a,1]", "true"])),
        ("interval(0,1)", FloatDistribution(0, 1)),
        ("tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("int(interval(4,64))", IntDistribution(4, 64)),
        ("tag(log,int(interval(4,64)))", IntDistribution(4, 64, log=True)),
        ("range(4,17,4)", IntDistribution(4, 16, step=4)),
        ("range(4,16,4)", IntDistribution(4, 12, step=4)),
        ("range(0.5,2.0,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("range(0,1,0.1)", FloatDistribution(0, 0.9, step=0.1)),
        ("range(0,0.4,0.1)", FloatDistribution(0, 0.3, step=0.1)),
        ("range(0,10,2.5)", FloatDistribution(0, 7.5, step=2.5)),
    ],
)
def test_hydras_grammar_is_the_search_space(expression: str, distribution: Any) -> None:
    fixed, space = parse_space(["data=x", f"a.b={expression}"])
    assert fixed == ["data=x"] and space["a.b"].__class__ is distribution.__class__
    if isinstance(distribution, CategoricalDistribution):
        assert [text.strip('"') for text in space["a.b"].choices] == [text.strip('"') for text in distribution.choices]
    else:
        assert space == {"a.b": distribution}


@pytest.mark.parametrize(
    "overrides",
    [
        ["a=1"],
        ["a=1,2", "a=3"],
        ["a=tag(log,interval(0,1))"],
        ["a=tag(log,choice(1,2))"],
        ["a=tag(loud,interval(1,2))"],
        ["a=glob(*)"],
        ["a=interval(2,1)"],
        ["+a=1,2"],
        ["a=1,2", "run_dir=x"],
        ["a=1,2", "hydra.run.dir=x"],
        ["a=1,2", "recipe=sweep"],
        ["a=choice("],
    ],
)
def test_what_cannot_be_searched_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_space(overrides)


def test_points_of_a_finite_space_are_listed(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("adapter.rank: choice(4,8)\nloss.shift: range(0.5,2.0,0.5)\n")
    space = parse_space(read_space(tmp_path / "space.yaml"))[1]
    points = [format_point(point) for point in iterate_points(space) or ()]
    assert len(points) == 6 and ["adapter.rank=4", "loss.shift=1.5"] in points
    assert iterate_points(parse_space(["a=interval(0,1)"])[1]) is None
    tenths = parse_space(["a=range(0,0.4,0.1)"])[1]
    assert [point["a"] for point in iterate_points(tenths) or ()] == [0.0, 0.1, 0.2, 0.3]
    assert all(tenths["a"]._contains(point["a"]) for point in iterate_points(tenths) or ())


def test_every_point_is_trained_once_and_the_best_is_named(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sw", "adapter.rank=choice(4,8)", "--trials", "10", "optimizer.lr=choice(1e-3,1e-2)", "--json"]
    assert sweep.main(command) == 0
    found, said = capsys.readouterr()
    result = json.loads(found)
    starts = Path("sw/starts.log").read_text().splitlines()
    assert len(starts) == len(set(starts)) == 4 and "Every point" in said
    assert [row["ended"] for row in result["trials"]].count("failed") == 0
    assert result["trials"][0]["adapter.rank"] == "4" and result["trials"][0]["optimizer.lr"] == "0.001"
    assert result["best"]["adapter"] == f"{Path('sw').absolute() / result['trials'][0]['run']}@8"
    assert sweep.main(["sw"]) == 0, "the settings are known"
    assert len(Path("sw/starts.log").read_text().splitlines()) == 4
    assert sweep.main(["two", "adapter.rank=choice(4,8,16)", "--trials", "2"]) == sweep.main(["two"]) == 0
    assert len(Path("two/starts.log").read_text().splitlines()) == 2, "the number of trials is known"
    assert sweep.main(["sw", "adapter.rank=choice(4,16)"]) == 1
    assert sweep.main(["new", "adapter.rank=4,8", "--trials", "0"]) == 1 and not Path("new").exists()
    assert "other settings" in capsys.readouterr().err


def test_runs_that_do_not_validate_are_ranked_too(stubs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sw", "adapter.rank=choice(4,8)", "callbacks.validation.enabled=false", "--json"]
    assert sweep.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["adapter.rank"], row["steps"]) for row in found["trials"]] == [("4", None), ("8", None)]
    assert found["best"]["change"] == pytest.approx(0.504 - 1)


def test_hopeless_runs_are_stopped_early(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stubs(stubs / "slow", pause=0.1)
    monkeypatch.setattr(sys, "executable", str(stubs / "slow" / "python"))
    monkeypatch.setattr(sweep, "STARTUP_TRIALS", 1)
    assert sweep.main(["sw", "optimizer.lr=choice(1e-3,1e-4,1e-5,1e-6)"]) == 0
    rows = sweep.Sweep(Path("sw").absolute(), [], 0, prunes=True).list_trials()
    early = [row for row in rows if row["ended"] == "stopped early"]
    assert early and all(row["steps"] < 8 for row in early) and rows[0]["optimizer.lr"] == "0.001"


def test_a_run_that_sa3_eval_did_not_measure_is_never_before_one_that_it_did(stubs: Path) -> None:
    found = sweep.Sweep(stubs, ["adapter.rank=choice(4,8)"], 0, prunes=True)
    for number, (state, changes) in enumerate((("PRUNED", {6: -0.5}), ("FAIL", {}), ("COMPLETE", {6: -0.1}))):
        found.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=changes.get(6),
                params={"adapter.rank": "4"},
                distributions=found.space,
                intermediate_values=changes,
                user_attrs={"run_dir": f"trial-{number:03d}"},
            )
        )
    assert [row["run"] for row in found.list_trials()] == ["trial-002", "trial-000", "trial-001"]


def test_a_setting_that_no_run_takes_ends_the_sweep_and_leaves_nothing(
    stubs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["sw", "adapter.rank=13,13.0"]) == 1
    assert "rank 13 is not for us" in capsys.readouterr().err
    assert sweep.main(["sw", "adapter.rank=4,13", "--trials", "2"]) in (0, 1)
    assert len(Path("sw/starts.log").read_text().splitlines()) >= 2, "another space may be tried in the same folder"


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["sweep", "both", "stopped"])
def test_a_sweep_that_is_killed_goes_on_where_it_was(
    tmp_path: Path, victims: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stubs, folder = write_stubs(tmp_path / "bin", pause=0.15), tmp_path / "sw"
    command = [str(folder), "adapter.rank=choice(4,8,16)", "--no-pruning"]
    child = start_command("sweep", stubs, *command)
    wait_for(lambda: (folder / "trial-001" / "validation.json").is_file())
    if victims == "stopped":
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 143
        wait_for(lambda: processes.get_running_pid(folder / "trial-001") is None)
    else:
        child.kill()
        child.wait()
    if victims == "both":
        os.kill(processes.read_record(folder / "trial-001")["pid"], signal.SIGKILL)
    assert start_command("sweep", stubs, str(folder)).wait(60) == 0
    starts = (folder / "starts.log").read_text().splitlines()
    fresh, resumed = ([line for line in starts if ("resume=" in line) is is_resume] for is_resume in (False, True))
    assert len(fresh) == len(set(fresh)) == 3, "no point is trained twice"
    assert len(resumed) == (0 if victims == "sweep" else 1), "what was killed goes on, and what was not is waited for"
    states = [row["ended"] for row in sweep.Sweep(folder, [], 0, prunes=False).list_trials()]
    assert states == ["finished"] * 3


def wait_for(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)
