"""The page of an evaluation: what to use, all figures, and every clip to listen to, in one file."""

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from torch import Tensor

from sa3train.core.files import write_text
from sa3train.evaluation.evaluate import BASE, REAL
from sa3train.evaluation.results import AUDIO_MEASURES, Candidate, Evaluation, GeneratedClip, Measurement
from sa3train.reports.audio import MEASURES, Media, Sound, SoundEmbedder
from sa3train.reports.charts import Line, render_line_chart
from sa3train.reports.curves import BASELINE
from sa3train.reports.html import render_facts, render_table, render_template
from sa3train.reports.loss_change import LossChange
from sa3train.reports.run_files import ORIGINAL, DemoFile
from sa3train.reports.run_report import POLICY

COLORS = ("c-heldout", "c-train", "c-third", "c-fourth")
SIGNS = {"nearest": "{:.3f}", "loudness_lufs": "{:.1f} LUFS", "stereo_width": "{:.3f}", "true_peak_db": "{:.1f} dBTP",
         "spectral_centroid_hz": "{:.0f} Hz", "clipped_share": "{:.1%}"}  # fmt: skip


class PageWriter:
    """Keeps the clips of an evaluation, and writes its page.

    Args:
        path: The file to write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._sounds: dict[tuple[int, int], np.ndarray] = {}

    def keep(self, candidate: int, prompt: int, audio_CN: Tensor) -> None:
        """Keep a clip, see `KeepAudio`.

        Args:
            candidate: Number of the candidate, `BASE` or `REAL`.
            prompt: Number of the prompt.
            audio_CN: The audio.
        """
        self._sounds[candidate, prompt] = (audio_CN.T.clamp(-1, 1) * 32767).round().short().numpy()

    def write(self, found: Evaluation, sample_rate: int = 44100) -> None:
        """Write the page.

        Args:
            found: The evaluation.
            sample_rate: Sample rate of the clips in Hz.
        """
        embedder = SoundEmbedder()
        cards = [self._arrange_card(found, number, embedder, sample_rate) for number in range(len(found.prompts))]
        page = render_template(
            "evaluation.html",
            found=found,
            policy=POLICY,
            pick=found.describe_pick(),
            table=_render_figures(found),
            drift=_render_drift(found) if found.prompts else "",
            charts=_render_charts(found),
            cards=cards,
            left_out=embedder.left_out,
            settings=render_facts([(name, str(value)) for name, value in found.settings.items()]),
        )
        write_text(self.path, page)

    def _arrange_card(
        self, found: Evaluation, number: int, embedder: SoundEmbedder, sample_rate: int
    ) -> tuple[DemoFile, list[tuple[str, list[tuple[DemoFile, Media]]]]]:
        prompt = found.prompts[number]

        def make_demo(model: str, strength: float, clip: GeneratedClip, candidate: int) -> DemoFile:
            name = f"{prompt['key']}, {model}, strength {strength:g}"
            return DemoFile(
                name, "", prompt["key"], "text", prompt["prompt"], model, strength, prompt["seed"], candidate,
                dict(clip.audio),
            )  # fmt: skip

        rows = {"": [make_demo(ORIGINAL, 0.0, found.real.generated[number], REAL),
                     make_demo("base", 0.0, found.base.generated[number], BASE)]}  # fmt: skip
        for candidate, each in enumerate(found.candidates):
            demo = make_demo(each.adapter, each.strength, each.measurement.generated[number], candidate)
            rows.setdefault(each.adapter, []).append(demo)
        every = [demo for row in rows.values() for demo in row]
        sounds: list[Sound | None] = [
            None if (samples := self._sounds.get((demo.step, number))) is None else (samples, sample_rate)
            for demo in every
        ]
        media = dict(zip((id(demo) for demo in every), embedder.embed(sounds, [d.file for d in every]), strict=True))
        return every[0], [
            (found.names.get(title, title), [(demo, media[id(demo)]) for demo in row]) for title, row in rows.items()
        ]


def format_frechet(measured: Measurement, base: Measurement) -> str:
    """Format a Fréchet distance.

    Args:
        measured: What it is of.
        base: The base's.

    Returns:
        Such as "20.1 (-3.2 ±1.1)", with the difference from the base's unless it is that; empty where there is none.
    """
    if measured.frechet is None:
        return ""
    found = None if measured is base else measured.compare_frechet(base)
    margin = "" if found is None or found.margin is None else f" ±{found.margin:.1f}"
    return f"{measured.frechet:.1f}" + (f" ({found.difference:+.1f}{margin})" if found else "")


def format_memorization(measured: Measurement, base: Measurement) -> str:
    """Format a memorization score with what it says.

    Args:
        measured: What was measured.
        base: What was measured of the base.

    Returns:
        Such as "0.21 (copies)"; empty where there is none.
    """
    if measured.memorization is None:
        return ""
    verdict = measured.judge_copying(base)
    return f"{measured.memorization.score:.2f}" + (f" ({verdict})" if verdict else "")


def _render_figures(found: Evaluation) -> str:
    rulers = list(found.settings["rulers"])
    head = ["adapter", "strength", "loss", "against base", "Fréchet", "nearest", "memorization", *rulers]
    rows = [["base", "", f"{np.mean(found.base.loss_by_clip):.4f}", ""]]
    rows += [
        [escape(found.names[each.adapter]), f"{each.strength:g}", f"{np.mean(each.measurement.loss_by_clip):.4f}",
         _render_change(each.loss_change)]
        for each in found.candidates
    ]  # fmt: skip
    for row, each in zip(rows, (found.base, *(each.measurement for each in found.candidates)), strict=True):
        row += [format_frechet(each, found.base), _format(each.average("nearest"), "nearest")]
        row += [format_memorization(each, found.base), *(_format(each.average(n), n) for n in rulers)]
        if found.picked is not None and each is found.picked.measurement:
            row[:] = [f"<b>{cell}</b>" for cell in row]
    return render_table(head, rows, range(1, len(head)))


def _render_drift(found: Evaluation) -> str:
    """Level, spectrum and stereo of held-out clips and base, and by how much each candidate differs from the base."""
    head = ["", "strength", *(MEASURES[name][0] if name in MEASURES else "Clipped" for name in AUDIO_MEASURES)]
    rows = [
        [title, "", *(_format(each.average(name), name) for name in AUDIO_MEASURES)]
        for title, each in (("held-out clips", found.real), ("base", found.base))
    ]
    rows += [
        [
            escape(found.names[each.adapter]),
            f"{each.strength:g}",
            *(_render_difference(each, name) for name in AUDIO_MEASURES),
        ]
        for each in found.candidates
    ]
    return render_table(head, rows, range(1, len(head)))


def _render_charts(found: Evaluation) -> str:
    """The change of the loss by step and strength, and by noise level for the best candidates."""
    charts = ""
    for x_label, lines in (("step", _list_steps(found.candidates)), ("strength", _list_strengths(found))):
        if any(len(line.points) > 1 for line in lines):
            charts += render_line_chart(
                lines, title=f"Held-out loss by {x_label}", x_label=x_label, unit="%", baseline=BASELINE,
                note="against the base", min_range=2.0,
            )  # fmt: skip
    best = sorted(found.candidates, key=lambda each: each.loss_change.change)[: len(COLORS)]
    levels = [
        Line(found.label(each),
             [(t, 100 * c.change) for t, c in zip(found.levels, each.loss_change_by_level, strict=True)], color)
        for each, color in zip(best, COLORS, strict=False)
    ]  # fmt: skip
    return charts + render_line_chart(
        levels, title="Held-out loss by noise level", x_label="t", unit="%", baseline=BASELINE, note="against the base",
        min_range=2.0,
    )  # fmt: skip


def _list_steps(candidates: Sequence[Candidate]) -> list[Line]:
    """A line for each strength over the steps of a run's checkpoints."""
    known = [each for each in candidates if each.step is not None and "@" in each.adapter]
    strengths = sorted({each.strength for each in known})
    if len({each.adapter.rpartition("@")[0] for each in known}) != 1:
        return []
    return [
        Line(f"strength {strength:g}", _list_points((e.step, e) for e in known if e.strength == strength), color)
        for strength, color in zip(strengths, COLORS * len(strengths), strict=False)
    ]


