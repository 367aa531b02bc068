"""Line charts and bars as inline SVG and HTML: no script, no font, no file beside the page.

Colours are CSS classes (`c-heldout`, `c-train`, …) that the page defines for light and dark.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

MOST_POINTS = 400
MOST_DOTS = 30
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46.0, 12.0, 10.0, 26.0


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its (x, y) points, its colour's class; `faint` for raw data behind a mean."""

    name: str
    points: Sequence[Point]
    colour: str
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Frame:
    """Where values are on the picture: ranges of x and y, and its size in CSS pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    size: tuple[float, float]

    def at(self, point: Point) -> Point:
        """Pixel of a value."""
        width = self.size[0] - MARGIN_LEFT - MARGIN_RIGHT
        height = self.size[1] - MARGIN_TOP - MARGIN_BOTTOM
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return MARGIN_LEFT + across * width, MARGIN_TOP + (1 - up) * height


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    unit: str = "",
    zero: tuple[float, str] | None = None,
    size: tuple[float, float] = (460.0, 230.0),
    note: str = "",
    span: float = 0.0,
) -> str:
    """A figure with curves, ticks, a legend, and `zero`: a level to compare with and its name. Nothing without points.

    `x_label` is a word under the y axis, `unit` follows the tick values of y, `note` is a sentence below the title.
    `span` is the least range of y, so that small changes look small.
    """
    shown = [Line(line.name, thinned(line.points), line.colour, line.dashed, line.faint) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    frame = _frame([point for line in shown for point in line.points], zero, span, size)
    drawn = "".join(_curve(line, frame) for line in sorted(shown, key=lambda line: not line.faint))
    level = "" if zero is None else _level(zero, frame)
    key = [(line.name, line.colour, line.dashed) for line in shown if line.name]
    key += [(zero[1], "c-base", True)] if zero is not None else []
    key = key if len(key) > 1 else []
    legend = "".join(
        f'<span><i class="{colour}{" dashed" if dashed else ""}"></i>{escape(name)}</span>'
        for name, colour, dashed in key
    )
    below = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{below}</figcaption>'
        f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(title)}">'
        f"{_axes(frame, x_label, unit)}{level}{drawn}</svg>"
        f'<div class="legend">{legend}</div></figure>'
    )


def bars(rows: Sequence[tuple[str, float, str]], colour: str = "c-heldout") -> str:
    """Horizontal bars from (label, value of at least 0, text of the value), the longest filling the width."""
    most = max((value for _, value, _ in rows if math.isfinite(value)), default=0.0) or 1.0
    lines = "".join(
        f'<tr><th>{escape(label)}<td class="bar"><i class="{colour}" style="width:{100 * _share(value, most):.1f}%">'
        f'</i><td class="n">{escape(text)}'
        for label, value, text in rows
    )
    return f'<table class="bars">{lines}</table>'


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of its neighbours; the first and the last stay as they are."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= most:
        return finite
    inner, groups = finite[1:-1], most - 2
    edges = [round(number * len(inner) / groups) for number in range(groups + 1)]
    means = [_mean(inner[start:end]) for start, end in itertools.pairwise(edges)]
    return [finite[0], *means, finite[-1]]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The running mean of y over up to `window` points ending at each."""
    total, found = 0.0, []
    for number, (x, y) in enumerate(points):
        total += y - (points[number - window][1] if number >= window else 0.0)
        found.append((x, total / min(number + 1, window)))
    return found


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(points: Sequence[Point], zero: tuple[float, str] | None, span: float, size: tuple[float, float]) -> Frame:
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + ([zero[0]] if zero is not None else [])
    low, high = min(ys), max(ys)
    pad = max(0.06 * (high - low), (span - (high - low)) / 2) or 0.05 * abs(high) or 1.0
    left, right = min(xs), max(xs)
    return Frame((left, right if right > left else left + 1.0), (low - pad, high + pad), size)


def _axes(frame: Frame, x_label: str, unit: str) -> str:
    left, bottom = frame.at((frame.x[0], frame.y[0]))
    right = frame.size[0] - MARGIN_RIGHT
    found = []
    heights = ticks(*frame.y)
    for value in heights:
        y = frame.at((frame.x[0], value))[1]
        found.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        found.append(
            f'<text x="{left - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{_number(value, heights)}{unit}</text>'
        )
    for value in ticks(*frame.x):
        x = frame.at((value, frame.y[0]))[0]
        found.append(f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{value:.6g}</text>')
    found.append(f'<text class="label" x="{left - 14:.1f}" y="{bottom + 15:.1f}" text-anchor="end">{x_label}</text>')
    return "".join(found)


def _number(value: float, among: Sequence[float]) -> str:
    """A tick's value with as many digits as it takes to tell the ticks apart."""
    if len(among) < 2:
        return f"{value:.4g}"
    order = math.floor(math.log10(among[1] - among[0]) + 1e-9)
    if order >= -3:
        return f"{value:,.{max(0, -order)}f}"
    largest = math.floor(math.log10(max(abs(tick) for tick in among)) + 1e-9)
    return f"{value:.{largest - order + 1}g}"


def _curve(line: Line, frame: Frame) -> str:
    pixels = [frame.at(point) for point in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
    style = f"{line.colour}{' dashed' if line.dashed else ''}{' faint' if line.faint else ''}"
    found = f'<path class="curve {style}" d="{path}"/>'
    if line.faint or len(pixels) > MOST_DOTS:
        return found
    dots = "".join(
        f'<circle class="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.4">'
        f"<title>{escape(line.name)}: {value[1]:.5g} at {value[0]:g}</title></circle>"
        for (x, y), value in zip(pixels, line.points, strict=True)
    )
    return found + dots


def _level(zero: tuple[float, str], frame: Frame) -> str:
    left, y = frame.at((frame.x[0], zero[0]))
    title = f"<title>{escape(zero[1])}: {zero[0]:.5g}</title>"
    return (
        f'<path class="curve c-base dashed" d="M{left:.1f} {y:.1f}H{frame.size[0] - MARGIN_RIGHT:.1f}">{title}</path>'
    )


def _share(value: float, most: float) -> float:
    return min(1.0, max(0.0, value / most)) if math.isfinite(value) else 1.0


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
