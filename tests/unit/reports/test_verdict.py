"""What a run's figures say in words: known answers from synthetic validations, and nothing is a gain within noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3train.reports.run_files import RunFiles
from sa3train.reports.run_report import render_report
from sa3train.reports.verdict import ALL_COPIES, choose_strength, describe_verdict


def make_run(
    levels: dict[int, float], *, noise: float = 0.01, clips: int = 12, train: float = 0.8, **strengths: float
) -> RunFiles:
    """A run whose held-out loss at each step is this share of the base's, but for noise of each clip."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1.5, clips)

    def make(share: float) -> dict[str, Any]:
        losses = (base * share + (rng.normal(0, noise, clips) if share != 1 else 0)).tolist()
        return {"loss": float(np.mean(losses)), "by_level": [float(np.mean(losses))], "by_clip": losses}

    history = [{"step": step, "val": make(share), "train_eval": make(train)} for step, share in levels.items()]
    last = history[-1]
    items = {
        part: [
            {"key": str(n), "prompt": "", "base": float(b), "adapter": a}
            for n, (b, a) in enumerate(zip(base, last[part]["by_clip"], strict=True))
        ]
        for part in ("val", "train_eval")
    }
    validation = {
        "levels": [0.5], "base": {"val": make(1.0), "train_eval": make(1.0)}, "history": history, "items": items,
        "best_step": 0, "best_loss": 1.0,
        "strengths": [{"strength": float(s[1:]), "by_clip": make(share)["by_clip"]} for s, share in strengths.items()],
    }  # fmt: skip
    return RunFiles(Path("style"), validation=validation)


def judge(run: RunFiles) -> dict[str, str]:
    return {answer.question.split()[0].lower(): answer.text for answer in describe_verdict(run)}


@pytest.mark.parametrize(("base_score", "heldout", "is_told"), [(1.0, 8, True), (0.4, 8, False), (1.0, 2, False)])
def test_copies_are_what_the_base_does_not_come_near(base_score: float, heldout: int, is_told: bool) -> None:
    scores = {"score": 0.3, "base_score": base_score, "heldout_clips": heldout}
    run = replace(make_run({0: 1.0, 10: 0.9}), memorization={"clips": 8, "memorization": scores})
    assert ("may be copies" in judge(run)["what"]) == is_told


def test_a_run_that_was_still_falling() -> None:
    found = judge(make_run({0: 1.0, 10: 0.9, 20: 0.8}))
    assert (
        found["did"].startswith("Yes: loss on held-out clips is ")
        and "lower per clip than the base model's" in found["did"]
    )
    assert found["when"] == "At the last step that was validated, 20, and it was still falling."
    assert found["what"] == "Train for more steps (trainer.max_steps): the loss was still falling."
    assert "at" not in found, "no strength was measured"


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (make_run({0: 1.0, 10: 0.9, 20: 0.8}), "still falling"),
        (make_run({0: 1.0, 10: 1.0001}, noise=0.1, train=1.0), "little has changed"),
        (make_run({0: 1.0, 10: 0.9}, s2=0.7), "strength 2"),
    ],
)
def test_more_steps_are_advised_once_those_of_the_run_are_done(run: RunFiles, words: str) -> None:
    def advise(status: str) -> str:
        return judge(replace(run, record={"status": status}))["what"]

    assert words in advise("finished") and "for more steps" in advise("finished")
    for status in ("running", "interrupted"):
        assert words in advise(status) and "his run train on" in advise(status)
        assert "more steps" not in advise(status)


def test_a_run_that_went_past_its_best() -> None:
    found = judge(make_run({0: 1.0, 10: 0.8, 20: 0.9}))
    assert found["did"].startswith("Yes: ") and "at step 10" in found["did"]
    assert found["when"].startswith("At step 10; since then the loss has risen by 12.")
    assert "Stop near step 10" in found["what"]


def test_a_run_that_made_it_worse() -> None:
    found = judge(make_run({0: 1.0, 10: 1.2}, train=0.5))
    assert found["did"].startswith("No: ") and "fewer steps, a lower rank, or more data" in found["what"]
    assert "optimizer.lr" in judge(make_run({0: 1.0, 10: 1.2}, train=1.3))["what"]


def test_noise_is_neither_gain_nor_loss() -> None:
    run = make_run({0: 1.0, 10: 1.0001}, noise=0.1, train=1.0)
    found = judge(run)
    assert found["did"].startswith("Not beyond noise: ") and "within noise" in found["did"]
    assert "little has changed" in found["what"]
    page = render_report(run)
    assert 'class="good"' not in page and 'class="bad"' not in page and "-0.0%" not in page


