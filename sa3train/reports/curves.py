"""The measured parts of the run report: losses, clips, memorization, speed and memory."""

from collections.abc import Mapping
from html import escape
from typing import Any

from sa3train.reports.charts import Line, Point, render_bars, render_legend, render_line_chart, smooth_points
from sa3train.reports.html import format_bytes, render_facts, render_template
from sa3train.reports.loss_change import LossChange, compute_change
from sa3train.reports.pick import list_comparable
from sa3train.reports.run_files import ROUND_TRIPS, RunFiles

PARTS = {"val": ("held-out clips", "c-heldout"), "train_eval": ("training clips", "c-train")}
"""Name and color of each part of `validation.json`."""
BASELINE = (0.0, "base model")
SMALL = (250.0, 150.0)
SHOWN_CLIPS = 8
ROUND_TRIP_MEASURES = (
    ("log_mel", "Log-mel distance", "dB, lower is better"),
    ("si_sdr", "SI-SDR", "dB, higher is better"),
    ("drift", "Drift of latents", "‖z′ − z‖ / ‖z‖, lower is better"),
)


def render_learning(run: RunFiles) -> str:
    """Render validation losses against the base model, their gap, the training loss, gradient norm and learning rate.

    Args:
        run: The run.

    Returns:
        HTML; empty without any of them.
    """
    return _render_charts(
        _render_change(run, None, title="Validation loss vs. base model", note=_describe_loss(run)),
        _render_gap(run),
        _render_training_loss(run),
        _render_metric(run, "train/gradient_norm", "Gradient norm", "c-fourth", note="before clipping"),
        _render_metric(run, "train/learning_rate", "Learning rate", "c-third"),
    )


def render_noise_levels(run: RunFiles) -> str:
    """Render a small chart of validation losses per noise level, and the losses over noise levels at the last step.

    For a decoder, round trips take the place of noise levels.

    Args:
        run: The run.

    Returns:
        HTML; empty before the first validation.
    """
    levels, history = run.validation.get("levels", []), run.validation.get("history", [])
    if not history:
        return ""
    if is_decoder_run(run):
        return _render_round_trips(run)
    small = "".join(
        _render_change(run, number, title=f"t = {level:.2f}", size=SMALL) for number, level in enumerate(levels)
    )
    profile = [
        Line(f"{name}, {model}", list(zip(levels, losses[part]["by_level"], strict=True)), color, dashed=is_base)
        for model, losses, is_base in (("adapter", history[-1], False), ("base", run.validation["base"], True))
        for part, (name, color) in PARTS.items()
        if part in losses
    ]
    sampled = [
        Line(f"t = {level:.2f}", smooth_points(run.get_curve(f"train/level/{level:.2f}"), 8), color)
        for level, color in zip(levels[::3], ("c-fourth", "c-third", "c-heldout", "c-train"), strict=False)
    ]
    legend = [Line(name, (), color) for name, color in PARTS.values()] + [Line(BASELINE[1], (), "c-base", dashed=True)]
    charts = _render_charts(
        render_line_chart(profile, title=f"Loss over noise levels t at step {history[-1]['step']}", x_label="t"),
        render_line_chart(sampled, title="Training loss by noise level", note="running mean of 8 log lines"),
    )
    return f'<div class="charts small">{small}</div>{render_legend(legend)}{charts}'


def is_decoder_run(run: RunFiles) -> bool:
    """Check whether a run trains an adapter on the autoencoder's decoder.

    Args:
        run: The run.

    Returns:
        Whether it was validated by round trips.
    """
    return run.validation.get("measure") == ROUND_TRIPS


def _render_round_trips(run: RunFiles) -> str:
    """Render each measure over round trips at the last step, of adapter and base."""
    levels, last, base = run.validation["levels"], run.validation["history"][-1], run.validation["base"]
    charts = []
    for key, title, note in ROUND_TRIP_MEASURES:
        lines = [
            Line(f"{name}, {model}", list(zip(levels, values[part][key], strict=True)), color, dashed=is_base)
            for model, values, is_base in (("adapter", last, False), ("base", base, True))
            for part, (name, color) in PARTS.items()
            if part in values
        ]
        charts.append(
            render_line_chart(lines, title=f"{title} at step {last['step']}", note=note, x_label="round trips")
        )
    return _render_charts(*charts)


def _describe_loss(run: RunFiles) -> str:
    if is_decoder_run(run):
        return f"log-mel distance after {len(run.validation['levels'])} round trips, each clip against itself"
    return "mean over noise levels, each clip against itself"


