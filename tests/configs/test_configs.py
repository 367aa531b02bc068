"""Every YAML that is shipped composes, says what the code says, and every recipe trains."""

import dataclasses
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from helpers.base_yaml import list_groups, render_decoder, render_group
from helpers.training import make_shards
from sa3train.adapters.spec import KINDS, PEFT_METHODS
from sa3train.cli.encode import EncodeConfig
from sa3train.cli.hydra_app import register_resolvers
from sa3train.cli.train import main
from sa3train.cli.train_config import DecoderTrainConfig, TrainConfig
from sa3train.core.config import build, list_settings
from sa3train.core.errors import ConfigError
from sa3train.core.files import get_config_dir
from sa3train.models.checkpoint import load_checkpoint
from sa3train.models.hub import REGISTRY
from sa3train.training.optim import OPTIMIZERS
from sa3train.training.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]
CONF = get_config_dir()
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name not in ("recipe", "hydra")
)
NEEDED = ("data.dir=somewhere", "adapter.start_from=some.safetensors")


@pytest.fixture(autouse=True)
def composing(monkeypatch: pytest.MonkeyPatch) -> None:
    register_resolvers()
    monkeypatch.setenv("SA3TRAIN_RUN_STAMP", "stamp")


def composed(*overrides: str, job: str = "train", needed: tuple[str, ...] = NEEDED) -> dict[str, Any]:
    with initialize_config_module("sa3train.conf", version_base="1.3"):
        config = compose(job, [*needed, *overrides])
        if "launcher=slurm" in overrides:
            config.trainer.devices, config.trainer.num_nodes = 2, 2  # known once a job is launched
        values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_into_known_keys(option: str) -> None:
    own_average = ("trainer.ema_decay=null",) if option == "optimizer=schedule-free" else ()  # gives way by itself
    config = build(TrainConfig, composed(option, *own_average))
    assert config.run_dir == "runs/style-stamp"


@pytest.mark.parametrize("model", sorted(name for name, entry in REGISTRY.items() if entry.kind == "model"))
def test_encoding_composes_with_every_model(model: str) -> None:
    config = build(EncodeConfig, composed(f"model={model}", job="encode", needed=("source=audio", "out=latents")))
    assert config.model.name == model


def test_the_variants_of_objectives_compose() -> None:
    objectives = runpy.run_path(str(ROOT / "recipes" / "objectives.py"))
    for variant, overrides in objectives["VARIANTS"].items():
        assert build(TrainConfig, composed(*objectives["COMMON"], *overrides)), variant


def test_objectives_compares_clip_by_clip(capsys: pytest.CaptureFixture[str]) -> None:
    objectives = runpy.run_path(str(ROOT / "recipes" / "objectives.py"))

    def make_trial(*losses: list[float]) -> dict[str, Any]:
        by_step = {str(50 * number): each for number, each in enumerate(losses)}  # as JSON has it
        return {"base": losses[0], "losses": by_step, "processor_seconds": 1.0}

    first = make_trial([1.0, 100.0], [0.9, 90.0], [0.81, 81.0])
    quick = make_trial([1.0, 100.0], [0.729, 90.0], [0.729, 72.9])
    trials = {("first", 0): first, ("quick", 0): quick}
    objectives["print_table"]("set", ["first", "quick"], trials)
    lines = capsys.readouterr().out.splitlines()
    assert "-19.0%  against first: +0.00%, its loss after 100 steps" in lines[0]
    assert "-27.1%  against first: -10.00%, its loss after 50 steps" in lines[1]
    find_step = objectives["find_step"]
    assert find_step(first, [0.9**1.5, 100 * 0.9**1.5]) == "75" and find_step(first, [0.7, 70.0]) == "more than 100"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_is_named_after_itself(recipe: str) -> None:
    if recipe == "decoder":
        config: Any = build(DecoderTrainConfig, composed(job="decoder", needed=("source=audio",)))
    else:
        config = build(TrainConfig, composed(f"recipe={recipe}"))
    assert config.name == recipe


def test_every_yaml_is_reached_by_these_tests() -> None:
    reached = {f"{group}/{name}.yaml" for group, _, name in (option.partition("=") for option in OPTIONS)}
    reached |= {f"recipe/{name}.yaml" for name in RECIPES} | {"train.yaml", "encode.yaml", "decoder.yaml"}
    assert {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} == reached


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_card_that_says_what_a_user_asks(recipe: str) -> None:
    card = (ROOT / "recipes" / f"{recipe}.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {recipe}")
    for heading in ("Goal", "Data", "Memory", "Cost", "Command", "Measured on nano"):
        assert re.search(rf"^## {heading}", card, re.MULTILINE), f"{recipe} lacks {heading}"
    assert f"recipe={recipe}" in card
    assert f"]({recipe}.md)" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_every_card_has_a_recipe() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes").glob("*.md") if path.stem != "README") == RECIPES


