"""What the figures of a run say, in words: did it take, when was it best, at which strength, what to change next.

Nothing within noise is called a gain or a loss: differences are paired over the same clips and noise (`loss_change`,
`pick`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sa3train.reports.loss_change import MIN_CLIPS, SMALLEST, LossChange, compare_clips, compute_loss_change
from sa3train.reports.pick import Pick, is_comparable, pick_best
from sa3train.reports.run_files import RunFiles

BASE = "the base model's"
COPIES, TOO_FEW = "copies", "too few clips to tell copies"
COPY_THRESHOLD = 0.5
"""Memorization score below which generations count as copies of training clips, in units of the base's if less."""
MIN_COPY_CLIPS = 4
"""Held-out and generated clips with which copies can be told. Where it can, the default split holds out as many."""


class Answer(NamedTuple):
    """An answer of the verdict.

    Attributes:
        question: The question.
        text: The answer, one or more sentences.
    """

    question: str
    text: str


def summarize_run(run: RunFiles) -> list[str]:
    """Summarize what the metrics of a run say.

    Args:
        run: The run.

    Returns:
        Sentences: each question with its answer.
    """
    return [f"{answer.question} {answer.text}" for answer in describe_verdict(run)]


def describe_verdict(run: RunFiles) -> list[Answer]:
    """Describe what the validations of a run say, and `sa3-eval` where it has measured the run.

    Args:
        run: The run.

    Returns:
        Answers; none before a step has been validated or evaluated.
    """
    answers = _describe_validation(run)
    if run.evaluation:
        pick, strengths = run.evaluation.get("pick"), {row["strength"] for row in run.evaluation["candidates"]}
        measured = f"Strengths measured: {', '.join(f'{strength:g}' for strength in sorted(strengths))}."
        text = f"{pick['text'] if pick else ALL_COPIES}. {measured} {describe_later(run.evaluation, run.step)}"
        answers.insert(max(0, len(answers) - 1), Answer(EVALUATED, text.strip()))
    return answers


def choose_strength(validation: Mapping[str, Any]) -> float:
    """Choose the strength to play the adapter of a run's last step at.

    Args:
        validation: Content of `validation.json`.

    Returns:
        The one with the lowest held-out loss, where that is below the loss at 1 beyond noise; else 1.
    """
    return _choose_strength(_list_strengths(validation))


def judge_copying(score: float, base: float, clips: int) -> str:
    """Judge whether generations copy training clips.

    The base has never heard them: where it comes as near from the same prompts, few or plain clips are the reason.

    Args:
        score: Memorization score of the adapter.
        base: That of the base.
        clips: Number of held-out or of generated clips, whichever is less.

    Returns:
        `COPIES`, `TOO_FEW`, or nothing.
    """
    if not score < COPY_THRESHOLD * min(1.0, base):  # NaN is no copy
        return ""
    return COPIES if clips >= MIN_COPY_CLIPS else TOO_FEW


def describe_later(evaluation: Mapping[str, Any], step: int) -> str:
    """Describe which steps of a run an evaluation has left out, as it was made before them.

    Args:
        evaluation: Content of `evaluation.json`.
        step: The last step of the run.

    Returns:
        A sentence; empty where it measured the last step, or no step is known.
    """
    last = max((row["step"] for row in evaluation.get("candidates", []) if row["step"] is not None), default=step)
    return "" if step <= last else f"Later steps than {last:,} were not measured."


