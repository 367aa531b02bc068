"""Line charts and bars as inline SVG and HTML: no script, no font, no file next to the page. Markup is in `assets/`.

Colors are CSS classes (`c-heldout`, `c-train`, …) that the page defines for light and dark. Points have tooltips, which
is why these are not images by matplotlib.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sa3train.reports.html import render_template

Point = tuple[float, float]

MAX_POINTS = 400
MAX_DOTS = 30
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46.0, 20.0, 10.0, 26.0
LETTER_WIDTH = 6.7
"""Pixels that a letter of a label may take; the left margin grows with the labels."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: Its name in the legend; empty for none.
        points: Its (x, y) values.
        color: CSS class of its color.
        dashed: Draw it dashed.
        faint: Draw it faint and behind the others, as raw data behind a mean.
    """

    name: str
    points: Sequence[Point]
    color: str
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class _Frame:
    """Ranges of x and y, and the size of the picture in CSS pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    size: tuple[float, float]

    left: float = MARGIN_LEFT

    @property
    def right(self) -> float:
        return self.size[0] - MARGIN_RIGHT

    @property
    def bottom(self) -> float:
        return self.size[1] - MARGIN_BOTTOM

    def x_to_pixels(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def y_to_pixels(self, y: float) -> float:
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - MARGIN_TOP)


def render_line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    unit: str = "",
    baseline: tuple[float, str] | None = None,
    size: tuple[float, float] = (460.0, 230.0),
    note: str = "",
    min_range: float = 0.0,
) -> str:
    """Render a figure with curves, ticks and a legend.

    Args:
        lines: The curves.
        title: Title of the figure.
        x_label: Name of the x axis.
        unit: Text after each tick of the y axis.
        baseline: A level to compare with, and its name.
        size: Width and height in CSS pixels.
        note: A sentence below the title.
        min_range: Smallest range of the y axis, so that small changes look small.

    Returns:
        HTML; empty without points.
    """
    shown = [replace(line, points=thin_points(line.points)) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    frame = _fit_frame([point for line in shown for point in line.points], baseline, min_range, size)
    heights, widths = compute_ticks(*frame.y), compute_ticks(*frame.x)
    labels = [_format_tick(y, heights) for y in heights]
    longest = max(len(x_label) + 1, *(len(label + unit) for label in labels))
    frame = replace(frame, left=max(MARGIN_LEFT, LETTER_WIDTH * longest + 6))
    curves = []
    for line in sorted(shown, key=lambda line: not line.faint):
        pixels = [(frame.x_to_pixels(x), frame.y_to_pixels(y)) for x, y in line.points]
        curves.append((line, pixels, not line.faint and len(pixels) <= MAX_DOTS))
    if len(steps := {x for line in shown for x, _ in line.points}) == 1:
        widths = list(steps)
    elif all(float(x).is_integer() for x in frame.x):
        widths = [x for x in widths if float(x).is_integer()]  # there is no step 150.5
    keys = [line for line in shown if line.name]
    keys += [Line(baseline[1], (), "c-base", dashed=True)] if baseline is not None else []
    return render_template(
        "chart.html",
        frame=frame,
        title=title,
        note=note,
        unit=unit,
        x_label=x_label,
        x_ticks=[(frame.x_to_pixels(x), f"{x:.6g}") for x in widths],
        y_ticks=[(frame.y_to_pixels(y), label) for y, label in zip(heights, labels, strict=True)],
        baseline=baseline,
        level=None if baseline is None else frame.y_to_pixels(baseline[0]),
        curves=curves,
        keys=keys if len(keys) > 1 else [],
    )


def render_legend(lines: Sequence[Line]) -> str:
    """Render the legend of curves.

    Args:
        lines: The curves, of which name, color and dashes are shown.

    Returns:
        HTML.
    """
    return render_template("legend.html", keys=lines)


def render_bars(rows: Sequence[tuple[str, float, str]], color: str = "c-heldout") -> str:
    """Render horizontal bars, the longest of which fills the width.

    Args:
        rows: (label, value of at least 0, text of the value) of each.
        color: CSS class of their color.

    Returns:
        HTML.
    """
    largest = max((value for _, value, _ in rows if math.isfinite(value)), default=0.0) or 1.0
    shares = [min(1.0, max(0.0, value / largest)) if math.isfinite(value) else 1.0 for _, value, _ in rows]
    bars = [(label, 100 * share, text) for share, (label, _, text) in zip(shares, rows, strict=True)]
    return render_template("bars.html", rows=bars, color=color)


def thin_points(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Reduce a curve to a number of points by averaging neighbors; the first and the last stay as they are.

    Args:
        points: (x, y) values; those that are not finite are dropped.
        most: Largest number of points.

    Returns:
        The reduced curve.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= most:
        return finite
    inner, groups = finite[1:-1], most - 2
    edges = [round(number * len(inner) / groups) for number in range(groups + 1)]
    means = [_mean(inner[start:end]) for start, end in itertools.pairwise(edges)]
    return [finite[0], *means, finite[-1]]


def smooth_points(points: Sequence[Point], window: int) -> list[Point]:
    """Compute the running mean of a curve.

    Args:
        points: (x, y) values.
        window: How many points, ending at each, are averaged.

    Returns:
        The smoothed curve.
    """
    total, found = 0.0, []
    for number, (x, y) in enumerate(points):
        total += y - (points[number - window][1] if number >= window else 0.0)
        found.append((x, total / min(number + 1, window)))
    return found


def compute_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Compute round numbers in a range, two at least: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: Start of the range.
        high: End of the range.
        about: How many steps to divide it into, roughly.

    Returns:
        The numbers, in order.
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _fit_frame(
    points: Sequence[Point], baseline: tuple[float, str] | None, min_range: float, size: tuple[float, float]
) -> _Frame:
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + ([baseline[0]] if baseline is not None else [])
    low, high = min(ys), max(ys)
    if high - low < 1e-6 * abs(high):
        low = high  # equal but for rounding
    pad = max(0.06 * (high - low), (min_range - (high - low)) / 2) or 0.05 * abs(high) or 1.0
    left, right = min(xs), max(xs)
    return _Frame((left, right) if right > left else (left - 1.0, left + 1.0), (low - pad, high + pad), size)


def _format_tick(value: float, among: Sequence[float]) -> str:
    """Format a tick with as many digits as it takes to tell the ticks apart."""
    if len(among) < 2:
        return f"{value:.4g}"
    order = math.floor(math.log10(among[1] - among[0]) + 1e-9)
    if order >= -3:
        return f"{value:,.{max(0, -order)}f}"
    largest = math.floor(math.log10(max(abs(tick) for tick in among)) + 1e-9)
    return f"{value:.{largest - order + 1}g}"


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
