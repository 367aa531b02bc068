"""The measured parts of the run report: losses, clips, memorisation, time and memory."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sa3train.reports.charts import Line, Point, bars, line_chart, smoothed
from sa3train.reports.html import facts, folded, table

if TYPE_CHECKING:
    from sa3train.reports.run_files import RunFiles

PARTS = {"heldout": ("held-out clips", "c-heldout"), "train": ("training clips", "c-train")}
SMALL = (250.0, 150.0)
SHOWN_CLIPS = 8


def learning(run: "RunFiles") -> str:
    """Fixed losses against the base, the gap between them, the training loss itself and the learning rate."""
    charts = [
        line_chart(
            [Line(name, _against_base(run, part), colour) for part, (name, colour) in PARTS.items()],
            title="Loss against the base model",
            unit=" %",
            zero=(0.0, "base model"),
            span=2.0,
            note="mean over all clips and noise levels",
        ),
        _gap(run),
        _training_loss(run),
        line_chart(
            [Line("gradient norm", run.curve("train/gradient_norm"), "c-fourth")],
            title="Gradient norm",
            note="before clipping",
        ),
        line_chart([Line("learning rate", run.curve("train/learning_rate"), "c-third")], title="Learning rate"),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def by_level(run: "RunFiles") -> str:
    """One small chart per noise level, and the losses at the last step over the levels."""
    levels, history = run.heldout.get("levels", []), run.heldout.get("history", [])
    if not history:
        return ""
    charts = []
    for number, level in enumerate(levels):
        lines = [Line(name, _against_base(run, part, number), colour) for part, (name, colour) in PARTS.items()]
        charts.append(
            line_chart(lines, title=f"t = {level:.2f}", unit=" %", zero=(0.0, "base model"), size=SMALL, span=2.0)
        )
    profile = [
        Line(f"{name}, adapter", list(zip(levels, history[-1][part]["by_level"], strict=True)), colour)
        for part, (name, colour) in PARTS.items()
        if part in history[-1]
    ]
    profile += [
        Line(f"{PARTS[part][0]}, base", list(zip(levels, base["by_level"], strict=True)), PARTS[part][1], dashed=True)
        for part, base in run.heldout["base"].items()
    ]
    now = line_chart(profile, title=f"Loss over noise levels t at step {history[-1]['step']}", x_label="t")
    sampled = [
        Line(f"t = {level:.2f}", smoothed(run.curve(f"train/level/{level:.2f}"), 8), colour)
        for level, colour in zip(levels[::3], ("c-fourth", "c-third", "c-heldout", "c-train"), strict=False)
    ]
    drawn = line_chart(sampled, title="Training loss by noise level", note="as drawn; running mean of 8 log lines")
    return (
        f'<div class="charts small">{"".join(charts)}</div>{_legend()}'
        f'<div class="charts">{now}{drawn}</div>'
    )  # fmt: skip


def clips(run: "RunFiles") -> str:
    """A table of fixed clips, those that profit least first."""
    found = []
    for part, (name, _) in PARTS.items():
        rows = sorted(run.heldout.get("items", {}).get(part, []), key=lambda row: -_gain(row))
        if not rows:
            continue
        cells = [
            [
                f"<code>{escape(row['key'])}</code>",
                escape(row["prompt"]),
                f"{row['base']:.4f}",
                f"{row['adapter']:.4f}",
                f'<span class="{"good" if _gain(row) < 0 else "bad"}">{_gain(row):+.1%}</span>',
            ]
            for row in rows
        ]
        head = ("clip", "prompt", "base", "adapter", "change")
        first = table(head, cells[:SHOWN_CLIPS], numbers=(2, 3, 4))
        rest = cells[SHOWN_CLIPS:]
        more = folded(f"{len(rest)} more, better fitted", table(head, rest, numbers=(2, 3, 4))) if rest else ""
        found.append(f"<h3>{name[0].upper()}{name[1:]}, worst fit first</h3>{first}{more}")
    return "".join(found)


def memorised(generated: Mapping[str, Any]) -> str:
    """Distances of generations to training and held-out clips, and the closest pairs."""
    score = generated.get("memorisation")
    if not generated:
        return ""
    spread = generated["spread"]
    about = facts(
        [
            ("generations", f"{generated['clips']} of {generated['seconds']:.1f} s"),
            ("spread of latents", ", ".join(f"{name} {value:.3f}" for name, value in spread.items())),
        ]
    )
    if score is None:
        return about + '<p class="soft">Nothing is held out, so there is no score.</p>'
    rows = [
        ("generated → training", score["generated_to_training"]),
        ("generated → held-out", score["generated_to_heldout"]),
        ("held-out → training", score["heldout_to_training"]),
    ]
    head = ("generation", "closest training clip", "distance")
    nearest = sorted(score["nearest"], key=lambda row: row["distance"])
    cells = [[str(row["clip"]), f"<code>{escape(row['training_clip'])}</code>", f"{row['distance']:.3f}"]
             for row in nearest]  # fmt: skip
    return (
        f'<p class="lead">Score {score["score"]:.2f}: 1 is as far from the training clips as unseen clips are, 0 is a '
        f'copy.</p><div class="two"><div>{bars([(name, value, f"{value:.3f}") for name, value in rows])}</div>'
        f"<div>{about}</div></div>{folded('Closest pairs', table(head, cells, numbers=(0, 2)))}"
    )


def machine(run: "RunFiles") -> str:
    """Speed and memory over the run."""
    charts = [
        line_chart(
            [Line("steps per second", run.curve("time/steps_per_second"), "c-heldout")], title="Steps per second"
        ),
        line_chart(
            [Line("audio", run.curve("time/audio_seconds_per_second"), "c-fourth")],
            title="Seconds of audio per second",
        ),
        line_chart([Line("peak", run.curve("time/peak_memory_gib"), "c-third")], title="Peak memory", note="GiB"),
    ]
    about = facts([("device", str(run.machine["device"]))]) if run.machine else ""
    plan = run.machine.get("plan")
    if plan:
        rows = [(name, size / 2**30, f"{size / 2**30:.3f} GiB") for name, size in plan.items() if size]
        about += f"<h3>Memory plan made before the first step</h3>{bars(rows, 'c-third')}"
        about += f'<p class="soft">{escape(str(run.machine.get("verdict") or ""))}</p>'
    return f'<div class="charts">{"".join(charts)}</div>{about}' if any(charts) else about


def _against_base(run: "RunFiles", part: str, level: int | None = None) -> list[Point]:
    """Loss of a part at each judgement as a change from the base's, in per cent."""
    base = run.heldout.get("base", {}).get(part)
    found = []
    for row in run.heldout.get("history", []):
        if part not in row or base is None:
            continue
        now = row[part]["loss"] if level is None else row[part]["by_level"][level]
        zero = base["loss"] if level is None else base["by_level"][level]
        if zero:
            found.append((float(row["step"]), 100 * (now / zero - 1)))
    return found