def _describe_validation(run: RunFiles) -> list[Answer]:
    """Answer from held-out clips or, where nothing is held out, from training clips."""
    validation = run.validation
    trained = [row for row in validation.get("history", []) if row["step"] > 0]
    change, train = (compute_loss_change(validation, part) for part in ("val", "train_eval"))
    if not trained or (change is None and train is None):
        return []
    measured = run.memorization.get("memorization", {})
    clips = min(run.memorization.get("clips", 0), measured.get("heldout_clips", 0))
    copies = judge_copying(measured.get("score", 1.0), measured.get("base_score", 1.0), clips) == COPIES
    if change is None:
        assert train is not None
        text = (
            f"Loss on training clips is {train.describe(BASE)}. Without held-out clips nothing says if new ones gain."
        )
        advice = ["Hold clips out (split=0.1)."] + [COPIES_ADVICE] * copies
        return [Answer(TOOK, text), Answer(NEXT, " ".join(advice))]
    base_I = validation["base"]["val"].get("by_clip", [])
    history = {row["step"]: row["val"]["by_clip"] for row in trained if _is_comparable(base_I, row)}
    pick = pick_best(base_I, list(history.values())) if history else None
    best = None if pick is None else list(history)[pick.winner]
    since = None if best is None else compare_clips(history[best], history[max(history)])
    is_last = best is None or best == trained[-1]["step"]
    answers = [Answer(TOOK, _say_whether(change, train, pick, best, is_last))]
    if best is not None and since is not None:
        text = _say_when(best, max(history), since, _is_falling(history))
        if best == max(history) and not is_last:
            text = f"At step {best:,}: later ones diverged, or have other clips."
        text = _say_start(validation, history) or text
        answers.append(Answer(WHEN, text))
    strengths = _list_strengths(validation)
    if strengths:
        answers.append(Answer(STRENGTH, _say_strength(validation, strengths)))
    is_over = run.record.get("status", "finished") == "finished"
    advice = _advise(change, train, history, best, since, strengths, is_over) + [COPIES_ADVICE] * copies
    return [*answers, Answer(NEXT, " ".join(advice))]


TOOK, WHEN, STRENGTH, NEXT = "Did it take?", "When was it best?", "At which strength?", "What to change next?"
EVALUATED = "Which adapter to use, by sa3-eval?"
ALL_COPIES = "base: every adapter copies its training clips, or has no finite loss"
COPIES_ADVICE = (
    "Generations are far closer to training clips than held-out clips and the base's are: they may be copies. Use "
    "fewer steps, a lower rank, or more data."
)


def _is_comparable(base_I: Sequence[float], row: Mapping[str, Any]) -> bool:
    return is_comparable(base_I, row.get("val", {}).get("by_clip"))


def _is_falling(history: Mapping[int, list[float]]) -> bool:
    """Whether the last validation is below the one before it beyond noise."""
    last = list(history.values())[-2:]
    change = compare_clips(*last) if len(last) == 2 else None
    return change is not None and change.is_significant and change.change < 0


def _say_whether(last: LossChange, train: LossChange | None, pick: Pick | None, best: int | None, is_last: bool) -> str:
    """`last` is the change at the last step, `pick` that of the best; None where losses of single clips are missing."""
    change = last if pick is None else pick.change
    took = last.is_significant and last.change < 0 if pick is None else pick.beats_base
    where = "" if best is None or is_last else f" at step {best:,}"
    if last.is_significant and last.change > 0 and not took:
        answer, change, is_last, where = "No", last, True, where and " at the last step"
    else:
        answer = "Yes" if took else "Not beyond noise" if change.is_able else "Cannot tell"
    beside = f"; on training clips {train.describe()}" if train is not None and is_last else ""
    return f"{answer}: loss on held-out clips is {change.describe(BASE)}{where}{beside}."


def _say_when(best: int, last: int, since: LossChange, is_falling: bool) -> str:
    if best == last:
        still = ", and it was still falling" if is_falling else ""
        return f"At the last step that was validated, {last:,}{still}."
    if not since.is_able:
        return f"At step {best:,}; if step {last:,} is worse, so few clips cannot tell."
    if since.is_significant:
        return f"At step {best:,}; since then the loss has risen by {since.change:.1%} (±{since.margin or 0:.1%})."
    return f"At step {best:,}, but step {last:,} is as good within noise."


