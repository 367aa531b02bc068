"""Charts show values where they are, with ticks that can be told apart."""

import re

import pytest

from sa3train.reports.charts import Line, compute_ticks, render_line_chart, smooth_points, thin_points


def test_curves_lie_where_the_values_are() -> None:
    svg = render_line_chart(
        [Line("a < b", [(0, 1.0), (10, 3.0)], "c-train")], title="T", baseline=(2.0, "base"), unit=" %"
    )
    (start, end) = re.search(r'class="curve c-train" d="M([\d. ]+)L([\d. ]+)"', svg).groups()  # type: ignore[union-attr]
    level = re.search(r'class="curve c-base dashed" d="M[\d.]+ ([\d.]+)H', svg)
    assert level is not None
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split())) for pair in (start, end))
    assert x0 < x1
    assert y0 > float(level[1]) > y1
    assert float(level[1]) == pytest.approx((y0 + y1) / 2, abs=0.11)
    assert "a &lt; b" in svg
    assert render_line_chart([Line("a", [], "c-train")], title="T") == ""


def test_ticks_are_round() -> None:
    assert compute_ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert compute_ticks(-43.0, 2.0) == pytest.approx([-40.0, -30.0, -20.0, -10.0, 0.0])
    assert compute_ticks(0.0008, 0.0021) == pytest.approx([0.001, 0.0015, 0.002])


@pytest.mark.parametrize("values", [(-33.4, -36.1), (0.00095, 0.00105), (1, 123456789), (0.1, 0.1)])
@pytest.mark.parametrize("x_label", ["step", "round trips"])
def test_labels_are_inside_the_picture(values: tuple[float, float], x_label: str) -> None:
    svg = render_line_chart(
        [Line("a", list(enumerate(values)), "c-train")], title="T", unit=" dB", x_label=x_label, min_range=3e-6
    )
    labels = re.findall(r'x="([\d.]+)"[^>]*text-anchor="end">([^<]+)<', svg)
    assert len(labels) > 2, "two ticks at least, and the name of the x axis"
    assert all(float(x) >= 5.5 * len(label) for x, label in labels)


@pytest.mark.parametrize(("low", "high"), [(0.4884, 0.4892), (0.0029, 0.0031), (9e-5, 1.1e-4), (-45, 0), (1e4, 1.3e4)])
def test_tick_labels_tell_the_ticks_apart(low: float, high: float) -> None:
    svg = render_line_chart([Line("a", [(0, low), (1, high)], "c-train")], title="T")
    labels = re.findall(r'text-anchor="end">([-\d.,e]+)<', svg)
    assert len(labels) >= 2
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 8


def test_small_changes_look_small() -> None:
    def height(min_range: float) -> float:
        svg = render_line_chart([Line("a", [(0, 1.0), (1, 1.1)], "c-train")], title="T", min_range=min_range)
        found = re.search(r'c-train" d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"', svg)
        assert found is not None
        return float(found[1]) - float(found[2])

    assert height(1.0) == pytest.approx(height(0.0) * 0.112, rel=0.02)


def test_values_that_differ_by_rounding_are_a_level_line() -> None:
    svg = render_line_chart([Line("a", [(0, 0.3193495728)], "c-train")], title="T", baseline=(0.3193495725, "base"))
    labels = re.findall(r'text-anchor="end">([-\d.,e]+)<', svg)
    assert labels == ["0.31", "0.32", "0.33"]


def test_long_curves_are_thinned_and_keep_their_ends_and_mean() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    thin = thin_points([*points, (10_000.0, float("nan"))])
    assert len(thin) == 400
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert sum(y for _, y in thin) / 400 == pytest.approx(3.0, abs=0.1)
    assert smooth_points([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]


def test_a_single_step_has_no_fractions_of_steps() -> None:
    svg = render_line_chart([Line("a", [(150, 1.0)], "c-train")], title="T")
    assert re.findall(r'text-anchor="middle">([^<]+)<', svg) == ["150"]
