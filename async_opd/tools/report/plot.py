"""Figures as geometry: paths in a box of 1000 by 100 that the page stretches, and labels at
percentages of it.

Lines keep their width and text its size at any width of the page: only the paths are stretched.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from async_opd.tools.report.figures import Figure, Series

WIDTH, HEIGHT = 1000.0, 100.0
TABLE_ROWS = 8


@dataclass
class Plot:
    """One figure over one horizontal axis, ready for the template."""

    axis: str  # "step" or "time"
    right: float  # end of the axis
    # per cent from the left, per cent of the label that lie left of that, label
    x_ticks: list[tuple[float, int, str]]
    y_ticks: list[tuple[float, str]]  # per cent from the bottom
    paths: list[tuple[str, str]]  # classes, d
    dots: list[tuple[str, float, float]]  # classes, per cent from the left and from the bottom
    marks: list[tuple[str, float]]  # kind, per cent from the left


def plot(figure: Figure, axis: str) -> Plot | None:
    """Draw the figure over that axis, or None where there is no such axis: older rows have no
    time."""
    xs = [series.step if axis == "step" else series.seconds for series in figure.series]
    right = figure.ends[axis == "time"]
    if not right > 0 or all(np.isnan(x).all() for x in xs):
        return None
    low, high = _range(figure)
    scale = Scale(right, low, high)
    paths: list[tuple[str, str]] = []
    dots: list[tuple[str, float, float]] = []
    below = np.zeros(len(xs[0]))  # upper edge of the band below, in a stack
    for series, x in zip(figure.series, xs, strict=True):
        look = f"{series.colour} d{series.dash}"
        if figure.stacked:
            paths.append((f"band {look}", scale.band(x, below, below + series.mean)))
            below = below + series.mean
        elif series.dots:
            dots += [
                (look, scale.left(a), scale.up(b)) for a, b in zip(x, series.mean, strict=True)
            ]
        else:
            if series.spread:
                paths.append((f"spread {look}", scale.band(x, *series.spread)))
            paths.append((f"line {look}", scale.line(x, series.mean)))
    return Plot(
        axis=axis,
        right=right,
        x_ticks=[
            _under(scale.left(t), duration(t) if axis == "time" else number(t))
            for t in ticks(0, right, 5)
        ],
        y_ticks=[
            (scale.up(t), f"{t:.0%}" if figure.unit == "share" else number(t))
            for t in ticks(low, high, 4)
        ],
        paths=paths,
        dots=dots,
        marks=[
            (kind, scale.left(step if axis == "step" else seconds))
            for kind, step, seconds in figure.marks or ()
        ],
    )


def _under(left: float, label: str) -> tuple[float, int, str]:
    """Put a label in the middle below its tick, unless it would stick out."""
    return left, 0 if left < 4 else 100 if left > 96 else 50, label


def read_out(figure: Figure) -> dict[str, Any]:
    """List what the page's script shows of the point under the pointer."""
    longest = max(figure.series, key=lambda series: len(series.step) * (not series.dots))
    return {
        "unit": figure.unit,
        "step": _rounded(longest.step),
        "time": _rounded(longest.seconds),
        "series": [
            {"label": s.label, "dots": s.dots, "step": _rounded(s.step), "values": _rounded(s.mean)}
            for s in figure.series
        ],
    }


def table(figure: Figure) -> tuple[list[str], list[list[str]]]:
    """Give the figure's alternative in text: a heading and at most TABLE_ROWS rows, evenly over
    it."""
    longest = max(figure.series, key=lambda series: len(series.step))
    places = np.unique(np.linspace(0, len(longest.step) - 1, TABLE_ROWS).round().astype(int))
    rows = [
        [number(step), *(number(_nearest(series, step), figure.unit) for series in figure.series)]
        for step in longest.step[places]
    ]
    return ["step", *(series.label for series in figure.series)], rows


def _nearest(series: Series, step: float) -> float:
    """Return the value at the point nearest to `step`; NaN where the series has none so far out,
    or not there."""
    place = int(np.abs(series.step - step).argmin())
    near = not series.dots or series.step[place] == step
    return float(series.mean[place]) if near and step <= series.step[-1] else math.nan


def _range(figure: Figure) -> tuple[float, float]:
    """Choose the ends of the vertical axis, 0 within; shares go to 1."""
    if figure.unit == "share":
        return 0.0, 1.0
    values = np.concatenate([x for s in figure.series for x in (s.mean, *(s.spread or ()))])
    low, high = min(0.0, float(np.nanmin(values))), max(0.0, float(np.nanmax(values)))
    return (low, high + (high - low) * 0.05) if high > low else (low, low + 1.0)


@dataclass(frozen=True)
class Scale:
    """The way from numbers to the box: both axes by their ends; the left one is 0."""

    right: float
    low: float
    high: float

    def left(self, x: float) -> float:
        """Place `x` in per cent from the left."""
        return round(100 * float(x) / self.right, 2)

    def up(self, y: float) -> float:
        """Place `y` in per cent from the bottom."""
        return round(100 * (float(y) - self.low) / (self.high - self.low), 2)

    def line(self, x: np.ndarray, y: np.ndarray) -> str:
        """Draw a path, broken where there is no number. A point alone is a line of no length, which
        has round ends."""
        known = ~(np.isnan(x) | np.isnan(y))
        parts = [
            ("L" if before else "M") + point
            for before, here, point in zip([False, *known], known, self._points(x, y), strict=False)
            if here
        ]
        return "".join(parts) + ("h0" if len(parts) == 1 else "")

    def band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
        """Draw the area between two curves."""
        known = ~(np.isnan(x) | np.isnan(low) | np.isnan(high))
        there = self._points(x[known], high[known])
        back = self._points(x[known], low[known])[::-1]
        return f"M{'L'.join(there + back)}Z" if there else ""

    def _points(self, x: np.ndarray, y: np.ndarray) -> list[str]:
        across = WIDTH * x / self.right
        down = HEIGHT * (1 - (y - self.low) / (self.high - self.low))
        return [f"{a:.5g},{b:.4g}" for a, b in zip(across, down, strict=True)]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Choose round numbers from `low` to `high`, some `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [
        round(k * step, 12)
        for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def number(x: float | None, unit: str = "") -> str:
    """Write a number in short, for people."""
    if x is None or math.isnan(x):
        return "–"
    if unit == "share":
        return f"{100 * x:.1f} %"
    if x == 0:
        return "0"
    if abs(x) >= 10000:
        size, suffix = next(s for s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(x) >= s[0])
        return f"{x / size:.3g}{suffix}"
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.1e}"


def duration(seconds: float) -> str:
    """Write seconds as 40 s, 12 min or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(x) else float(f"{x:.5g}") for x in values.tolist()]
