"""Training metrics: what a checkpoint of another version means for them."""

import torch

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
