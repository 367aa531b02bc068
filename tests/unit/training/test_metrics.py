"""Training metrics: what a checkpoint of another version means for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sa3train.training.callbacks import metrics
from sa3train.training.callbacks.metrics import MetricsCallback
from sa3train.training.loggers import LoggerCollection


def make_callback() -> MetricsCallback:
    return MetricsCallback(LoggerCollection(), every=10, max_steps=20, frame_seconds=0.1)


def test_sums_that_an_older_run_did_not_save_start_at_zero_and_unknown_ones_are_dropped() -> None:
    state = make_callback().state_dict()
    state["sums"] = {"loss": torch.tensor(3.0), "of another version": torch.tensor(1.0)}
    state["counts"] = {"micro": 4}
    callback = make_callback()
    callback.load_state_dict(state)
    restored, fresh = callback.state_dict(), make_callback().state_dict()
    assert float(restored["sums"]["loss"]) == 3.0 and restored["counts"] == {"micro": 4, "steps": 0, "frames": 0}
    assert restored["sums"].keys() == fresh["sums"].keys() and float(restored["sums"]["gradient_norm"]) == 0.0


def test_speed_is_that_of_steps_without_validation_and_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 170.0, 190.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "AdapterModule", SimpleNamespace)
    callback, logged = make_callback(), dict[int, float]()
    monkeypatch.setattr(
        callback.loggers, "log_metrics", lambda found, step: logged.update({step: found["time/steps_per_second"]})
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    trainer: Any = SimpleNamespace(global_step=0, world_size=1, optimizers=[optimizer])
    module: Any = SimpleNamespace(
        device="cpu", callback_seconds=500.0, has_stepped=True, gradient_norm=torch.tensor(1.0)
    )
    callback.on_train_start(trainer, module)
    loss = {"logged": {name: torch.tensor(1.0) for name in callback._losses}, "frames": 10}
    for step in range(1, 21):
        callback.on_train_batch_start(trainer, module, None, step)
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, loss, None, step)
        module.callback_seconds += 50.0 if step == 5 else 0.0
    assert logged == {10: pytest.approx(10 / 20), 20: pytest.approx(10 / 20)}
