"""Every sa3-* command shown in a document is one that the program understands."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from helpers.documents import DOCUMENTS, ROOT

HYDRA_JOBS = {"sa3-encode": "sa3train.cli.encode", "sa3-train": "sa3train.cli.train"}
FLAG_JOBS = {
    name: f"sa3train.cli.{module}"
    for name, module in {
        "sa3-generate": "generate",
        "sa3-data": "data",
        "sa3-adapter": "adapter",
        "sa3-bench": "bench",
        "sa3-eval": "eval",
        "sa3-export": "export",
        "sa3-quickstart": "quickstart",
        "sa3-runs": "runs",
        "sa3-sweep": "sweep",
        "sa3-mcp": "mcp",
        "sa3-studio": "studio",
    }.items()
}


def commands_of(document: Path) -> list[list[str]]:
    """The sa3-* commands in the bash blocks of a document, comments and continuation lines resolved."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if "sa3-" in line]
    return [words[index:] for words in split for index, word in enumerate(words[:1]) if word.startswith("sa3-")]


def write_files(document: Path, folder: Path) -> None:
    """Write the YAML files that a document shows, each with its path in a comment."""
    for block in re.findall(r"```yaml\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        for name in re.findall(r"^# (\S+\.yaml)$", block, re.MULTILINE):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(block, encoding="utf-8")


COMMANDS = [(document.relative_to(ROOT).as_posix(), words) for document in DOCUMENTS for words in commands_of(document)]


@pytest.mark.parametrize("module", FLAG_JOBS.values())
def test_every_flag_has_a_help_text(module: str) -> None:
    parsers = [importlib.import_module(module).build_parser()]
    for parser in parsers:
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), f"{parser.prog} {action.dest}"
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []


def test_the_readme_shows_commands() -> None:
    shown = {words[0] for document, words in COMMANDS if document == "README.md"}
    assert {"sa3-data", "sa3-encode", "sa3-train", "sa3-generate"} <= shown


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{document}: {' '.join(words)}" for document, words in COMMANDS]
)
def test_the_command_is_understood(
    document: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = words
    if "--config-dir" in arguments:
        write_files(ROOT / document, tmp_path)
        monkeypatch.chdir(tmp_path)
    if name in HYDRA_JOBS:
        arguments = [argument for argument in arguments if not argument.startswith("resume=")]
        if "-m" in arguments:  # a sweep: its first run
            arguments = [argument.split(",")[0] for argument in arguments if argument != "-m"]
        module = importlib.import_module(HYDRA_JOBS[name])
        code = module.main([*arguments, "--cfg", "job"])
        assert code == 0, f"{document}: {' '.join(words)}\n{capsys.readouterr().err}"
    else:
        parser: argparse.ArgumentParser = importlib.import_module(FLAG_JOBS[name]).build_parser()
        parser.exit_on_error = False
        parser.parse_args(arguments)  # leaves with SystemExit, which fails the test, when a flag is unknown


def test_an_own_recipe_has_what_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(ROOT / "recipes" / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(HYDRA_JOBS["sa3-train"])
    assert module.main(["--config-dir", "my-conf", "recipe=pads", "data=latents", "--cfg", "job"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["name"], settings["adapter"]["rank"], settings["data"]["crop_seconds"]) == ("pads", 32, 20.0)
    assert settings["callbacks"]["demos"]["duration"] == 20.0, "of style"
