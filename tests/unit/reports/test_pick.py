"""The pick among several adapters: right on tables whose answer is known, and honest about noise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sa3train.reports.pick import Pick, is_comparable, pick_best


def make_losses(gains: list[float], clips: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the base, which differ by clip, and of a candidate for each gain over it (of the logarithm)."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 1, clips)
    return base, np.array([base * np.exp(rng.normal(-gain, noise, clips)) for gain in gains])


def test_a_real_gain_is_picked_and_is_sure() -> None:
    found = pick_best(*make_losses([0.0, 0.2, 0.1], 16, 0.02))
    assert found.winner == 1 and found.beats_base
    assert found.probability == 1.0 and found.equals == ()
    assert found.p_value == pytest.approx(1e-4, abs=1e-4)
    assert "lower" in found.describe() and "the best on 100%" in found.describe()


def test_candidates_of_the_same_gain_are_equals() -> None:
    found = pick_best(*make_losses([0.2, 0.2, -0.5], 16, 0.1))
    assert found.beats_base and {found.winner, *found.equals} == {0, 1}
    assert 0.2 < found.probability < 0.99


@pytest.mark.parametrize("clips", [4, 8, 20])
def test_nothing_is_picked_from_noise_however_many_are_tried(clips: int) -> None:
    """Of 100 sets of 20 candidates that are the base but for noise, about five may pass at 5 %; a t-test of the best
    candidate alone would pass most."""
    found = [pick_best(*make_losses([0.0] * 20, clips, 0.1, seed)) for seed in range(100)]
    assert sum(each.beats_base for each in found) <= 12
    assert sum(each.change.is_significant and each.change.change < 0 for each in found) > 20 or clips < 5


def test_fewer_than_five_clips_are_never_sure() -> None:
    found = pick_best([1.0] * 4, [[0.5, 0.51, 0.5, 0.49]])
    assert not found.beats_base and found.p_value == 1 / 16
    assert not found.change.is_significant and found.describe().endswith("4 clips: too few to tell)")
    assert pick_best([1.0] * 5, [[0.5, 0.51, 0.5, 0.49, 0.5]]).p_value == 1 / 32


def test_the_test_is_that_of_scipy_for_one_candidate() -> None:
    base, losses = make_losses([0.03], 9, 0.1)
    expected = stats.permutation_test(
        (np.log(base / losses[0]),), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples",
        alternative="greater", n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    assert pick_best(base, losses).p_value == pytest.approx(expected.pvalue)


def test_the_probability_is_the_share_of_resampled_sets() -> None:
    base, losses = make_losses([0.02, 0.01], 4, 0.1, seed=3)
    found = pick_best(base, losses)
    table = np.log(np.vstack([base, losses]))
    best = [table[:, list(chosen)].mean(axis=1).argmin() for chosen in itertools.product(range(4), repeat=4)]
    assert found.probability == pytest.approx(np.mean(np.array(best) == found.winner + 1), abs=0.02)


@pytest.mark.parametrize(
    ("losses", "able"),
    [([0.5, 0.6], True), ([0.5], False), ([0.5, math.nan], False), ([0.5, math.inf], False), (None, False)],
)
def test_what_can_be_compared(losses: list[float] | None, able: bool) -> None:
    assert is_comparable([1.0, 1.0], losses) is able


def test_the_base_itself_is_no_gain() -> None:
    base = [1.0, 0.8, 0.9, 1.1, 1.0, 0.7]
    found = pick_best(base, [base, base])
    assert isinstance(found, Pick)
    assert (found.winner, found.p_value, found.probability, found.beats_base) == (0, 1.0, 0.0, False)
    assert "the same" in found.describe()
