"""Results of an evaluation: differences are those of scipy, names are short, and JSON holds no NaN."""

import json
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sa3train.evaluation.distances import Memorization
from sa3train.evaluation.page import format_memorization
from sa3train.evaluation.results import Candidate, Evaluation, GeneratedClip, Measurement, compute_difference
from sa3train.reports.pick import pick_best

BASE = [1.0, 0.9, 1.1, 0.8, 1.2, 1.0]


def make_measurement(shift: float, **fields: Any) -> Measurement:
    """Six clips at two noise levels, with losses below the base's by `shift` but for a little noise."""
    noise = [0.001, -0.001, 0.002, -0.002, 0.0, 0.001]
    return Measurement(
        [[loss - shift + n, loss - shift - n / 2] for loss, n in zip(BASE, noise, strict=True)], **fields
    )


def make_evaluation(*measured: tuple[str, float, Measurement]) -> Evaluation:
    base = make_measurement(0.0, frechet=9.0)
    candidates = [Candidate(path, None, strength, each, base) for path, strength, each in measured]
    pick = pick_best(base.loss_by_clip, [each.measurement.loss_by_clip for each in candidates])
    return Evaluation(
        "nano-base", ["latents"], {"rulers": {}}, [0.25, 0.75], [], [], Measurement([]), base, candidates, pick, 1.0
    )


def test_a_difference_has_the_interval_of_a_t_test() -> None:
    found = compute_difference([0.5, -0.1, 0.3, 0.2])
    interval = stats.ttest_1samp([0.5, -0.1, 0.3, 0.2], 0).confidence_interval(0.95)
    assert found is not None and found.margin is not None
    assert (found.difference - found.margin, found.difference + found.margin) == pytest.approx(tuple(interval))
    assert not found.is_significant
    assert compute_difference([]) is None
    assert compute_difference([1.0]) is not None and compute_difference([1.0]).margin is None  # type: ignore[union-attr]


def test_measures_are_compared_where_both_have_them() -> None:
    def make_clips(*levels: float | None) -> list[GeneratedClip]:
        return [GeneratedClip(1.0, {"loudness_lufs": level}, {}) for level in levels]

    base = make_measurement(0.0, generated=make_clips(-20.0, None, -30.0))
    mine = make_measurement(0.1, generated=make_clips(-18.0, -5.0, -26.0))
    found = Candidate("a", 3, 1.0, mine, base).compare("loudness_lufs")
    assert found is not None and (found.difference, found.clips) == (3.0, 2)
    assert base.average("loudness_lufs") == -25.0 and base.average("stereo_width") is None


def test_the_interval_of_a_frechet_distance_is_that_of_the_jackknife() -> None:
    """For a mean the jackknife's interval is Student's."""
    mine, base = [1.0, 2.0, 4.0, 3.0], [3.0, 5.0, 4.5, 6.0]

    def make(values: list[float]) -> Measurement:
        without = [fmean(values[:number] + values[number + 1 :]) for number in range(4)]
        return make_measurement(0.0, frechet=fmean(values), frechet_without=without)

    found, plain = make(mine).compare_frechet(make(base)), compute_difference(np.subtract(mine, base).tolist())
    assert found is not None and plain is not None
    assert (found.difference, found.margin) == pytest.approx((plain.difference, plain.margin))
    assert make(mine).compare_frechet(make_measurement(0.0)) is None


@pytest.mark.parametrize(("spread", "is_said"), [(0.1, True), (2.0, False)])
def test_what_is_nearest_by_sound_is_named_beyond_noise(spread: float, is_said: bool) -> None:
    near = make_measurement(0.05, frechet=2.0, frechet_without=[2.0 - spread, 2.0, 2.0 + spread])
    best = make_measurement(0.1, frechet=5.0, frechet_without=[5.0] * 3)
    found = make_evaluation(("a.safetensors", 0.5, best), ("b.safetensors", 1.0, near)).describe_pick()
    assert found.endswith("clips generated with b at strength 1 are nearest to the held-out ones") == is_said


def test_the_pick_is_named() -> None:
    near = make_measurement(0.05, frechet=2.0)
    found = make_evaluation(("runs/style@20", 0.5, make_measurement(0.1, frechet=5.0)), ("x/b.safetensors", 1.0, near))
    assert found.picked is found.candidates[0]
    assert found.describe_pick().startswith("style@20 at strength 0.5: loss 10.")
    written = found.to_dict()
    assert (written["format"], written["version"]) == ("sa3train-evaluation", 2)
    assert written["pick"]["adapter"] == "runs/style@20" and not written["pick"]["is_base"]
    assert written["candidates"][0]["against_base"]["loss"]["is_significant"]
    assert len(written["candidates"][0]["against_base"]["loss_by_level"]) == 2


def test_the_base_is_picked_when_nothing_beats_it() -> None:
    found = make_evaluation(("a", 1.0, make_measurement(-0.1)), ("b", 1.0, make_measurement(-0.2)))
    assert found.picked is None and found.describe_pick().startswith("base: nothing beats it beyond noise. Lowest is a")
    written = found.to_dict()["pick"]
    assert written["is_base"] and written["adapter"] is None and written["candidate"] == 0


def test_names_are_whole_paths_where_short_ones_are_alike() -> None:
    same = make_measurement(0.1)
    found = make_evaluation(("runs/a/adapter.safetensors", 1.0, same), ("runs/b/adapter.safetensors", 1.0, same))
    assert list(found.names.values()) == ["a/adapter", "b/adapter"]
    found = make_evaluation(("one/x.safetensors", 1.0, same), ("two/x.safetensors", 1.0, same))
    assert list(found.names.values()) == ["one/x.safetensors", "two/x.safetensors"]


@pytest.mark.parametrize(
    ("score", "base", "generated", "expected"),
    [
        (0.3, 1.1, 4, "copies"),
        (0.3, 0.4, 4, ""),
        (0.1, 0.4, 4, "copies"),
        (0.3, 1.1, 3, "too few"),
        (0.6, 1.1, 4, ""),
        (float("nan"), 1.1, 4, ""),
    ],
)
def test_copies_are_told_against_the_base_on_enough_clips(
    score: float, base: float, generated: int, expected: str
) -> None:
    clips = [GeneratedClip(1.0, {}, {})] * generated
    found = [Memorization(value, 1.0, 1.0, []) for value in (score, base)]
    mine, its = (make_measurement(0.0, memorization=each, generated=clips) for each in found)
    assert format_memorization(mine, its).startswith(f"{score:.2f}" + (f" ({expected}" if expected else ""))
    candidate = Candidate("a", None, 1.0, mine, its)
    assert candidate.is_copying == (expected == "copies")
    assert candidate.to_dict()["memorization"]["verdict"].startswith(expected)
    assert format_memorization(its, its) == f"{base:.2f}"


def test_json_has_null_for_what_is_no_number() -> None:
    memorization = Memorization(0.0, 1.0, float("nan"), [])
    found = make_evaluation(("a", 1.0, make_measurement(0.1, memorization=memorization, frechet=float("inf"))))
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["candidates"][0]["frechet"] is None
    assert written["candidates"][0]["memorization"]["heldout_to_training"] is None
