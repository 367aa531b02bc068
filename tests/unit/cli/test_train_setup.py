"""A setting given on the command line that can change nothing is refused; one that rarely makes sense is named."""

import dataclasses
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from helpers.shards import make_data_module, make_store
from sa3train.cli import train_setup
from sa3train.cli.hydra_app import register_resolvers
from sa3train.cli.train_config import DecoderTrainConfig, TrainConfig
from sa3train.cli.train_setup import (
    check_overrides_have_effect,
    check_resume,
    describe_training_data,
    start_ranks,
)
from sa3train.core.config import build, list_keys
from sa3train.core.errors import ConfigError, ConflictError, SA3Error
from sa3train.training.optim import GROUP_SETTINGS, make_optimizer
from sa3train.training.run_dir import FIXED_SETTINGS
from sa3train.training.settings import OptimizerSettings


def configure(*overrides: str, job: str = "train") -> Any:
    """Build the configuration that `sa3-train OVERRIDES` gives, on latents or on audio."""
    needed, schema = {"train": ("data.dir=latents", TrainConfig), "decoder": ("source=audio", DecoderTrainConfig)}[job]
    register_resolvers()
    with pytest.MonkeyPatch.context() as patch, initialize_config_module("sa3train.conf", version_base="1.3"):
        patch.setenv("SA3TRAIN_RUN_STAMP", "stamp")
        values: Any = OmegaConf.to_container(
            compose(job, [needed, "scheduler.warmup_steps=0", *overrides]), resolve=True
        )
    return build(schema, values)


@pytest.mark.parametrize(
    "overrides",
    [
        ("callbacks.validation.patience=8",),
        ("trainer.max_steps=100", "callbacks.checkpoint.keep_last=3"),
        ("callbacks.validation.enabled=false", "callbacks.demos.enabled=false", "data.heldout_clips=3"),
        ("++loss.inpainting.segments=0", "++loss.inpainting.continuation=0", "loss.context_weight=2"),
        ("callbacks.demos.enabled=false", "callbacks.demos.seed=3"),
        ("callbacks.validation.enabled=false", "callbacks.validation.seed=3"),
        ("data.weight=2",),
        ("loss.silence_seconds=0", "data.silence_tail_seconds=3"),
    ],
)
def test_the_last_override_has_no_effect_and_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{overrides[-1].partition('=')[0]} has no effect"):
        check_overrides_have_effect(configure(*overrides), overrides, ranks=1)


@pytest.mark.parametrize("key", ["name", "paths.runs", "run_dir"])
def test_where_a_resumed_run_lies_is_not_set(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} has no effect with resume=out"):
        check_resume(configure("resume=out"), [f"{key}=other"])


def test_a_setting_that_may_change_on_resume_is_read_at_every_start() -> None:
    """Of what a checkpoint holds, only the groups of the optimizer hold settings, and those are set again."""
    fixed = [f"{key}." for keys in FIXED_SETTINGS.values() for key in keys]
    keys = {*list_keys(TrainConfig), *list_keys(DecoderTrainConfig)}
    for section, free in (
        ("optimizer", {*GROUP_SETTINGS}),
        ("adapter", {"alpha", "alpha_pattern", "dropout", "rslora"}),
    ):
        own = {key for key in keys if key.startswith(f"{section}.") and not f"{key}.".startswith(tuple(fixed))}
        assert own == {f"{section}.{name}" for name in free}
    assert all(any(f"{key}.".startswith(name) for key in keys) for name in fixed), "none is misspelled"


def test_demos_of_the_decoder_use_the_round_trips_of_validation() -> None:
    overrides = ["callbacks.validation.enabled=false", "callbacks.validation.round_trips=2"]
    check_overrides_have_effect(configure(*overrides, job="decoder"), overrides, ranks=1)
    overrides.insert(0, "callbacks.demos.enabled=false")
    with pytest.raises(ConfigError, match=r"validation\.round_trips has no effect"):
        check_overrides_have_effect(configure(*overrides, job="decoder"), overrides, ranks=1)


