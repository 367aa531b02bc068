"""The change of a loss comes with its number of clips and the interval that a paired t-test of logarithms gives."""

import numpy as np
import pytest
from scipy import stats

from sa3train.reports.html import render_change_tile
from sa3train.reports.loss_change import LossChange, compare_clips, compute_loss_change


def make_validation(base: list[float], adapter: list[float]) -> dict[str, object]:
    return {"items": {"val": [{"base": b, "adapter": a} for b, a in zip(base, adapter, strict=True)]}}


@pytest.mark.parametrize("share", [0.9, 0.98, 1.02, 1.3])
def test_the_interval_is_that_of_a_paired_t_test_of_logarithms(share: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1.5, 9)
    adapter = base * rng.normal(share, 0.05, 9)
    found = compute_loss_change(make_validation(base.tolist(), adapter.tolist()), "val")
    expected = stats.ttest_rel(np.log(adapter), np.log(base)).confidence_interval(0.95)
    assert found is not None and found.margin is not None
    assert found.clips == 9 and found.change == pytest.approx(stats.gmean(adapter / base) - 1)
    nearer = found.change - np.copysign(found.margin, found.change)
    assert nearer == pytest.approx(np.expm1(expected.high if found.change < 0 else expected.low))
    assert found.is_significant == (expected.low > 0 or expected.high < 0)


def test_one_clip_of_a_huge_loss_does_not_decide() -> None:
    base = [1.38, 1.26, 1.52, 4.91, 1.31, 34.8]
    adapter = [0.89, 0.83, 0.97, 2.19, 0.99, 26.8]
    found = compare_clips(base, adapter)
    assert found is not None and found.is_significant and -0.55 < found.change < -0.23
    unlucky = compare_clips(base, [*adapter[:-1], 70.0])
    assert unlucky is not None and unlucky.change < 0 and not unlucky.is_significant


def test_silence_has_a_change_too() -> None:
    assert compare_clips([0.0, 1.0], [0.0, 1.0]) == LossChange(0.0, 2, 0.0)


def test_one_clip_has_no_interval() -> None:
    found = compute_loss_change(make_validation([2.0], [1.5]), "val")
    assert found.clips == 1 and found.margin is None
    assert found.describe() == "25.0% lower per clip (1 clip: too few to tell)"


@pytest.mark.parametrize(("margin", "mood"), [(0.05, "good"), (0.2, ""), (None, "")])
def test_no_gain_is_shown_within_noise(margin: float | None, mood: str) -> None:
    change = LossChange(-0.1, 9, margin)
    assert f'class="{mood}">-10.0%' in render_change_tile(change, "loss")
    assert ("within noise" in change.describe()) == (margin == 0.2)


def test_nothing_measured_is_no_change() -> None:
    assert compute_loss_change({}, "val") is None
    assert compute_loss_change(make_validation([1.0], [1.0]), "train_eval") is None
