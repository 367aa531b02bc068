"""What a wheel holds: every package, the Hydra tree, the assets, the commands."""

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
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_every_module_and_setting_of_the_tree_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    packed = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sa3train").rglob("*.py")}
    assert modules <= packed
    assert "sa3train/py.typed" in packed
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sa3train/studio").rglob("*.[cj]s*")}
    assert "sa3train/studio/assets/studio.css" in page
    assert page <= packed
    settings = {
        f"sa3train/conf/{path.relative_to(ROOT / 'conf').as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")
    }
    assert settings
    assert settings <= packed


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