def test_a_change_that_reads_nothing_is_no_gain_however_sure() -> None:
    found = judge(make_run({0: 1.0, 4: 0.9997}, noise=1e-7, train=1.0, **{"s1.25": 0.9996}))
    assert found["did"].startswith("Not beyond noise: loss on held-out clips is the same as the base model's")
    assert found["at"] == "None of 1, 1.25 beats the base model beyond noise."


def test_few_clips_are_said_to_be_few() -> None:
    said = "Measure on 5 held-out clips or more (split, callbacks.validation.clips): with 4, "
    run = make_run({0: 1.0, 10: 0.8, 20: 0.9}, clips=4, **{"s1.25": 0.7})
    found = judge(run)
    assert (
        found["what"] == f"{said}nothing can be told from chance."
        and found["at"] == "So few clips cannot tell."
        and choose_strength(run.validation) == 1
    )
    assert found["did"].startswith("Cannot tell: loss on held-out clips is ")
    assert found["did"].endswith("4 clips: too few to tell) at step 10.")
    assert found["when"] == "At step 10; if step 20 is worse, so few clips cannot tell."
    assert "beyond noise" not in str(found) and 'class="good"' not in render_report(run)


@pytest.mark.parametrize(("start", "named"), [(1.0, "the base model"), (0.8, "the adapter that it trains further")])
def test_a_run_that_is_never_better_than_its_start(start: float, named: str) -> None:
    found = judge(make_run({0: start, 2: 1.2 * start, 4: 1.1 * start}))
    assert found["when"] == f"No step is better than its start, {named}."
    assert judge(make_run({0: start, 4: 0.9 * start}))["when"] == "At the last step that was validated, 4."


@pytest.mark.parametrize(
    ("shares", "best", "advice"),
    [
        ({"s0.5": 0.95, "s1.25": 0.9}, "1 of 0.5, 1, 1.25", "Nothing: these figures show no need."),
        ({"s0.5": 0.7, "s1.25": 0.9}, "0.5 of 0.5, 1, 1.25", "Play it at strength 0.5, or train for fewer steps"),
        ({"s0.5": 0.95, "s1.25": 0.7}, "1.25 of 0.5, 1, 1.25", "Play it at strength 1.25, or train for more steps."),
    ],
)
def test_the_strength_is_that_of_the_lowest_loss(shares: dict[str, float], best: str, advice: str) -> None:
    run = make_run({0: 1.0, 20: 0.8}, **shares)
    found = judge(run)
    assert found["at"].startswith(best) and found["what"].startswith(advice)
    assert choose_strength(run.validation) == float(best.partition(" ")[0])


def test_steps_that_diverged_or_have_other_clips_are_left_out() -> None:
    run = make_run({10: 0.8, 20: 0.9, 30: 0.7})
    run.validation["history"][0]["val"]["by_clip"].append(0.1)
    run.validation["history"][2]["val"]["by_clip"][0] = float("nan")
    said = judge(run)
    assert "at step 20" in said["did"] and "later ones diverged" in said["when"]


@pytest.mark.parametrize(
    ("pick", "steps", "said", "later"),
    [
        ({"text": "a@10: p = 0.01"}, [10, None], "a@10: p = 0.01.", " Later steps than 10 were not measured."),
        (None, [None], f"{ALL_COPIES}.", ""),
    ],
)
def test_what_an_evaluation_found_is_said_before_what_to_change(
    pick: dict[str, Any] | None, steps: list[int | None], said: str, later: str
) -> None:
    said += " Strengths measured: 1."
    candidates = [{"step": step, "strength": 1.0} for step in steps]
    run = replace(make_run({0: 1.0, 10: 0.8}), evaluation={"pick": pick, "candidates": candidates})
    assert list(judge(run).values())[-2] == said and said in render_report(run)
    longer = replace(make_run({0: 1.0, 20: 0.8}), evaluation=run.evaluation)
    assert judge(longer)["which"] == said + later
    assert list(judge(replace(run, validation={}))) == ["which"]


def test_nothing_is_said_of_a_run_before_its_first_step() -> None:
    run = make_run({0: 1.0}, train=1.0)
    assert describe_verdict(run) == [] and describe_verdict(RunFiles(Path("x"))) == []
    assert "-0.0%" not in render_report(run) and 'class="good"' not in render_report(run)