def render_clips(run: RunFiles) -> str:
    """Render tables of the validation clips, worst first.

    Args:
        run: The run.

    Returns:
        HTML; empty before the first validation.
    """
    items = run.validation.get("items", {})
    parts = [
        (name, sorted(items.get(part, []), key=_compute_change, reverse=True)) for part, (name, _) in PARTS.items()
    ]
    return render_template("clips.html", parts=parts, change=_format_change, shown=SHOWN_CLIPS)


def render_memorization(run: RunFiles) -> str:
    """Render the distances of generations to training and held-out clips, and the closest pairs.

    Args:
        run: The run.

    Returns:
        HTML; empty where memorization was not measured.
    """
    if not run.memorization:
        return ""
    score = run.memorization.get("memorization") or {}
    distances = [
        (label, score[key], f"{score[key]:.3f}")
        for label, key in (
            ("generated → training", "generated_to_training"),
            ("generated → held-out", "generated_to_heldout"),
            ("held-out → training", "heldout_to_training"),
        )
        if key in score
    ]
    return render_template("memorization.html", found=run.memorization, bars=render_bars(distances))


def render_system(run: RunFiles) -> str:
    """Render speed, memory use and the memory plan.

    Args:
        run: The run.

    Returns:
        HTML; empty without any of them.
    """
    charts = _render_charts(
        _render_metric(run, "time/steps_per_second", "Steps per second", "c-heldout"),
        _render_metric(run, "time/audio_seconds_per_second", "Seconds of audio per second", "c-fourth"),
        _render_metric(run, "time/peak_memory_gib", "Peak memory", "c-third", note="GiB"),
    )
    about = render_facts([("device", str(run.system["device"]))]) if run.system else ""
    plan = run.system.get("plan")
    if plan:
        rows = [(name, size, format_bytes(size)) for name, size in plan.items() if size]
        about += f"<h3>Memory plan before the first step</h3>{render_bars(rows, 'c-third')}"
        about += f'<p class="soft">{escape(str(run.system.get("plan_accuracy") or ""))}</p>'
    return charts + about


def _render_charts(*charts: str) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _render_metric(run: RunFiles, metric: str, title: str, color: str, note: str = "") -> str:
    return render_line_chart([Line(title, run.get_curve(metric), color)], title=title, note=note)


def _render_change(run: RunFiles, level: int | None, **options: Any) -> str:
    """Chart the losses of both parts as changes from the base's, in percent; of one noise level or of all."""
    lines = []
    for part, (name, color) in PARTS.items():
        base = run.validation.get("base", {}).get(part, {})
        points: list[Point] = []
        for row in list_comparable(run.validation, part):
            pair = (base, row[part])
            if level is not None:
                pair = ({"loss": base["by_level"][level]}, {"loss": row[part]["by_level"][level]})
            points.append((float(row["step"]), 100 * compute_change(*pair)))
        lines.append(Line(name, points, color))
    return render_line_chart(lines, unit="%", baseline=BASELINE, min_range=2.0, **options)


def _render_gap(run: RunFiles) -> str:
    """Render held-out minus training loss; the base has such a gap too, since the clips differ."""
    base = run.validation.get("base", {})
    if len(base) < len(PARTS):
        return ""
    training = {row["step"] for row in list_comparable(run.validation, "train_eval")}
    rows = [row for row in list_comparable(run.validation, "val") if row["step"] in training]
    points = [(float(row["step"]), _compute_gap(row)) for row in rows]
    return render_line_chart(
        [Line("held-out minus training loss", points, "c-third")],
        title="Generalization gap",
        baseline=(_compute_gap(base), "gap of the base model"),
        note="rising above the base model's: clips are being memorized",
    )


def _compute_gap(losses: Mapping[str, Any]) -> float:
    return float(losses["val"]["loss"] - losses["train_eval"]["loss"])


def _render_training_loss(run: RunFiles) -> str:
    loss = run.get_curve("train/loss")
    mean = smooth_points(loss, max(1, len(loss) // 20))
    return render_line_chart(
        [Line("", loss, "c-train", faint=True), Line("running mean", mean, "c-train")],
        title="Training loss",
        note="varies with the noise levels drawn; rely on the validation losses",
    )


def _compute_change(row: Mapping[str, Any]) -> float:
    return compute_change({"loss": row["base"]}, {"loss": row["adapter"]})


def _format_change(row: Mapping[str, Any]) -> str:
    """One clip says nothing of chance, so that its change has no color."""
    return LossChange(_compute_change(row), 1).format()
