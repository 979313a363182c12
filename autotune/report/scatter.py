"""Points in a plane as a static SVG picture, one a plan or a run: nothing in it needs a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, log10
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 74, 34, 12, 42  # pixels
TICKS = 6  # at most, of an axis

STYLE = """
.scatter{max-width:100%;height:auto;display:block;margin:4px 0 10px}
.scatter text{font:11px system-ui,sans-serif;fill:var(--soft)}.scatter .grid{stroke:var(--line);stroke-width:1}
.scatter circle{fill:var(--soft);fill-opacity:.55}.scatter .front{fill:#2b83c6;fill-opacity:.9}
.scatter .best{fill:#c75300;fill-opacity:1}.scatter .line{fill:none;stroke:#2b83c6;stroke-width:1.2;opacity:.7}
"""


class Point(NamedTuple):
    """`kind`: "best", "front" or "": how it is drawn. `label` is what is said when it is pointed at."""

    x: float
    y: float
    label: str
    kind: str = ""


class Axis(NamedTuple):
    """What an axis is called and how its numbers are written. `unit`: its ticks lie on round multiples of it; `least`:
    that they are apart, in units."""

    name: str
    form: Callable[[float], str]
    unit: float = 1.0
    least: float = 0.0


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other has both less x and less y than (or one less and the other equal), from the left."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not found or point.y < found[-1].y:
            found.append(point)
    return found


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie in the picture: between the first and the last tick of each axis."""

    xs: Sequence[float]
    ys: Sequence[float]

    def across(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - BOTTOM - TOP)

    def grid(self, x: Axis, y: Axis) -> Iterator[str]:
        """Lines and numbers at the ticks, and what the axes are called."""
        low, middle = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / 2 + LEFT
        for value in self.xs:
            at = self.across(value)
            yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{low}"/>'
            yield f'<text x="{at:.1f}" y="{low + 15}" text-anchor="middle">{escape(x.form(value))}</text>'
        for value in self.ys:
            at = self.down(value)
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(y.form(value))}</text>'
        yield f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.name)}</text>'
        turned = f'transform="rotate(-90 12 {HEIGHT / 2:.0f})" x="12" y="{HEIGHT / 2:.0f}"'
        yield f'<text {turned} text-anchor="middle">{escape(y.name)}</text>'

    def steps(self, line: Sequence[Point]) -> Iterator[str]:
        """A line from point to point that goes across before it goes down."""
        if len(line) > 1:
            corners = [(line[0].x, line[0].y)]
            for before, point in pairwise(line):
                corners += [(point.x, before.y), (point.x, point.y)]
            shown = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in corners)
            yield f'<polyline class="line" points="{shown}"/>'

    def dot(self, point: Point) -> str:
        radius = 5 if point.kind == "best" else 4
        at = f'cx="{self.across(point.x):.1f}" cy="{self.down(point.y):.1f}" r="{radius}"'
        return f'<circle class="{point.kind}" {at}><title>{escape(point.label)}</title></circle>'


def scatter(points: Sequence[Point], x: Axis, y: Axis, line: Sequence[Point] = ()) -> str:
    """The picture; `line` joins points in their order, as a front's steps. Empty without points."""
    if not points:
        return ""
    frame = _Frame(_ticks([p.x for p in points], x), _ticks([p.y for p in points], y))
    ordered = sorted(points, key=lambda p: ("", "front", "best").index(p.kind))  # the best on top
    body = "".join((*frame.grid(x, y), *frame.steps(line), *map(frame.dot, ordered)))
    shown = escape(f"{x.name} and {y.name} of {len(points)} points")
    return (
        f'<svg class="scatter" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{shown}">'
        f"{body}</svg>"
    )


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
    """Round numbers from below the least value to above the largest: some 3 to 6 of them."""
    low, high = min(values) / axis.unit, max(values) / axis.unit
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        pad = abs(high) * 0.05 or 1.0
        low, high = low - pad, high + pad
    power = 10.0 ** floor(log10((high - low) / TICKS))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (power * m) <= TICKS - 1)
    step = max(step, axis.least)
    first = floor(low / step)
    count = next(n for n in range(1, 3 * TICKS) if (first + n) * step >= high - 1e-9 * step)
    return [(first + n) * step * axis.unit for n in range(count + 1)]
