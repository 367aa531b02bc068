"""Commands end with one line and an exit code, and read their configuration the same way everywhere."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import sa3train
from sa3train.cli import hydra_app, train
from sa3train.cli.config_files import find_config_dir
from sa3train.cli.hydra_app import (
    check_overrides,
    expand_argument,
    get_run_stamp,
    run_hydra_job,
    run_job,
)
from sa3train.core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Clip:
    source: str
    rate: float
    title: str


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A primary configuration of our own, found as the installed one is."""
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "clip.yaml").write_text(
        "defaults:\n  - _self_\n  - override hydra/job_logging: none\n  - override hydra/hydra_logging: none\n"
        "source: ???\nrate: 0.1\ntitle: x-${stamp:}\n"
        "hydra: {run: {dir: .}, sweep: {dir: ., subdir: .}, output_subdir: null, job: {chdir: false}}\n"
    )
    monkeypatch.setattr(hydra_app, "CONF", str(folder))
    monkeypatch.chdir(tmp_path)
    for name in ("SA3TRAIN_RUN_STAMP", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def run(*arguments: str, seen: list[Clip] | None = None) -> int:
    def job(clip: Clip) -> int:
        if seen is not None:
            seen.append(clip)
        if clip.rate == 7:
            raise DataError("seven is not a rate")
        return 3 if clip.rate == 3 else 0

    def check(clip: Clip) -> None:
        if clip.rate < 0:
            raise ConfigError(f"rate={clip.rate} is below 0")

    values: dict[str, Any] = {"shorthand": {"src": "source"}, "paths": ("source",), "check": check}
    return run_hydra_job("clip", Clip, job, **values, argv=list(arguments))


def test_a_user_error_is_one_line_and_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise DataError("no such thing. Do this.")

    assert run_job(fail) == 1
    assert capsys.readouterr().err.strip() == "error: no such thing. Do this."
    assert run_job(lambda: None) == 0 and run_job(lambda: 5) == 5


def test_a_programming_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_job(lambda: 1 // 0)


def test_values_reach_the_job_and_its_code_is_returned(conf: Path) -> None:
    seen: list[Clip] = []
    assert run("source=a", "rate=3", seen=seen) == 3
    assert seen[0].source == "a" and seen[0].rate == 3.0 and seen[0].title.startswith("x-20")


PATHS = [
    "/a(b)c/x=y,z", "my dir/ü 'q' \"dq\" (1) [x]", "12", "C:\\x", "C:\\my clips\\", "true", " a, b ", "a\\\"b", "a\n#b"
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_taken_as_written(conf: Path, path: str) -> None:
    seen: list[Clip] = []
    assert run(f"src={path}", seen=seen) == 0
    assert seen[0].source == path


@pytest.mark.parametrize("path", [path for path in PATHS if "," not in path])
def test_a_sweep_over_something_else_keeps_paths_as_written(conf: Path, path: str) -> None:
    seen: list[Clip] = []
    assert run("-m", f"src={path}", "rate=1,2", seen=seen) == 0
    assert [(clip.source, clip.rate) for clip in seen] == [(path, 1.0), (path, 2.0)]


@pytest.mark.slow
def test_a_path_that_exists_is_a_path_and_others_may_be_a_sweep(conf: Path, tmp_path: Path) -> None:
    for name in ("a,b", "${oc.env:HOME}"):
        (tmp_path / name).mkdir()
    seen: list[Clip] = []
    assert run("-m", "src=a,b", "rate=1,2", seen=seen) == 0
    assert run("-m", "src=a,c", seen=seen) == 0
    assert run("src=a,c", seen=seen) == 0
    assert run("src=${oc.env:HOME}", seen=seen) == 0
    assert run("src=${oc.env:HOME}/x y", seen=seen) == 0
    assert run("src='${oc.env:HOME}'", seen=seen) == 0
    assert run("src=${title}/y", "title=t", seen=seen) == 0
    home = os.environ["HOME"]
    paths = ["a,b", "a,b", "a", "c", "a,c", "${oc.env:HOME}", f"{home}/x y", home, "t/y"]
    assert [clip.source for clip in seen] == paths


@given(st.text(st.sampled_from("ab\\\"'[](){}=:,$ \n#.~?*|é1eE+-"), min_size=1, max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_path_comes_back_as_written(path: str) -> None:
    once = expand_argument(f"data={path}", {"data": "data.dir"}, ())
    assert expand_argument(once, {"data": "data.dir"}, ()) == once
    if path[0] + path[-1] in ("''", '""') or "${" in path:
        return  # Hydra's, as `expand_argument` says
    config = OmegaConf.create({"data": {"dir": "???"}})
    OmegaConf.update(config, "data.dir", OverridesParser.create().parse_override(once).value())
    assert OmegaConf.to_container(config, resolve=True) == {"data": {"dir": path}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sourc=a"], "unknown setting 'sourc'. Did you mean source?"),
        (["+rates=2", "source=a"], "unknown setting 'rates'. Did you mean rate?"),
        ([], "'source' must be given"),
        (["source=a", "rate=quick"], "'rate' must be a number, but is 'quick'"),
        (["source=a", "rate=[1"], "no viable alternative"),
        (["source=my", "pack"], "'source=my pack'"),
        (["a"], "KEY=VALUE"),
        (["--src", "a"], "without dashes: src=VALUE"),
        (["--rate=1", "source=a"], "without dashes: rate=VALUE"),
        (["-m", "--cfg", "job", "--resolve", "source=a"], "leave out --multirun"),
        (["source=a", "rate=7"], "seven is not a rate"),
    ],
)
def test_what_is_wrong_is_said_in_one_place(
    conf: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error and "use +" not in error


def test_unknown_keys_in_a_yaml_are_refused(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (conf / "clip.yaml").write_text((conf / "clip.yaml").read_text() + "rrate: 3\n")
    assert run("source=a") == 1
    assert "unknown setting 'rrate'. Did you mean rate?" in capsys.readouterr().err


def test_a_sweep_goes_on_after_a_failure_and_names_each_job_that_failed(
    conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Clip] = []
    assert run("source=a", "-m", "rate=1,7,2,7", seen=seen) == 1, "a flag may stand anywhere"
    assert [clip.rate for clip in seen] == [1.0, 7.0, 2.0, 7.0]
    said = capsys.readouterr().err
    assert all(text in said for text in ("job 001: seven is not", "job 003: seven is not", "2 of 4 jobs"))


@pytest.mark.parametrize("rates", ["1,-2,-2", "1,x,x"])
def test_a_sweep_starts_no_job_while_any_has_a_wrong_setting(
    conf: Path, rates: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Clip] = []
    assert run("source=a", "-m", f"rate={rates}", seen=seen) == 1
    said = capsys.readouterr().err
    assert not seen and "2 of 3 jobs of the sweep cannot run" in said and said.count("rate") == 1


def test_resuming_takes_the_saved_configuration_with_overrides_on_top(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("source: saved\nrate: 0.5\ntitle: t\n")
    seen: list[Clip] = []

    def job(clip: Clip) -> None:
        seen.append(clip)

    arguments = [f"source={tmp_path / 'run'}", "rate=2"]
    assert run_hydra_job("clip", Clip, job, paths=("source",), resume="source", argv=arguments) == 0
    assert seen == [Clip(str(tmp_path / "run"), 2.0, "t")]
    odd = (tmp_path / "run").rename(tmp_path / 'my "run", ${x}\\')
    assert run_hydra_job("clip", Clip, job, paths=("source",), resume="source", argv=[f"source={odd}"]) == 0
    assert seen[1].source == str(odd)
    assert run_hydra_job("clip", Clip, job, resume="source", argv=[f"source={tmp_path}/none"]) == 1


def test_shorthand_selects_a_group_option_when_there_is_one(tmp_path: Path) -> None:
    shorthand = {"model": "model.name"}
    assert expand_argument("model=nano", shorthand, ()) == "model=nano"
    assert expand_argument("model=nano,medium", shorthand, ()) == "model=nano,medium"
    assert expand_argument("model=/my/model", shorthand, ()) == "model.name=/my/model"
    assert expand_argument("model.name=a,b", shorthand, ()) == 'model.name="a,b"'
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: x\n")
    assert (
        expand_argument("model=mine", shorthand, (), find_config_dir(["--config-dir", str(tmp_path)])) == "model=mine"
    )
    assert (
        expand_argument("--flag=1", shorthand, ()) == "--flag=1"
        and expand_argument("~model", shorthand, ()) == "~model"
    )


def test_groups_and_hydras_own_keys_are_left_to_hydra() -> None:
    check_overrides(Clip, ["adapter=lora", "hydra.mode=MULTIRUN", "hydra/launcher=x", "a/b=c", "--help", "-m"])
    with pytest.raises(ConfigError, match="'adapter.x'"):
        check_overrides(Clip, ["adapter.x=1"])


@pytest.mark.parametrize(
    ("environment", "stamp"),
    [
        ({"SA3TRAIN_RUN_STAMP": "mine"}, "mine"),
        ({"SLURM_JOB_ID": "12"}, "slurm-12"),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "slurm-12-3"),
        ({"TORCHELASTIC_RUN_ID": "abc", "WORLD_SIZE": "2"}, "abc"),
    ],
)
def test_every_rank_of_a_run_has_the_same_stamp(
    conf: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], stamp: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert get_run_stamp() == stamp


def test_ranks_with_nothing_in_common_are_refused(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="launch/torchrun.sh"):
        get_run_stamp()


def test_help_loads_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sa3train.cli.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trainer.max_steps=2000" in done.stdout
    for heavy in ("torch", "lightning", "transformers", "peft", "wandb"):
        assert not any(line.split("|")[-1].strip() == heavy for line in done.stderr.splitlines()), heavy


@pytest.mark.parametrize("name", ["adapter", "bench", "data", "encode", "generate", "quickstart", "studio", "train"])
def test_every_command_says_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # argparse
        assert importlib.import_module(f"sa3train.cli.{name}").main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"sa3train {sa3train.__version__} (Python ")


def test_quick_help_is_hydras_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text with far fewer copies of the sources, and Hydra is left as it was."""
    copies: list[int] = []
    once = ConfigLoaderImpl._process_config_searchpath

    def counted(self: ConfigLoaderImpl, *arguments: Any) -> None:
        copies.append(1)
        once(self, *arguments)

    monkeypatch.setattr(ConfigLoaderImpl, "_process_config_searchpath", counted)
    original = ConfigLoaderImpl._parse_overrides_and_create_caching_repo
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    quick, many = capsys.readouterr().out, len(copies)
    assert ConfigLoaderImpl._parse_overrides_and_create_caching_repo is original
    monkeypatch.setattr(hydra_app, "share_help_queries", contextlib.nullcontext)
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    assert "trainer.max_steps=2000" in quick and "sa3-train data=FOLDER --cfg job --resolve" in quick
    assert len(quick.splitlines()) < 45, "one screen"
    assert capsys.readouterr().out == quick
    assert many < (len(copies) - many) / 20


def openmp_settings(**environment: str) -> dict[str, str]:
    """What torch's OpenMP says it was set to, in a command of this package."""
    program = "from sa3train.cli.hydra_app import run_job; run_job(lambda: __import__('torch') and 0)"
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    told = {**keep, "OMP_DISPLAY_ENV": "verbose", **environment}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=told, check=True)
    return dict(re.findall(r"(\w+) = '(.*)'", done.stderr))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU OpenMP on Linux only")
def test_threads_do_not_spin_for_long_unless_the_user_says_so() -> None:
    assert openmp_settings()["GOMP_SPINCOUNT"] == hydra_app.MAX_SPINS
    assert openmp_settings(GOMP_SPINCOUNT="777")["GOMP_SPINCOUNT"] == "777"
    assert openmp_settings(OMP_WAIT_POLICY="PASSIVE")["GOMP_SPINCOUNT"] == "0"
    assert int(openmp_settings(OMP_WAIT_POLICY="ACTIVE")["GOMP_SPINCOUNT"]) > 10**6


@pytest.mark.parametrize(
    "module",
    ["cli.adapter", "cli.bench", "cli.compare", "cli.data", "cli.encode", "cli.generate", "cli.quickstart",
     "cli.studio", "cli.train", "training.run_dir"],
)  # fmt: skip
def test_no_command_imports_torch_before_it_is_set_up(module: str) -> None:
    program = f"import sys, sa3train.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
