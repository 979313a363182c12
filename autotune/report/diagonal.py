"""A scatter plot of predicted against measured figures, as SVG: logarithmic axes, the diagonal, and error bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from autotune.report.palette import BLUE, GREEN, GREY, ORANGE, PINK, VIOLET, Colour

SIDE, LEFT, TOP, BOTTOM = 360, 52, 10, 40  # pixels: the square of the plot, and what stands around it
BANDS = (0.05, 0.12)  # of the measured value: the targets of mean and worst
MARGIN = 0.06  # of the range, in decades, that no point lies in

# What a prediction rests on, from the surest.
GRADES: dict[str, Colour] = {
    "measured": GREEN,
    "interpolated": BLUE,
    "extrapolated": ORANGE,
    "datasheet": VIOLET,
    "stated": GREY,
    "counted": PINK,
}

STYLE = (
    ".plot{width:100%;max-width:460px;height:auto;display:block}.plot text{font:11px system-ui,sans-serif;"
    "fill:var(--soft)}.plot .frame{fill:var(--row)}.plot .grid{stroke:var(--line);stroke-width:1}"
    ".plot .band{fill:var(--ink);opacity:.07}.plot .diagonal{stroke:var(--soft);stroke-width:1}"
    ".plot circle{fill-opacity:.75}.plot circle.fitted{fill:none!important;stroke-width:1.2}"
    + "".join(f".g-{name}{{fill:{c.light};stroke:{c.light};background:{c.light}}}" for name, c in GRADES.items())
    + "@media(prefers-color-scheme:dark){"
    + "".join(f".g-{name}{{fill:{c.dark};stroke:{c.dark};background:{c.dark}}}" for name, c in GRADES.items())
    + "}"
)


@dataclass(frozen=True)
class Dot:
    """One figure; both values above zero. `said` is shown where a pointer rests on it."""

    predicted: float
    measured: float
    grade: str
    said: str
    fitted: bool = False


def diagonal(dots: Sequence[Dot], label: str) -> str:
    """The plot, measured to the right and predicted upwards on one scale. `label` names the figure and its unit.

    ValueError without dots, or with one that no logarithm exists of.
    """
    values = [value for dot in dots for value in (dot.predicted, dot.measured)]
    if not values or min(values) <= 0:
        raise ValueError("a logarithmic plot needs values above zero")
    low, high = log10(min(values)), log10(max(values))
    margin = max(MARGIN * (high - low), 0.02)
    low, high = low - margin, high + margin

    def along(value: float) -> float:
        return (log10(value) - low) / (high - low) * SIDE

    def place(measured: float, predicted: float) -> str:
        return f"{along(measured):.1f} {SIDE - along(predicted):.1f}"

    ends = (10**low, 10**high)
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>']
    for tick in ticks(*ends):
        x, y, text = LEFT + along(tick), TOP + SIDE - along(tick), f"{tick:g}"
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + SIDE}"/>')
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + SIDE}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + SIDE + 14}" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    # What is inside the frame has a picture of its own, which cuts bands off at its edges.
    parts.append(f'<svg x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}">')
    for band in reversed(BANDS):
        corners = [(x, x * (1 + off)) for x, off in ((ends[0], band), (ends[1], band), (ends[1], -band))]
        corners.append((ends[0], ends[0] * (1 - band)))
        inside = " ".join(place(*corner) for corner in corners)
        parts.append(f'<polygon class="band" points="{inside}"/>')
    start, end = place(ends[0], ends[0]).split(), place(ends[1], ends[1]).split()
    parts.append(f'<line class="diagonal" x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"/>')
    for dot in dots:
        right, down = place(dot.measured, dot.predicted).split()
        name = f"g-{dot.grade if dot.grade in GRADES else 'stated'}" + (" fitted" if dot.fitted else "")
        parts.append(
            f'<circle class="{name}" cx="{right}" cy="{down}" r="3"><title>{escape(dot.said)}</title></circle>'
        )
    parts.append("</svg>")
    middle = LEFT + SIDE / 2
    parts.append(f'<text x="{middle}" y="{TOP + SIDE + 32}" text-anchor="middle">measured {escape(label)}</text>')
    turned = f"rotate(-90 12 {TOP + SIDE / 2})"
    parts.append(
        f'<text x="12" y="{TOP + SIDE / 2}" text-anchor="middle" transform="{turned}">predicted {escape(label)}</text>'
    )
    wide, tall = LEFT + SIDE + 10, TOP + SIDE + BOTTOM
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" role="img" '
        f'aria-label="predicted against measured {escape(label)}">{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Round values inside the range: powers of ten, with twos and fives where there are few, evenly where still fewer.

    Both ends above zero, low below high.
    """
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        found = [step * 10.0**decade for decade in decades for step in steps]
        inside = [float(f"{value:.12g}") for value in found if low <= value <= high]
        if len(inside) >= 3:
            return inside
    size = 10.0 ** floor(log10((high - low) / 4))
    step = next(s * size for s in (1, 2, 5, 10) if (high - low) / (s * size) <= 6)
    return [float(f"{k * step:.12g}") for k in range(ceil(low / step), floor(high / step) + 1)]