@pytest.mark.parametrize(
    "overrides",
    [("data.verify=none", "data.allow_damaged=true"), ("data.prompts.separator=';'",),
     ("data.crop_seconds=null", "data.crop=start"),
     ("loss.huber_delta=2",), ("adapter.options.x=1",),
     ("logger.project=x",), ("data.prompts.trigger_probability=0.5",), ("data.prompts.keep_tags=2",)],
)  # fmt: skip
def test_settings_without_effect_are_refused_when_they_are_built(overrides: tuple[str, ...]) -> None:
    with pytest.raises(SA3Error, match=r"no effect|has none"):
        configure(*(f"++{override}" if ".options." in override else override for override in overrides))


@pytest.mark.parametrize("name", ["validation", "demos"])
def test_an_interval_beyond_the_run_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ("trainer.max_steps=100", f"callbacks.{name}.every=101")
    with caplog.at_level(logging.WARNING):
        check_overrides_have_effect(configure(*overrides), overrides, ranks=1)
    assert f"callbacks.{name}.every=101" in caplog.text
    caplog.clear()
    check_overrides_have_effect(configure(overrides[0]), overrides[:1], ranks=1)
    assert not caplog.text, "defaults and recipes are not the user's words"


@pytest.mark.parametrize("job", ["train", "decoder"])
def test_a_warm_up_longer_than_the_run_is_refused(job: str) -> None:
    configure("trainer.max_steps=101", "scheduler.warmup_steps=100", job=job)
    with pytest.raises(ConflictError, match="scheduler.warmup_steps=100"):
        configure("trainer.max_steps=100", "scheduler.warmup_steps=100", job=job)


@pytest.mark.parametrize(
    "options", [{"eps": -1}, {"eps": "abc"}, {"foreach": "maybe"}, {"amsgrad": 1}, {"fused": True, "foreach": True}]
)
def test_what_an_optimizer_refuses_is_named(options: dict[str, Any]) -> None:
    parameters = [("layer.lora_B", torch.nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ConfigError, match=r"optimizer\.options"):
        make_optimizer(OptimizerSettings(options=options), parameters)


def test_more_threads_than_cores_are_lowered_with_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", seen.append)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    config = configure("trainer.accelerator=cpu", "trainer.devices=1")
    for threads in (3, 1000):
        trainer = dataclasses.replace(config.trainer, threads=threads)
        with caplog.at_level(logging.WARNING):
            start_ranks(dataclasses.replace(config, trainer=trainer))
    assert seen == [3, 4] and "trainer.threads=1000" in caplog.text and "trainer.threads=3" not in caplog.text


def test_more_devices_than_there_are_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("a launcher was started"))
    with pytest.raises(ConfigError, match=r"trainer\.devices=1000"):
        start_ranks(configure("trainer.accelerator=cpu", "trainer.devices=1000"))


@pytest.mark.parametrize(("prompts", "keys"), [(2, {"data_summary", "prompts"}), (0, {"data_summary"})])
def test_prompts_travel_with_an_adapter_unless_they_are_private(prompts: int, keys: set[str], tmp_path: Path) -> None:
    data = make_data_module(str(make_store(tmp_path / "a", [5] * 4, heldout=1)))
    found = describe_training_data(data, prompts)
    assert found.keys() == keys
    assert found["data_summary"] == "3 clips, 1 s; held out: 1 clip, 0 s"


def test_a_warned_slurm_job_is_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(train_setup.subprocess, "run", lambda command, **_: asked.append(command))
    train_setup.requeue(signal.SIGUSR1)
    assert asked == [], "no job"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    train_setup.requeue(signal.SIGTERM)
    assert asked == [], "SLURM itself queues what it preempts"
    train_setup.requeue(signal.SIGUSR1)
    assert asked == [["scontrol", "requeue", "77"]]
