"""What becomes of measurements: pairs in turn, ratios, medians, verdicts, tables, and a line chart as SVG."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from xml.sax.saxutils import escape

T = TypeVar("T")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 76, 32, 66, 52
# A background of its own, so that the texts stay readable where a page and its viewer disagree about light and dark.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; } .title { font-size: 14px; font-weight: 600; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .back { fill: #ffffff; } .grid { stroke: #d8dee4; }
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
    """One row of the report: a value per pair, and what it has to reach; `lower` says that less is better."""

    name: str
    values: Sequence[float]
    unit: str = "x"
    must: float | None = None
    aim: float | None = None
    lower: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def reaches(self, target: float) -> bool:
        """Whether the median is as good as the target."""
        return self.median <= target if self.lower else self.median >= target

    @property
    def verdict(self) -> str:
        """Say plainly which target is reached."""
        if self.must is None:
            return "reported"
        if not self.reaches(self.must):
            return "missed"
        if self.aim is None:
            return "must met"
        return "aim met" if self.reaches(self.aim) else "must met, aim missed"

    def row(self) -> list[str]:
        """Return the cells of its row, as `COLUMNS` names them."""
        values = [number(value) for value in (self.median, min(self.values), max(self.values))]
        sign = "≤ " if self.lower else "≥ "
        targets = ["" if target is None else sign + number(target) for target in (self.must, self.aim)]
        return [self.name, self.unit, *values, *targets, self.verdict]


COLUMNS = ["figure", "unit", "median", "min", "max", "must", "aim", "verdict"]


def interleave(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Measure every side once per round, in alternating order, so that what else the machine does falls on all."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(rounds):
        for name in reversed(order) if turn % 2 else order:
            found[name].append(sides[name]())
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Divide pair by pair."""
    return [own / other for own, other in zip(ours, theirs, strict=True)]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that so large a share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return how much y grows per x, by least squares; 0 for fewer than two points."""
    return statistics.linear_regression(xs, ys).slope if len(xs) > 1 else 0.0


def number(value: float) -> str:
    """Write three significant digits, and no exponent for what is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def chart(
    title: str, x_label: str, y_label: str, xs: Sequence[float], series: Mapping[str, Sequence[float]], *, log: bool
) -> str:
    """Draw up to two lines over the same xs, from y = 0 up; with `log` the xs grow by factors and each gets a tick."""
    top, scale = _round_up(max(max(ys) for ys in series.values())), math.log if log else float
    ticks = xs if log else [xs[0] + (xs[-1] - xs[0]) * part / 4 for part in range(5)]
    first, span, bottom = scale(xs[0]), (scale(xs[-1]) - scale(xs[0])) or 1.0, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - first) / span
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(bottom - y / top * (bottom - TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<title>{escape(title)}</title><style>{STYLE}</style><rect class="back" width="100%" height="100%"/>',
        _text(LEFT, 24, title, "title"),
        _text(WIDTH - RIGHT, HEIGHT - 12, x_label, "end"),
        _text(LEFT, TOP - 12, y_label),
    ]
    for value in (top * part / 4 for part in range(5)):
        _, y = place(xs[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 8, y + 4, number(value), "end"))
    parts += [_text(place(x, 0)[0], bottom + 18, number(x), "middle") for x in ticks]
    for index, (name, ys) in enumerate(series.items()):
        points, at, kind = [place(x, y) for x, y in zip(xs, ys, strict=True)], LEFT + 250 + 170 * index, "ab"[index]
        key: list[tuple[float, float]] = [(at, TOP - 16), (at + 26, TOP - 16)]
        for line in (points, key):
            parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in line)}"/>')
        parts += [f'<circle class="{kind}" cx="{x}" cy="{y}" r="{3 if len(points) < 20 else 1}"/>' for x, y in points]
        parts.append(_text(at + 32, TOP - 12, name))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 5 and 8 times a power of ten, whose quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * step for step in (1, 2, 4, 5, 8, 10) if value <= power * step)