def _gap(run: "RunFiles") -> str:
    """Held-out minus training loss; the base has such a gap too, since the clips differ."""
    bases: Mapping[str, Any] = run.heldout.get("base", {})
    if len(bases) < 2:
        return ""
    points = [
        (float(row["step"]), row["heldout"]["loss"] - row["train"]["loss"]) for row in run.heldout.get("history", [])
    ]
    return line_chart(
        [Line("held-out minus training loss", points, "c-third")],
        title="Held-out gap",
        zero=(bases["heldout"]["loss"] - bases["train"]["loss"], "the base model's gap"),
        note="rising above the base's: clips are learnt by heart",
    )


def _training_loss(run: "RunFiles") -> str:
    loss = run.curve("train/loss")
    mean: Sequence[Point] = smoothed(loss, max(1, len(loss) // 20))
    return line_chart(
        [Line("", loss, "c-train", faint=True), Line("running mean", mean, "c-train")],
        title="Training loss",
        note="jumps with the noise levels it draws; the fixed losses are the ones to trust",
    )


def _legend() -> str:
    keys = "".join(f'<span><i class="{colour}"></i>{name}</span>' for name, colour in PARTS.values())
    return f'<div class="legend">{keys}<span><i class="c-base dashed"></i>base model</span></div>'


def _gain(row: Mapping[str, Any]) -> float:
    return float(row["adapter"] / row["base"] - 1) if row["base"] else 0.0
