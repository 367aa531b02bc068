"""The demos of a run as players and spectrograms inside the page: same prompt, same seed, base beside adapter.

Sounds are embedded as FLAC, sample for sample what the run folder holds; spectrograms of one row share one scale, so
that a louder sound looks brighter. Shapes: C channels, N samples, M mel bands, T frames.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa3train.reports.charts import Line, line_chart
from sa3train.reports.html import folded

if TYPE_CHECKING:
    from sa3train.reports.run_files import Played

EMBEDDED_MIB = 48.0
"""Sounds beyond this are named by their file instead: a page should still open."""
PICTURE_SIZE = (720, 96)
RANGE_DB = 80.0
COLOURS = ("c-base", "c-third", "c-heldout", "c-train", "c-fourth")
MEASURES = {
    "loudness_lufs": ("Loudness", "LUFS", 3.0),
    "true_peak_db": ("True peak", "dBTP", 3.0),
    "spectral_centroid_hz": ("Spectral centroid", "Hz", 500.0),
    "stereo_width": ("Stereo width", "0 mono to 1 opposite phases", 0.1),
}
"""Of each measure its title, its unit, and the least range that its chart shows: about what one hears."""


@dataclass
class Budget:
    """How many bytes of sound and picture may still go into the page; `left_out` are the files that did not."""

    left: float = EMBEDDED_MIB * 2**20
    left_out: list[str] = field(default_factory=list)


def listening(run_dir: Path, played: Sequence["Played"], budget: Budget) -> str:
    """HTML of all demos, the newest step first; earlier steps are folded away."""
    if not played:
        return ""
    steps = sorted({entry.step for entry in played})
    newest = steps[-1]
    baseline = {(entry.model, entry.demo): entry for entry in played if entry.step == 0}
    body = [
        _step(run_dir, newest, [entry for entry in played if entry.step == newest], baseline, budget),
        *(
            folded(f"Step {step}", _step(run_dir, step, [entry for entry in played if entry.step == step], {}, budget))
            for step in reversed(steps[:-1])
            if step != 0
        ),
    ]
    if budget.left_out:
        names = "".join(f"<li>{escape(name)}" for name in budget.left_out)
        body.append(folded(f"{len(budget.left_out)} older sounds are in the run folder only", f"<ul>{names}</ul>"))
    return "".join(body) + measure_curves(played)


def measure_curves(played: Sequence["Played"]) -> str:
    """One small chart per measure and model: means over demos against steps, a curve per strength."""
    steps = sorted({entry.step for entry in played})
    if len(steps) < 2:
        return ""
    charts = []
    for model in dict.fromkeys(entry.model for entry in played):
        own = [entry for entry in played if entry.model == model]
        strengths = sorted({entry.strength for entry in own if entry.strength != 0})
        for measure, (title, unit, span) in MEASURES.items():
            base = _mean([entry for entry in own if entry.strength == 0], measure)
            lines = [
                Line(f"strength {strength:g}", _curve(own, steps, strength, measure), COLOURS[1 + number % 4])
                for number, strength in enumerate(strengths)
            ]
            zero = None if base is None else (base, "base")
            charts.append(
                line_chart(lines, title=f"{title}, {model}", zero=zero, note=f"{unit}, mean over demos", span=span)
            )
    return f'<h3>How it measures</h3><div class="charts">{"".join(charts)}</div>'


def _step(
    run_dir: Path,
    step: int,
    played: Sequence["Played"],
    baseline: dict[tuple[str, str], "Played"],
    budget: Budget,
) -> str:
    found = [f"<h3>Step {step}</h3>"]
    for demo in dict.fromkeys(entry.demo for entry in played):
        own = [entry for entry in played if entry.demo == demo]
        mode = " · the middle third is generated anew" if own[0].mode == "inpaint" else ""
        found.append(
            f'<div class="card"><h3>{escape(own[0].prompt) or "(no prompt)"}</h3>'
            f'<p class="soft">{escape(demo)} · seed {own[0].seed}{mode}</p>'
        )
        for model in dict.fromkeys(entry.model for entry in own):
            row = [entry for entry in own if entry.model == model]
            base = baseline.get((model, demo))
            takes = [base, *row] if base is not None and base.step != step else row
            found.append(_row(run_dir, model, takes, budget))
        found.append("</div>")
    return "".join(found)


def _row(run_dir: Path, model: str, takes: Sequence["Played"], budget: Budget) -> str:
    sounds = {take.file: _sound(run_dir / take.file) for take in takes}
    mels = {name: _mel(*sound) for name, sound in sounds.items() if sound is not None}
    loudest = max((float(mel_MT.max()) for mel_MT in mels.values()), default=0.0)
    cells = "".join(_take(take, sounds[take.file], mels.get(take.file), loudest, budget) for take in takes)
    return f'<small>{escape(model)}</small><div class="takes">{cells}</div>'


def _take(
    take: "Played",
    sound: tuple[np.ndarray, int] | None,
    mel_MT: np.ndarray | None,
    loudest: float,
    budget: Budget,
) -> str:
    name = "base model" if take.strength == 0 else f"adapter at strength {take.strength:g}"
    head = f'<div class="take" data-group="{escape(f"{take.model} {take.demo}")}"><b>{name}</b>'
    facts = f"<small>{escape(_facts(take))}</small></div>"
    if sound is None or mel_MT is None:
        return f"{head}<p class=bad>{escape(take.file)} is missing or damaged</p>{facts}"
    flac, picture = _flac(*sound), _picture(mel_MT, loudest)
    if len(flac) + len(picture) > budget.left:
        budget.left_out.append(take.file)
        return f"{head}<p class=soft>{escape(take.file)}</p>{facts}"
    budget.left -= len(flac) + len(picture)
    return (
        f'{head}<div class="picture"><img alt="mel spectrogram, {escape(name)}" '
        f'src="data:image/webp;base64,{_text(picture)}"><i></i></div>'
        f'<audio controls preload="metadata" src="data:audio/flac;base64,{_text(flac)}"></audio>{facts}'
    )


def _facts(take: "Played") -> str:
    names = {"loudness_lufs": "{:.1f} LUFS", "true_peak_db": "{:.1f} dBTP", "spectral_centroid_hz": "{:.0f} Hz",
             "stereo_width": "width {:.2f}", "clipped_share": "{:.1%} clipped"}  # fmt: skip
    shown = {key: take.measures.get(key) for key in names}
    shown["clipped_share"] = shown["clipped_share"] or None
    return " · ".join(names[key].format(value) for key, value in shown.items() if value is not None)


def _curve(
    played: Sequence["Played"], steps: Sequence[int], strength: float, measure: str
) -> list[tuple[float, float]]:
    values = [
        (float(step), _mean([e for e in played if e.step == step and e.strength == strength], measure))
        for step in steps
    ]
    return [(step, value) for step, value in values if value is not None]


def _mean(played: Sequence["Played"], measure: str) -> float | None:
    values = [value for entry in played if (value := entry.measures.get(measure)) is not None]
    return sum(values) / len(values) if values else None


def _sound(path: Path) -> tuple[np.ndarray, int] | None:
    """Samples (N, C) int16 and the rate, or None when there is no such sound."""
    import soundfile

    try:
        samples_NC, rate = soundfile.read(path, dtype="int16", always_2d=True)
    except (OSError, soundfile.LibsndfileError):
        return None
    return (samples_NC, int(rate)) if len(samples_NC) else None


def _flac(samples_NC: np.ndarray, rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples_NC, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _mel(samples_NC: np.ndarray, rate: int) -> np.ndarray:
    import torch

    from sa3train.audio.metrics import mel_spectrogram

    audio_CN = torch.from_numpy(samples_NC.T.astype(np.float32) / 32768)
    return mel_spectrogram(audio_CN, rate).numpy()


def _picture(mel_MT: np.ndarray, loudest: float) -> bytes:
    """The spectrogram alone, low notes below, from `loudest` dB down to 80 dB under it."""
    from matplotlib import colormaps
    from PIL import Image

    level_MT = np.clip((mel_MT[::-1] - loudest) / RANGE_DB + 1, 0, 1)
    rgb_MT3 = (colormaps["magma"](level_MT)[..., :3] * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb_MT3).resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(file, "WEBP", quality=80)
    return file.getvalue()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
