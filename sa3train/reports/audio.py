"""The demos of a run as players and spectrograms inside the report: same prompt, same seed, base next to adapter.

Sounds are embedded as FLAC, sample for sample what the run folder holds; the spectrograms of one row share one scale,
so that a louder sound looks brighter. Shapes: C channels, N samples, M mel bands, T frames.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sa3train.reports.charts import Line, render_line_chart
from sa3train.reports.html import MIB, render_details, render_template
from sa3train.reports.run_files import DemoFile

MAX_EMBEDDED_MIB = 48.0
"""Sounds beyond this size are listed by file name instead, so that the page opens quickly."""
PICTURE_SIZE = (720, 96)
RANGE_DB = 80.0
STRENGTH_COLORS = ("c-third", "c-heldout", "c-train", "c-fourth")
MEASURES = {
    "loudness_lufs": ("Loudness", "LUFS", 3.0),
    "true_peak_db": ("True peak", "dBTP", 3.0),
    "spectral_centroid_hz": ("Spectral centroid", "Hz", 500.0),
    "stereo_width": ("Stereo width", "0 is mono, 1 is opposite phases", 0.1),
}
"""Title, unit and smallest range of the chart of each measure; the range is about what one can hear."""


Sound = tuple[np.ndarray, int]
"""Samples (N, C) as int16, and the sample rate."""


class Media(NamedTuple):
    """Where the page finds a demo.

    Args:
        sound: Address of the sound.
        picture: Address of its spectrogram.
        problem: Why there is neither.
    """

    sound: str = ""
    picture: str = ""
    problem: str = ""


def embed_demos(run_dir: Path, demos: Sequence[DemoFile], max_mib: float = MAX_EMBEDDED_MIB) -> str:
    """Render all demos with their sounds embedded, and charts of how they measure.

    Args:
        run_dir: The run folder.
        demos: Its demos, oldest first.
        max_mib: Limit on the size of sounds and spectrograms in MiB; older ones are left out.

    Returns:
        HTML; empty without demos.
    """
    if not demos:
        return ""
    embedder = SoundEmbedder(max_mib)

    def embed_row(row: Sequence[DemoFile]) -> list[Media]:
        return embedder.embed([_read_sound(run_dir / demo.file) for demo in row], [demo.file for demo in row])

    body = render_demos(demos, embed_row, is_embedded=True)
    if embedder.left_out:
        names = "".join(f"<li>{escape(name)}" for name in embedder.left_out)
        body += render_details(f"{len(embedder.left_out)} older files are only in the run folder", f"<ul>{names}</ul>")
    return body + _render_measure_charts(demos)


class SoundEmbedder:
    """Embeds sounds and their spectrograms into a page, as far as there is room.

    Args:
        max_mib: Limit on the size of all in MiB.

    Attributes:
        left_out: Names of the sounds for which there was no room.
    """

    def __init__(self, max_mib: float = MAX_EMBEDDED_MIB) -> None:
        self._left, self.left_out = max_mib * MIB, list[str]()

    def embed(self, sounds: Sequence[Sound | None], names: Sequence[str]) -> list[Media]:
        """Embed sounds that are compared with each other: their spectrograms share one scale.

        Args:
            sounds: Samples (N, C) as int16 and sample rate of each; None for one that cannot be read.
            names: Their names.

        Returns:
            Where the page finds each.
        """
        mels = [None if sound is None else _compute_mel(*sound) for sound in sounds]
        loudest = max((float(mel_MT.max()) for mel_MT in mels if mel_MT is not None), default=0.0)
        found = []
        for name, sound, mel_MT in zip(names, sounds, mels, strict=True):
            if sound is None or mel_MT is None:
                found.append(Media(problem="is missing or damaged"))
                continue
            flac, picture = _encode_flac(*sound), _draw_picture(mel_MT, loudest)
            if len(flac) + len(picture) > self._left:
                self.left_out.append(name)
                found.append(Media(problem="does not fit into this page"))
                continue
            self._left -= len(flac) + len(picture)
            found.append(Media(_build_data_url("audio/flac", flac), _build_data_url("image/webp", picture)))
        return found


def render_demos(
    demos: Sequence[DemoFile],
    load_row: Callable[[Sequence[DemoFile]], Sequence[Media]],
    *,
    is_embedded: bool,
) -> str:
    """Render players of demos, the newest step first and earlier ones closed, base model and adapter side by side.

    Args:
        demos: Demos of a run, oldest first.
        load_row: Function that returns the media of demos that are compared with each other.
        is_embedded: Whether media are data in the page: pictures without axes, and each base demo only once.

    Returns:
        HTML; empty without demos.
    """
    steps = sorted({demo.step for demo in demos}, reverse=True)
    base = {(demo.model, demo.demo): demo for demo in demos if demo.step == 0}
    found = []
    for step in [step for step in steps if step] or steps:
        at_step = [demo for demo in demos if demo.step == step]
        has_base = step != 0 and (step == steps[0] or not is_embedded)
        found.append((step, _arrange_cards(at_step, base if has_base else {}, load_row)))
    return render_template("demos.html", steps=found, is_embedded=is_embedded)


def _arrange_cards(
    demos: Sequence[DemoFile],
    base: Mapping[tuple[str, str], DemoFile],
    load_row: Callable[[Sequence[DemoFile]], Sequence[Media]],
) -> list[tuple[DemoFile, list[Any]]]:
    """Return a card for each demo: its first entry, and (model, [(entry, media)]) of each model."""
    cards = []
    for name in dict.fromkeys(demo.demo for demo in demos):
        own = [demo for demo in demos if demo.demo == name]
        rows = []
        for model in dict.fromkeys(demo.model for demo in own):
            row = [base[model, name]] if (model, name) in base else []
            row += [demo for demo in own if demo.model == model]
            rows.append((model, list(zip(row, load_row(row), strict=True))))
        cards.append((own[0], rows))
    return cards


def _render_measure_charts(demos: Sequence[DemoFile]) -> str:
    """Render a chart per measure and model: means over demos against steps, a curve per strength."""
    steps = sorted({demo.step for demo in demos})
    if len(steps) < 2:
        return ""
    charts = []
    for model in dict.fromkeys(demo.model for demo in demos):
        own = [demo for demo in demos if demo.model == model]
        strengths = sorted({demo.strength for demo in own if demo.strength != 0})
        for measure, (title, unit, min_range) in MEASURES.items():
            base = _average([demo for demo in own if demo.strength == 0], measure)
            lines = [
                Line(
                    f"strength {strength:g}",
                    _get_curve([demo for demo in own if demo.strength == strength], measure),
                    STRENGTH_COLORS[number % len(STRENGTH_COLORS)],
                )
                for number, strength in enumerate(strengths)
            ]
            charts.append(
                render_line_chart(
                    lines,
                    title=f"{title}, {model}",
                    baseline=None if base is None else (base, "base"),
                    note=f"{unit}, mean over demos",
                    min_range=min_range,
                )
            )
    return f'<h3>Audio measurements</h3><div class="charts">{"".join(charts)}</div>'


def _get_curve(demos: Sequence[DemoFile], measure: str) -> list[tuple[float, float]]:
    steps = sorted({demo.step for demo in demos})
    values = [(float(step), _average([demo for demo in demos if demo.step == step], measure)) for step in steps]
    return [(step, value) for step, value in values if value is not None]


def _average(demos: Sequence[DemoFile], measure: str) -> float | None:
    values = [value for demo in demos if (value := demo.measures.get(measure)) is not None]
    return sum(values) / len(values) if values else None


def _read_sound(path: Path) -> Sound | None:
    """Read samples (N, C) as int16 and the sample rate; None when they cannot be read."""
    import soundfile

    try:
        samples_NC, rate = soundfile.read(path, dtype="int16", always_2d=True)
    except (OSError, soundfile.LibsndfileError):
        return None
    return (samples_NC, int(rate)) if len(samples_NC) else None


def _encode_flac(samples_NC: np.ndarray, rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples_NC, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _compute_mel(samples_NC: np.ndarray, rate: int) -> np.ndarray:
    import torch

    from sa3train.audio.metrics import compute_mel_spectrogram

    audio_CN = torch.from_numpy(samples_NC.T.astype(np.float32) / 32768)
    return compute_mel_spectrogram(audio_CN, rate).numpy()


def _draw_picture(mel_MT: np.ndarray, loudest: float) -> bytes:
    """Draw the spectrogram alone, low frequencies at the bottom, from `loudest` dB down to 80 dB below it."""
    from matplotlib import colormaps
    from PIL import Image

    level_MT = np.clip((mel_MT[::-1] - loudest) / RANGE_DB + 1, 0, 1)
    rgb_MT3 = (colormaps["magma"](level_MT)[..., :3] * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb_MT3).resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(file, "WEBP", quality=80)
    return file.getvalue()


def _build_data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
