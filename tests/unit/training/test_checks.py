"""Settings that cancel each other are refused before a run, rarely intended ones are named."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sa3train.core.errors import ConfigError
from sa3train.data.loading.prompts import PromptSettings
from sa3train.data.loading.settings import DataSettings
from sa3train.training.checks import check_compatibility
from sa3train.training.settings import LossSettings, TrainerSettings, TrainingSettings


def check(prompts: PromptSettings | None = None, **settings: Any) -> None:
    data: Any = SimpleNamespace(settings=DataSettings("latents", prompts=prompts or PromptSettings()))
    model: Any = SimpleNamespace(objective="rectified_flow", name="small-base", sibling=None)
    check_compatibility(model, data, TrainingSettings(**settings))


def test_weights_that_are_zero_at_every_level_that_is_visited_are_refused() -> None:
    levels: dict[str, Any] = {"timesteps": "levels", "sampler_steps": 2, "shift": "none"}
    check(loss=LossSettings(**levels, weighting=[0.0, 1.0]))
    check(loss=LossSettings(weighting=[1.0, *[0.0] * 999]))
    with pytest.raises(ConfigError, match=r"loss\.weighting"):
        check(loss=LossSettings(**levels, weighting=[1.0, *[0.0] * 999]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"trainer": TrainerSettings(max_steps=50, ema_decay=0.99)}, "trainer.ema_decay=0.99"),
        ({"loss": LossSettings(cfg_dropout=1.0)}, "loss.cfg_dropout"),
        ({"prompts": PromptSettings(caption_dropout=1.0)}, "data.prompts.caption_dropout"),
        ({"trainer": TrainerSettings(max_steps=1000, ema_decay=0.99)}, ""),
    ],
)
def test_what_is_rarely_intended_is_named(
    settings: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(**settings)
    assert named in caplog.text if named else not caplog.text
