"""What a user names counts: it replaces the other half of a pair, and what a recipe demands must be given."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import save_adapter
from sa3train.adapters.spec import AdapterSpec
from sa3train.cli.train import main
from sa3train.core.errors import ConflictError

OWN = "# @package _global_\n# Mine.\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No launcher around, and a folder of options of one's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SA3TRAIN_RUN_STAMP"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    return tmp_path


def compose(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, settings and errors of the command that shows its settings, as the studio calls it."""
    code = main([*arguments, "data=d", "run_dir=r", "--cfg", "job", "--resolve"])
    shown = capsys.readouterr()
    return code, yaml.safe_load(shown.out) or {}, shown.err


def save_start(**spec: Any) -> str:
    """Save an adapter, and return the option that starts from it."""
    adapter = Adapter(AdapterSpec("lora", **spec), {"layer": {"lora_A": torch.ones(3, 4), "lora_B": torch.ones(4, 3)}})
    save_adapter(Path("mine.safetensors"), adapter)
    return "adapter.start_from=mine.safetensors"


def get(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize(
    ("arguments", "replaced"),
    [
        (["data.crop_frames=64"], {"data.crop_seconds": None, "data.crop_frames": 64}),
        (["data.pack_frames=64"], {"data.silence_tail_seconds": 0.0, "loss.silence_seconds": 0.0}),
        (["recipe=sfx", "loss.silence_seconds=2"], {"data.pack_frames": None}),
        (["recipe=sfx", "data.silence_tail_seconds=2"], {"data.pack_frames": None}),
        (["recipe=sweep", "callbacks.validation.enabled=false"], {"callbacks.validation.select_best": False}),
        (["recipe=sweep", "callbacks=none"], {"callbacks.validation.select_best": False}),
        (["recipe=instrument", "optimizer=schedule-free"], {"trainer.ema_decay": None, "optimizer.lr": 5e-4}),
        (["recipe=post-trained", "loss.timesteps=uniform"], {"loss.sampler_steps": None}),
        (["optimizer=schedule-free"], {"trainer.ema_decay": None}),  # the style recipe's
        (["loss.timesteps=levels", "loss.sampler_steps=4"], {"loss.shift": "none"}),
    ],
)
def test_what_is_named_replaces_the_other_half_of_a_pair(
    capsys: pytest.CaptureFixture[str], arguments: list[str], replaced: dict[str, Any]
) -> None:
    code, settings, said = compose(capsys, *arguments)
    assert code == 0, said
    assert {key: get(settings, key) for key in replaced} == replaced
    assert re.search(rf"gives way to .*: using {next(iter(replaced.values()))}", said)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["data.crop_frames=64", "data.crop_seconds=3"], ("crop_frames=64", "crop_seconds=3.0")),
        (["optimizer=schedule-free", "trainer.ema_decay=0.9"], ("trainer.ema_decay",)),
        (["loss.sampler_steps=4"], ("loss.sampler_steps",)),
        (["recipe=continue"], ("recipe=continue", "adapter.start_from")),
        (["recipe=continue", "adapter.start_from=null"], ("adapter.start_from",)),
        (["recipe=continue", "adapter.start_from="], ("adapter.start_from",)),
    ],
)
def test_what_is_named_twice_or_not_at_all_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], names: tuple[str, ...]
) -> None:
    code, _, said = compose(capsys, *arguments)
    assert code == 1 and said.startswith("error: ") and all(name in said for name in names), said


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["model=nano-base", "recipe=instrument"], "optimizer.lr", 1e-3),
        (["model.name=nano", "recipe=post-trained", "optimizer=adamw"], "optimizer.lr", 5e-4),
        (["model=nano-base", "recipe=low-memory"], "optimizer.lr", 1e-3),
        (["model=nano-base", "optimizer=lion"], "optimizer.lr", 3e-5),
        (["model=nano-base", "recipe=prodigal", "--config-dir", "own"], "optimizer.lr", 1.0),
        (["model=nano-base", "recipe=bold", "--config-dir", "own"], "optimizer.lr", 2e-3),
        (["model=nano-base", "recipe=shy", "--config-dir", "own"], "optimizer.lr", 3e-4),
        (["model=nano-base", "optimizer.lr=2e-4"], "optimizer.lr", 2e-4),
        (["model=small-sfx-base", "recipe=sfx"], "optimizer.lr", 1e-4),
        ([], "scheduler.warmup_steps", 100),
        (["trainer.max_steps=300"], "scheduler.warmup_steps", 15),
        (["trainer.max_steps=9"], "scheduler.warmup_steps", 0),
        (["trainer.max_steps=300", "scheduler.warmup_steps=100"], "scheduler.warmup_steps", 100),
    ],
)
def test_rate_and_warm_up_suit_the_run_unless_one_is_named(
    arguments: list[str], key: str, value: float, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = place / "own" / "recipe"
    (recipe / "prodigal.yaml").write_text(f"{OWN}defaults: [override /optimizer: prodigy]\n")
    for name, rate in (("bold", 2e-3), ("shy", 3e-5)):
        (recipe / f"{name}.yaml").write_text(f"{OWN}optimizer:\n  lr: {rate:.5f}\n")
    assert get(compose(capsys, *arguments)[1], key) == value


def test_a_recipe_of_ones_own_is_no_different(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = place / "own" / "recipe"
    (recipe / "mine.yaml").write_text(f"{OWN}data:\n  pack_frames: 64\nadapter:\n  alpha: ???\n")
    (recipe / "from_mine.yaml").write_text(f"{OWN}defaults: [mine, _self_]\nadapter:\n  alpha: 3.0\n")
    own = ("--config-dir", str(place / "own"))
    code, _, said = compose(capsys, *own, "recipe=mine")
    assert code == 1 and "recipe=mine needs adapter.alpha" in said
    code, settings, _ = compose(capsys, *own, "recipe=mine", "adapter.alpha=2")
    assert code == 0 and settings["data"]["silence_tail_seconds"] == 0.0
    code, settings, _ = compose(capsys, *own, "recipe=from_mine", "data.silence_tail_seconds=1")
    assert code == 0 and settings["data"]["pack_frames"] is None and settings["adapter"]["alpha"] == 3.0


def test_a_configuration_of_ones_own_counts_more_than_the_recipe(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "own" / "my.yaml").write_text("defaults: [train, _self_]\ndata:\n  crop_frames: 64\n")
    code, settings, said = compose(capsys, "--config-dir", str(place / "own"), "--config-name", "my")
    assert code == 0, said
    assert settings["data"]["crop_seconds"] is None and settings["data"]["crop_frames"] == 64


def test_a_conflict_survives_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ConflictError("a and b", {"a": None, "b": ...})))
    assert str(error) == "a and b" and error.off == {"a": None, "b": ...}


def test_type_rank_and_layers_are_those_of_the_adapter_that_training_starts_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = save_start(rank=3, alpha=6.0, include=("layer",))
    code, settings, said = compose(capsys, "recipe=continue", start)
    assert code == 0, said
    found = {key: settings["adapter"][key] for key in ("adapter_type", "rank", "alpha", "include")}
    assert found == {"adapter_type": "lora", "rank": 3, "alpha": 6.0, "include": ["layer"]}
    assert "using adapter.rank=3, which suits this run, in place of 16" in said

    code, settings, said = compose(capsys, "recipe=continue", start, "adapter=dora-rows", "adapter.rank=4")
    assert code == 0, said
    assert (settings["adapter"]["adapter_type"], settings["adapter"]["rank"]) == ("dora-rows", 4), "named ones count"


def test_an_alpha_that_is_the_rank_is_left_to_follow_it(capsys: pytest.CaptureFixture[str]) -> None:
    start = save_start(rank=3)
    assert compose(capsys, "recipe=continue", start)[1]["adapter"]["alpha"] is None
