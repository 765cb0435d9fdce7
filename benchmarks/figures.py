"""Statistics and reports: alternating rounds, ratios, verdicts, Markdown tables, SVG charts."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from xml.sax.saxutils import escape

T = TypeVar("T")

# Size and margins of a chart in pixels.
WIDTH = 640
HEIGHT = 360
LEFT = 76
RIGHT = 32
TOP = 66
BOTTOM = 52
GRID_STEPS = 4
LINE_CLASSES = "ab"  # CSS classes of the first and second line
# The chart has its own background, because the color scheme of the surrounding page may differ
# from that of the system.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-size: 14px; font-weight: 600; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.back { fill: #ffffff; } .grid { stroke: #d8dee4; }
polyline { fill: none; stroke-width: 2; } polyline.b { stroke-dasharray: 6 3; }
polyline.a { stroke: #0969da; } circle.a { fill: #0969da; }
polyline.b { stroke: #bc4c00; } circle.b { fill: #bc4c00; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .back { fill: #0d1117; } .grid { stroke: #30363d; }
  polyline.a { stroke: #58a6ff; } circle.a { fill: #58a6ff; }
  polyline.b { stroke: #f0883e; } circle.b { fill: #f0883e; }
}
"""


@dataclass(frozen=True)
class Figure:
    """One row of a report: one value per round, and the targets for the median."""

    name: str
    values: Sequence[float]
    unit: str = "x"
    required: float | None = None
    goal: float | None = None
    lower_is_better: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def is_reached(self, target: float) -> bool:
        """Return True if the median is as good as the target or better."""
        return self.median <= target if self.lower_is_better else self.median >= target

    @property
    def verdict(self) -> str:
        """Return which of the targets is met."""
        if self.required is None:
            return "no target"
        if not self.is_reached(self.required):
            return "missed"
        if self.goal is None:
            return "met"
        return "goal met" if self.is_reached(self.goal) else "met, goal missed"

    def row(self) -> list[str]:
        """Return the cells of the table row, in the order of `COLUMNS`."""
        values = [number(value) for value in (self.median, min(self.values), max(self.values))]
        sign = "≤ " if self.lower_is_better else "≥ "
        targets = [
            "" if target is None else sign + number(target) for target in (self.required, self.goal)
        ]
        return [self.name, self.unit, *values, *targets, self.verdict]


COLUMNS = ["figure", "unit", "median", "min", "max", "required", "goal", "verdict"]
VALUE_COLUMNS = COLUMNS[:5]  # for figures without targets


def figure_table(figures: Sequence[Figure], columns: Sequence[str] = COLUMNS) -> str:
    """Return a Markdown table of figures with the first of the columns."""
    return table(columns, [figure.row()[: len(columns)] for figure in figures])


def interleave(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Measure every side once per round and return the results by side.

    The order alternates, so that other load on the machine affects all sides alike.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            results[name].append(sides[name]())
        order.reverse()
    return results


def ratios(dividends: Sequence[float], divisors: Sequence[float]) -> list[float]:
    """Divide pair by pair."""
    return [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile by nearest rank; `share` is 0.99 for the 99th percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the growth of y per x by least squares, or 0 for fewer than two points."""
    return statistics.linear_regression(xs, ys).slope if len(xs) > 1 else 0.0


def number(value: float) -> str:
    """Format a number with three significant digits. Numbers from 100 are whole numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Axes:
    """The ranges of a chart. With `log`, the x axis is logarithmic. The y axis starts at 0."""

    x_first: float
    x_last: float
    y_max: float
    log: bool

    def x(self, value: float) -> float:
        """Return the horizontal position of a value in pixels."""
        scale = math.log if self.log else float
        span = (scale(self.x_last) - scale(self.x_first)) or 1.0
        fraction = (scale(value) - scale(self.x_first)) / span
        return round(LEFT + fraction * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the vertical position of a value in pixels."""
        bottom = HEIGHT - BOTTOM
        return round(bottom - value / self.y_max * (bottom - TOP), 1)


def chart(
    title: str,
    x_label: str,
    y_label: str,
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    log: bool,
) -> str:
    """Draw one or two lines over the same xs as SVG.

    With `log`, the x axis is logarithmic and has a tick for each x.
    """
    axes = _Axes(xs[0], xs[-1], _round_up(max(max(ys) for ys in series.values())), log)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        '<rect class="back" width="100%" height="100%"/>',
        _text(LEFT, 24, title, "title"),
        _text(WIDTH - RIGHT, HEIGHT - 12, x_label, "end"),
        _text(LEFT, TOP - 12, y_label),
        *_grid(axes, xs),
    ]
    for index, (name, ys) in enumerate(series.items()):
        points = [(axes.x(x), axes.y(y)) for x, y in zip(xs, ys, strict=True)]
        parts += _line(index, name, points)
    return "\n".join([*parts, "</svg>\n"])


def _grid(axes: _Axes, xs: Sequence[float]) -> list[str]:
    """Draw the horizontal grid lines and the labels of both axes."""
    steps = [step / GRID_STEPS for step in range(GRID_STEPS + 1)]
    parts = []
    for step in steps:
        value = axes.y_max * step
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 8, y + 4, number(value), "end"))
    ticks = xs if axes.log else [xs[0] + (xs[-1] - xs[0]) * step for step in steps]
    label_y = HEIGHT - BOTTOM + 18
    parts += [_text(axes.x(x), label_y, number(x), "middle") for x in ticks]
    return parts


def _line(index: int, name: str, points: Sequence[tuple[float, float]]) -> list[str]:
    """Draw a line with its points and its entry in the legend."""
    kind = LINE_CLASSES[index]
    legend_x = LEFT + 250 + 170 * index
    legend = [(legend_x, TOP - 16), (legend_x + 26, TOP - 16)]
    radius = 3 if len(points) < 20 else 1
    circles = [f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}"/>' for x, y in points]
    label = _text(legend_x + 32, TOP - 12, name)
    return [_polyline(kind, points), _polyline(kind, legend), *circles, label]


def _polyline(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def _round_up(value: float) -> float:
    """Round up to 1, 2, 4, 5 or 8 times a power of ten, whose quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * step for step in (1, 2, 4, 5, 8, 10) if value <= power * step)
