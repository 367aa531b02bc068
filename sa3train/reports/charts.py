"""Line charts and bars as inline SVG and HTML: no script, no font, no file next to the page.

Colors are CSS classes (`c-heldout`, `c-train`, …) that the page defines for light and dark. Points have tooltips, which
is why these are not images by matplotlib.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

Point = tuple[float, float]

MAX_POINTS = 400
MAX_DOTS = 30
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46.0, 12.0, 10.0, 26.0


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

    def to_pixels(self, point: Point) -> Point:
        width = self.size[0] - MARGIN_LEFT - MARGIN_RIGHT
        height = self.size[1] - MARGIN_TOP - MARGIN_BOTTOM
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return MARGIN_LEFT + across * width, MARGIN_TOP + (1 - up) * height


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
    curves = "".join(_draw_curve(line, frame) for line in sorted(shown, key=lambda line: not line.faint))
    level = "" if baseline is None else _draw_level(baseline, frame)
    keys = [line for line in shown if line.name]
    keys += [Line(baseline[1], (), "c-base", dashed=True)] if baseline is not None else []
    below = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{below}</figcaption>'
        f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(title)}">'
        f"{_draw_axes(frame, x_label, unit)}{level}{curves}</svg>"
        f"{render_legend(keys if len(keys) > 1 else [])}</figure>"
    )


def render_legend(lines: Sequence[Line]) -> str:
    """Render the legend of curves.

    Args:
        lines: The curves, of which name, color and dashes are shown.

    Returns:
        HTML.
    """
    keys = "".join(
        f'<span><i class="{line.color}{" dashed" if line.dashed else ""}"></i>{escape(line.name)}</span>'
        for line in lines
    )
    return f'<div class="legend">{keys}</div>'


def render_bars(rows: Sequence[tuple[str, float, str]], color: str = "c-heldout") -> str:
    """Render horizontal bars, the longest of which fills the width.

    Args:
        rows: (label, value of at least 0, text of the value) of each.
        color: CSS class of their color.

    Returns:
        HTML.
    """
    largest = max((value for _, value, _ in rows if math.isfinite(value)), default=0.0) or 1.0
    lines = "".join(
        f'<tr><th>{escape(label)}<td class="bar"><i class="{color}" style="width:{_to_percent(value, largest):.1f}%">'
        f'</i><td class="n">{escape(text)}'
        for label, value, text in rows
    )
    return f'<table class="bars">{lines}</table>'


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
    """Compute round numbers in a range: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: Start of the range.
        high: End of the range.
        about: How many steps to divide it into, roughly.

    Returns:
        The numbers, in order.
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _fit_frame(
    points: Sequence[Point], baseline: tuple[float, str] | None, min_range: float, size: tuple[float, float]
) -> _Frame:
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + ([baseline[0]] if baseline is not None else [])
    low, high = min(ys), max(ys)
    pad = max(0.06 * (high - low), (min_range - (high - low)) / 2) or 0.05 * abs(high) or 1.0
    left, right = min(xs), max(xs)
    return _Frame((left, right if right > left else left + 1.0), (low - pad, high + pad), size)


def _draw_axes(frame: _Frame, x_label: str, unit: str) -> str:
    left, bottom = frame.to_pixels((frame.x[0], frame.y[0]))
    right = frame.size[0] - MARGIN_RIGHT
    found = []
    heights = compute_ticks(*frame.y)
    for value in heights:
        y = frame.to_pixels((frame.x[0], value))[1]
        found.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        found.append(
            f'<text x="{left - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{_format_tick(value, heights)}{unit}</text>'
        )
    has_steps = all(float(x).is_integer() for x in frame.x)
    for value in compute_ticks(*frame.x):
        if has_steps and not float(value).is_integer():
            continue  # there is no step 150.5
        x = frame.to_pixels((value, frame.y[0]))[0]
        found.append(f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{value:.6g}</text>')
    found.append(f'<text class="label" x="{left - 14:.1f}" y="{bottom + 15:.1f}" text-anchor="end">{x_label}</text>')
    return "".join(found)


def _format_tick(value: float, among: Sequence[float]) -> str:
    """Format a tick with as many digits as it takes to tell the ticks apart."""
    if len(among) < 2:
        return f"{value:.4g}"
    order = math.floor(math.log10(among[1] - among[0]) + 1e-9)
    if order >= -3:
        return f"{value:,.{max(0, -order)}f}"
    largest = math.floor(math.log10(max(abs(tick) for tick in among)) + 1e-9)
    return f"{value:.{largest - order + 1}g}"


def _draw_curve(line: Line, frame: _Frame) -> str:
    pixels = [frame.to_pixels(point) for point in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
    style = f"{line.color}{' dashed' if line.dashed else ''}{' faint' if line.faint else ''}"
    found = f'<path class="curve {style}" d="{path}"/>'
    if line.faint or len(pixels) > MAX_DOTS:
        return found
    dots = "".join(
        f'<circle class="{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.4">'
        f"<title>{escape(line.name)}: {value[1]:.5g} at {value[0]:g}</title></circle>"
        for (x, y), value in zip(pixels, line.points, strict=True)
    )
    return found + dots


def _draw_level(baseline: tuple[float, str], frame: _Frame) -> str:
    left, y = frame.to_pixels((frame.x[0], baseline[0]))
    title = f"<title>{escape(baseline[1])}: {baseline[0]:.5g}</title>"
    return (
        f'<path class="curve c-base dashed" d="M{left:.1f} {y:.1f}H{frame.size[0] - MARGIN_RIGHT:.1f}">{title}</path>'
    )


def _to_percent(value: float, largest: float) -> float:
    return 100 * min(1.0, max(0.0, value / largest)) if math.isfinite(value) else 100.0


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