@pytest.mark.parametrize("group", sorted(list_groups()))
def test_the_base_yaml_of_a_group_is_its_dataclass(group: str) -> None:
    """A library user and a command-line user get the same run; each setting is declared once."""
    schema = list_groups()[group]
    assert (CONF / group / "base.yaml").read_text(encoding="utf-8") == render_group(group, schema), (
        "python tests/helpers/base_yaml.py writes it anew from the dataclass"
    )
    declared = {field.name for field in dataclasses.fields(schema)}
    assert list_settings(schema).keys() == declared, "every setting has a help text"


def test_the_sections_of_the_decoder_s_yaml_are_their_dataclasses() -> None:
    assert render_decoder() in (CONF / "decoder.yaml").read_text(encoding="utf-8"), "python tests/helpers/base_yaml.py"


def test_variants_say_only_what_differs_from_their_base() -> None:
    for group in list_groups():
        base = yaml.safe_load((CONF / group / "base.yaml").read_text(encoding="utf-8"))
        for path in sorted((CONF / group).glob("*.yaml")):
            variant = yaml.safe_load(path.read_text(encoding="utf-8"))
            if path.stem != "base":
                assert variant.pop("defaults") == ["base", "_self_"], f"{path} does not start from its base"
                repeated = {key for key, value in variant.items() if base[key] == value}
                assert repeated <= {"name", "adapter_type"}, f"{path} repeats {repeated}"


def test_the_groups_offer_what_the_code_can_do() -> None:
    def names(group: str) -> set[str]:
        return {path.stem for path in (CONF / group).glob("*.yaml")} - {"base"}

    assert names("optimizer") == set(OPTIMIZERS) and names("scheduler") == set(SCHEDULES)
    assert set(KINDS) <= names("adapter") <= {*KINDS, *PEFT_METHODS}
    assert names("model") == {name for name, entry in REGISTRY.items() if entry.kind == "model"}
    for group, key in (("optimizer", "name"), ("scheduler", "name"), ("adapter", "adapter_type"), ("model", "name")):
        for name in names(group):
            assert yaml.safe_load((CONF / group / f"{name}.yaml").read_text())[key] == name


def test_every_value_is_explained_where_it_stands() -> None:
    for path in sorted(CONF.rglob("*.yaml")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert lines[0].startswith("#") or path.name == "train.yaml", f"{path.name} does not say what it is"


def test_unknown_keys_of_a_yaml_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\ntrainer: {max_step: 3}\nadaptr: {rank: 3}\n"
    )
    assert main(["--config-dir", str(tmp_path), "recipe=mine", "data=x"]) == 1
    error = capsys.readouterr().err
    assert "unknown setting 'trainer.max_step'. Did you mean trainer.max_steps?" in error
    assert "unknown setting 'adaptr'. Did you mean adapter?" in error
    with pytest.raises(ConfigError, match="'data.dir' must be given"):
        build(TrainConfig, composed("data.dir=???"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that nano's autoencoder could have made."""
    nano = load_checkpoint("nano-base", parts=("dit",))
    return make_shards(
        tmp_path_factory.mktemp("nano") / "latents", [9 + n for n in range(8)], heldout=2,
        channels=nano.latent_channels, fingerprint=nano.autoencoder_fingerprint(),
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name)
    return tmp_path


QUICK = ("trainer.max_steps=2", "trainer.threads=1", "data.num_workers=0", "scheduler.warmup_steps=0")
QUIET = ("callbacks.validation.clips=1", "callbacks.demos.enabled=false")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("continue", "sweep", "decoder")])
def test_every_recipe_trains_two_steps_on_nano(recipe: str, latents: Path, place: Path) -> None:
    model = "nano" if recipe == "post-trained" else "nano-base"
    arguments = [f"recipe={recipe}", f"data={latents}", f"model={model}", "run_dir=out", *QUICK, *QUIET]
    assert main(arguments) == 0
    assert (place / "out" / "adapter.safetensors").is_file()
    assert (place / "out" / "report.html").is_file()


@pytest.mark.slow
def test_the_recipe_continue_trains_two_steps_on_nano(latents: Path, place: Path) -> None:
    common = [f"data={latents}", "model=nano-base", *QUICK, *QUIET, "adapter.rank=2"]
    assert main([*common, "run_dir=first"]) == 0
    assert main([*common, "recipe=continue", "run_dir=out", "adapter.start_from=first/adapter.safetensors"]) == 0


@pytest.mark.slow
def test_the_recipe_sweep_trains_two_steps_on_nano(latents: Path, place: Path) -> None:
    values = ("adapter.rank=2,4", "optimizer.lr=1e-4")
    assert main(["recipe=sweep", f"data={latents}", "model=nano-base", *QUICK, *QUIET, *values]) == 0
    assert len(list(place.glob("runs/sweep-*/*/adapter.safetensors"))) == 2