def _list_strengths(found: Evaluation) -> list[Line]:
    """A line for each adapter over its strengths, from the base at 0."""
    adapters: dict[str, list[Candidate]] = {}
    for each in found.candidates:
        adapters.setdefault(each.adapter, []).append(each)
    return [
        Line(found.names[path], [(0.0, 0.0), *_list_points((each.strength, each) for each in own)], color)
        for (path, own), color in zip(adapters.items(), COLORS, strict=False)
    ]


def _list_points(pairs: Iterable[tuple[float | None, Candidate]]) -> list[tuple[float, float]]:
    return sorted((float(x), 100 * each.loss_change.change) for x, each in pairs if x is not None)


def _render_change(change: LossChange) -> str:
    mood = ("good" if change.change < 0 else "bad") if change.is_significant else ""
    margin = "" if change.margin is None else f" ±{change.margin:.1%}"
    return f'<span class="{mood}">{change.format()}</span>{margin}'


def _render_difference(candidate: Candidate, name: str) -> str:
    found = candidate.compare(name)
    if found is None:
        return ""
    text = SIGNS[name].format(found.difference)
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("-")  # what reads 0 has no sign
    elif found.difference > 0:
        text = f"+{text}"
    return f"<b>{text}</b>" if found.is_significant else text


def _format(value: float | None, name: str) -> str:
    return "" if value is None else SIGNS.get(name, "{:.3f}").format(value)
