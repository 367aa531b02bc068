"""Parts of HTML pages, for reports and the studio. Templates, style and script of reports are in `assets/`.

Arguments called HTML are inserted as they are; everything else is text and is escaped.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from sa3train.reports.loss_change import LossChange
from sa3train.reports.run_files import DemoFile

GIB, MIB = 2**30, 2**20
MEASURE_FORMATS = {
    "loudness_lufs": "{:.1f} LUFS",
    "true_peak_db": "{:.1f} dBTP",
    "spectral_centroid_hz": "{:.0f} Hz",
    "stereo_width": "width {:.2f}",
    "clipped_share": "{:.1%} clipped",
}


def format_duration(seconds: float) -> str:
    """Format a duration with one unit.

    Args:
        seconds: The duration.

    Returns:
        Text such as "90 s", "12 min" or "3.5 h".
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_bytes(count: int) -> str:
    """Format a size in memory.

    Args:
        count: Bytes.

    Returns:
        Text such as "1.50 GiB" or "12.0 MiB".
    """
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / MIB:.1f} MiB"


def format_measures(demo: DemoFile) -> str:
    """Format how a demo measures.

    Args:
        demo: The demo.

    Returns:
        Text such as "-14.0 LUFS · 400 Hz".
    """
    values = {name: demo.measures.get(name) for name in MEASURE_FORMATS}
    if (values["clipped_share"] or 0) < 0.0005:  # 0.0%
        values["clipped_share"] = None
    return " · ".join(MEASURE_FORMATS[name].format(value) for name, value in values.items() if value is not None)


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.filters |= {"duration": format_duration, "measures": format_measures, "px": "{:.1f}".format}


def render_template(template: str, **values: Any) -> str:
    """Render a template of `assets/`, which escapes text.

    Args:
        template: File name of the template.
        **values: What it uses.

    Returns:
        HTML.
    """
    return _templates.get_template(template).render(**values).strip()


def render_tile(value: str, label: str, mood: str = "") -> str:
    """Render a key figure.

    Args:
        value: The figure.
        label: What it is.
        mood: `good`, `bad` or nothing.

    Returns:
        HTML.
    """
    return f'<div class="tile"><b class="{mood}">{escape(value)}</b><span>{escape(label)}</span></div>'


def render_change_tile(change: LossChange | None, label: str) -> str:
    """Render a relative change of a loss as a key figure.

    Args:
        change: The change, or None; only a significant one is good or bad.
        label: What it is.

    Returns:
        HTML; empty for None.
    """
    if change is None:
        return ""
    label = f"{label} ({change.describe_sample()})"
    mood = "good" if change.change < 0 else "bad"
    return render_tile(change.format(), label, mood if change.is_significant else "")


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Render a table.

    Args:
        head: Names of the columns.
        rows: Cells of each row, as HTML.
        numbers: Indices of the columns to align as numbers.

    Returns:
        HTML.
    """
    return render_template("table.html", head=head, rows=rows, numbers=numbers)


def render_facts(rows: Sequence[tuple[str, str]]) -> str:
    """Render names and values as a table.

    Args:
        rows: (name, value) of each, as text.

    Returns:
        HTML.
    """
    lines = "".join(f"<tr><th scope=row>{escape(name)}<td>{escape(value)}" for name, value in rows)
    return f"<table>{lines}</table>"


def render_details(title: str, body: str) -> str:
    """Render HTML that opens on a click.

    Args:
        title: Text to click.
        body: HTML.

    Returns:
        HTML.
    """
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