def _say_start(validation: Mapping[str, Any], history: Mapping[int, list[float]]) -> str:
    """That no step is better than the start, which is the base model or an adapter that is trained further."""
    base_I = validation["base"]["val"]["by_clip"]
    start = next((row for row in validation["history"] if row["step"] == 0 and _is_comparable(base_I, row)), None)
    if start is None or pick_best(base_I, [start["val"]["by_clip"], *history.values()]).winner:
        return ""
    change = compare_clips(base_I, start["val"]["by_clip"])
    is_base = change is not None and abs(change.change) < SMALLEST
    return f"No step is better than its start, {'the base model' if is_base else 'the adapter that it trains further'}."


def _list_strengths(validation: Mapping[str, Any]) -> dict[float, list[float]]:
    """The loss of each held-out clip by strength at the last step, 1 among them."""
    base_I, last = validation["base"]["val"].get("by_clip", []), validation["history"][-1]
    rows = [row for row in validation.get("strengths", []) if is_comparable(base_I, row["by_clip"])]
    if not rows or not _is_comparable(base_I, last):
        return {}
    return dict(sorted(({row["strength"]: row["by_clip"] for row in rows} | {1.0: last["val"]["by_clip"]}).items()))


def _choose_strength(strengths: Mapping[float, list[float]]) -> float:
    if not strengths:
        return 1.0
    lowest = list(strengths)[pick_best(strengths[1.0], list(strengths.values())).winner]
    gain = compare_clips(strengths[1.0], strengths[lowest])
    return lowest if gain is not None and gain.is_significant else 1.0


def _say_strength(validation: Mapping[str, Any], strengths: Mapping[float, list[float]]) -> str:
    found, values = pick_best(validation["base"]["val"]["by_clip"], list(strengths.values())), list(strengths)
    if not found.change.is_able:
        return "So few clips cannot tell."
    if not found.beats_base:
        return "None of " + ", ".join(f"{value:g}" for value in values) + " beats the base model beyond noise."
    equals = ", ".join(f"{values[index]:g}" for index in found.equals)
    return (
        f"{values[found.winner]:g} of {', '.join(f'{value:g}' for value in values)}, at step "
        f"{validation['history'][-1]['step']:,}{f'; as good within noise: {equals}' if equals else ''}."
    )


def _advise(
    change: LossChange,
    train: LossChange | None,
    history: Mapping[int, list[float]],
    best: int | None,
    since: LossChange | None,
    strengths: Mapping[float, list[float]],
    is_over: bool,
) -> list[str]:
    """Advise on the next run, or on this one while steps of it are left."""
    found = []
    if not change.is_able:
        few = f"with {change.clips}, nothing can be told from chance."
        return [f"Measure on {MIN_CLIPS} held-out clips or more (split, callbacks.validation.clips): {few}"]
    learned = train is not None and train.is_significant and train.change < 0
    if best is not None and since is not None and since.is_significant and since.change > 0:
        found.append(
            f"Stop near step {best:,} (trainer.max_steps), or export the best adapter with "
            "callbacks.validation.select_best=true."
        )
    if change.is_significant and change.change > 0:
        if learned:
            found.append(
                "Loss improved on training clips and got worse on held-out clips: use fewer steps, a lower rank, or "
                "more data."
            )
        else:
            found.append("Lower the learning rate (optimizer.lr): the adapter makes the model worse.")
    elif _is_falling(history):
        more = "Train for more steps (trainer.max_steps): the loss was still falling."
        found.append(more if is_over else "Let this run train on: so far, the loss is still falling.")
    elif not change.is_significant and not learned:
        more = "Train for more steps or at a higher rate (trainer.max_steps, optimizer.lr): little has changed."
        found.append(more if is_over else "Let this run train on: so far, little has changed.")
    elif not change.is_significant:
        found.append(
            "Use more data or a lower rank: what it learned from its clips does not help new ones beyond noise."
        )
    strength = _choose_strength(strengths)
    if strength != 1:
        longer = "train for more steps" if is_over else "let this run train on"
        more = longer if strength > 1 else "train for fewer steps or at a lower rate"
        found.append(f"Play it at strength {strength:g}{f', or {more}' if not found else ''}.")
    return found or ["Nothing: these figures show no need."]
