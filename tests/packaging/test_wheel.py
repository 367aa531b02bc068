"""What a wheel contains: all packages, the Hydra configuration, the assets, the commands."""

import configparser
import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = PROJECT["project"]["scripts"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, so that building leaves nothing in the working tree
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines()
    assert names, listed.stderr
    for name in names:
        if (
            name.split("/")[0] in {"sa3train", "conf", "pyproject.toml", "README.md", "LICENSE"}
            and (ROOT / name).is_file()
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    flags = ["-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(source)], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_every_file_of_the_package_and_its_configuration_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sa3train").rglob("*.*") if path.is_file()}
    configuration = {f"sa3train/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected = {name for name in files | configuration if "__pycache__" not in name}
    assert {"sa3train/py.typed", "sa3train/studio/assets/studio.css", "sa3train/conf/train.yaml"} <= expected
    assert expected - set(wheel.namelist()) == set()


def test_nothing_else_becomes_importable(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sa3train"}


def test_the_wheel_declares_the_commands(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    declared = configparser.ConfigParser()
    declared.optionxform = str  # type: ignore[assignment]
    declared.read_string(wheel.read(name).decode())
    assert dict(declared["console_scripts"]) == SCRIPTS


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_has_a_main_that_loads_nothing_heavy(command: str) -> None:
    module, function = SCRIPTS[command].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    probe = (
        f"import sys, {module}; print([m for m in ('torch', 'lightning', 'transformers', 'wandb') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"importing {module} loads {loaded}"


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_helps(command: str) -> None:
    shown = subprocess.run([Path(sys.executable).parent / command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert command in shown.stdout


def test_no_folder_of_the_outline_is_a_package() -> None:
    for folder in ("datasets", "recipes", "inference", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_a_script_beside_the_clone_finds_the_package(tmp_path: Path) -> None:
    (tmp_path / "sa3train").mkdir()
    (tmp_path / "script.py").write_text("import sa3train.conf; from sa3train import Generator")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"run launch/setup.sh again: {done.stderr}"
