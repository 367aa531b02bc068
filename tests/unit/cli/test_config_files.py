"""Configuration files of the user's own count as they are written, or are refused by name."""

import json
from pathlib import Path

import pytest

from sa3train.cli.config_files import adapt_options, check_config_dir, find_flag, read_config
from sa3train.cli.train import main
from sa3train.core.errors import ConfigError

OWN = b"# @package _global_\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of the user's own, in a folder to give with --config-dir."""
    path = tmp_path / "recipe" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes(OWN + b"seed: 1\n")
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"trainer:\n  max_steps: 010\n", "line 3: YAML reads 010"),
        (b"seed: -07\n", "-07"),
        (b"data: {crop_seconds: 1:30}\n", "1:30"),
        (b"data: {crop_seconds: 1:30.5}\n", "1:30.5"),
        (b"a: 1\na: 2\n", "duplicate key"),
        (b"trainer:\n\tmax_steps: 1\n", "line 3"),
        (b"name: !!python/name:os.system\n", "constructor"),
        (b"name: caf\xe9\n", "UTF-8"),
        (b"- seed\n", "by name"),
    ],
)
def test_what_yaml_misreads_or_cannot_read_is_refused(recipe: Path, content: bytes, said: str) -> None:
    recipe.write_bytes(OWN + content)
    with pytest.raises(ConfigError, match="mine.yaml") as refused:
        read_config(recipe)
    assert said in str(refused.value)


def test_numbers_and_texts_that_look_alike_are_taken(recipe: Path) -> None:
    recipe.write_bytes(OWN + b"name: '010'\ndata: {a: 0, b: 10, c: 0.5, d: 1e-4, e: 1_000, f: \"1:30\", g: -0.0}\n")
    body, package = read_config(recipe)
    assert package == "_global_" and body["name"] == "010"
    assert list(body["data"].values()) == [0, 10, 0.5, 1e-4, 1000, "1:30", -0.0]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf" + OWN, b"# mine\n" + OWN])
def test_a_recipe_whose_package_hydra_does_not_see_is_refused(recipe: Path, start: bytes) -> None:
    recipe.write_bytes(start + b"seed: 1\n")
    with pytest.raises(ConfigError, match="mine.yaml"):
        check_config_dir(recipe.parents[1], ["recipe=mine"])


def test_only_chosen_files_and_those_they_are_made_from_are_read(recipe: Path) -> None:
    (recipe.parent / "broken.yaml").write_bytes(b"{")
    check_config_dir(recipe.parents[1], ["recipe=mine", "name=" + "x" * 5000])
    recipe.write_bytes(OWN + b"defaults: [mine, broken]\n")
    with pytest.raises(ConfigError, match="broken.yaml"):
        check_config_dir(recipe.parents[1], ["recipe=mine"])


def test_a_file_that_sa3train_has_too_has_no_effect_and_is_refused(recipe: Path) -> None:
    recipe.rename(recipe.with_name("style.yaml"))
    with pytest.raises(ConfigError, match="style.yaml has no effect"):
        check_config_dir(recipe.parents[1], [])


def test_a_primary_configuration_says_what_it_changes(recipe: Path) -> None:
    (recipe.parents[1] / "own.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="defaults:"):
        check_config_dir(recipe.parents[1], ["--config-name", "own"])


def test_flags_are_found_in_both_spellings() -> None:
    assert find_flag(["-cd", "a", "x=1"], "--config-dir", "-cd") == "a"
    assert find_flag(["--config-dir=b"], "--config-dir", "-cd") == "b"
    assert find_flag(["x=1"], "--config-dir", "-cd") is None


def test_options_named_like_numbers_are_names_and_a_resumed_run_has_none() -> None:
    given = ["recipe=5", "recipe=inf", "recipe=style", "recipe=null", "seed=5", "recipe=a,b"]
    assert adapt_options(given) == ['recipe="5"', 'recipe="inf"', *given[2:]]
    assert adapt_options(["model=nano"], {"model": "model.name"}, is_resumed=True) == ["model.name=nano"]
    with pytest.raises(ConfigError, match="optimizer=adamw cannot be chosen"):
        adapt_options(["optimizer=adamw"], is_resumed=True)


def test_of_a_folder_that_holds_runs_the_newest_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for day, name in enumerate(("oldest", "late", "deep/later", "newest"), start=1):
        run_dir = Path("runs", name)
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text("name: a\n")
        record = {"format": 1, "started": f"2026-11-0{day}T12:00:00+00:00", "identity": {}}
        (run_dir / "run.json").write_text(json.dumps(record))
    assert main(["resume=runs"]) == 1
    named = "It holds runs: resume=runs/newest, resume=runs/deep/later, resume=runs/late and 1 more.\n"
    assert named in capsys.readouterr().err
