"""The change of a loss comes with its number of clips and the interval that a paired t-test gives."""

import numpy as np
import pytest
from scipy import stats

from sa3train.reports.html import render_change_tile
from sa3train.reports.loss_change import LossChange, compute_loss_change


def make_validation(base: list[float], adapter: list[float]) -> dict[str, object]:
    return {"items": {"val": [{"base": b, "adapter": a} for b, a in zip(base, adapter, strict=True)]}}


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1.5, 9)
    adapter = base * rng.normal(0.9, 0.05, 9)
    found = compute_loss_change(make_validation(base.tolist(), adapter.tolist()), "val")
    expected = stats.ttest_rel(adapter, base).confidence_interval(0.95)
    assert found is not None and found.margin is not None
    assert found.clips == 9
    assert found.change - found.margin == pytest.approx(expected.low / base.mean())
    assert found.change + found.margin == pytest.approx(expected.high / base.mean())


def test_one_clip_has_no_interval() -> None:
    found = compute_loss_change(make_validation([2.0], [1.5]), "val")
    assert found == LossChange(-0.25, 1, None)
    assert found.describe() == "25.0% lower (1 clip: too few to tell)"


@pytest.mark.parametrize(("margin", "mood"), [(0.05, "good"), (0.2, ""), (None, "")])
def test_no_gain_is_shown_within_noise(margin: float | None, mood: str) -> None:
    change = LossChange(-0.1, 9, margin)
    assert f'class="{mood}">-10.0%' in render_change_tile(change, "loss")
    assert ("within noise" in change.describe()) == (margin == 0.2)


def test_nothing_measured_is_no_change() -> None:
    assert compute_loss_change({}, "val") is None
    assert compute_loss_change(make_validation([1.0], [1.0]), "train_eval") is None
