"""Timelines as one static SVG picture: for a document, or where no script may run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from autotune.report.figures import figures
from autotune.report.palette import Colour, colour, ink
from autotune.report.picture import Mark, RankPicture, nanoseconds, pictures
from autotune.report.units import percent, seconds, size
from autotune.spec.program import DEVICE
from autotune.spec.timeline import Timeline

WIDTH, GUTTER, RIGHT = 1200, 132, 12  # pixels; names of lanes stand in the gutter
ROW, MEMORY, GAP = 18, 26, 10
LETTER = 6.2  # pixels of a letter at the size of a span's label

STYLE = """
text{font:11px system-ui,sans-serif;fill:var(--ink)}.t{font-size:15px;font-weight:600}.h{font-weight:600}
.n{fill:var(--soft)}.r{fill:var(--row)}.m{fill:none;stroke:var(--ink);stroke-width:1}.w{opacity:.3}.l{pointer-events:none;font-size:10px}
svg{--page:#fff;--ink:#1b1f24;--soft:#59636e;--row:#f0f2f4}.page{fill:var(--page)}
@media(prefers-color-scheme:dark){svg{--page:#14171a;--ink:#e8eaed;--soft:#9aa4ae;--row:#1f2429}}
"""


def svg(timelines: Sequence[Timeline], title: str) -> str:
    """A picture 1200 wide: the timelines one above the other on one time scale, a row a lane, memory below each rank.

    Spans too narrow to be seen beside the one before them are left out of the picture; the scale never changes.
    """
    longest = max((nanoseconds(t.makespan) for t in timelines), default=0) or 1
    scale = (WIDTH - GUTTER - RIGHT) / longest
    drawn = [pictures(t) for t in timelines]
    ops = list(dict.fromkeys(i.op for t in timelines for listing in t.program.ranks for i in listing))
    classes = {op: f"o{k}" for k, op in enumerate(ops)}
    body: list[str] = [f'<text class="t" x="{RIGHT}" y="24">{escape(title)}</text>']
    y = _legend(body, ops, classes, 36)
    for timeline, ranks in zip(timelines, drawn, strict=True):
        body.append(f'<text class="h" x="{RIGHT}" y="{y + 12}">{escape(headline(timeline))}</text>')
        y += 20
        for picture in ranks:
            y = _rank(body, picture, classes, scale, nanoseconds(timeline.makespan), y)
        y += GAP
    y = _axis(body, longest, scale, y)
    light = "".join(
        f".{classes[op]}{{fill:{c.light}}}.{classes[op]}i{{fill:{ink(c.light)}}}" for op, c in _colours(ops)
    )
    dark = "".join(f".{classes[op]}{{fill:{c.dark}}}.{classes[op]}i{{fill:{ink(c.dark)}}}" for op, c in _colours(ops))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">'
        f"<title>{escape(title)}</title><style>{STYLE}{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"
        f'<rect class="page" width="{WIDTH}" height="{y}"/>{"".join(body)}</svg>\n'
    )


def headline(timeline: Timeline) -> str:
    """One line: kind, makespan, idle share, exposed communication and peak memory of the worst rank."""
    f = figures(timeline)
    return (
        f"{f.kind}: {seconds(f.makespan_s)}, idle {percent(f.idle_share)}, exposed communication "
        f"{seconds(max(f.exposed_s, default=0.0))}, peak {size(max(f.peak_bytes, default=0))}"
    )


def _colours(ops: Sequence[str]) -> list[tuple[str, Colour]]:
    return [(op, colour(op)) for op in ops]


def _legend(body: list[str], ops: Sequence[str], classes: dict[str, str], y: int) -> int:
    x = RIGHT
    for op in ops:
        wide = 22 + len(op) * 7
        if x + wide > WIDTH - RIGHT:
            x, y = RIGHT, y + 18
        body.append(f'<rect class="{classes[op]}" x="{x}" y="{y}" width="11" height="11" rx="2"/>')
        body.append(f'<text x="{x + 15}" y="{y + 10}">{escape(op)}</text>')
        x += wide
    return y + 26


def _rank(body: list[str], picture: RankPicture, classes: dict[str, str], scale: float, end: int, y: int) -> int:
    body.append(f'<text class="h" x="{RIGHT}" y="{y + 13}">{picture.rank}</text>')
    wide = WIDTH - GUTTER - RIGHT
    for lane, marks in zip(picture.lanes, picture.rows, strict=True):
        shown = lane if len(lane) <= 15 else lane[:14] + "…"
        body.append(f'<text class="n" x="{GUTTER - 8}" y="{y + 13}" text-anchor="end">{escape(shown)}</text>')
        body.append(f'<rect class="r" x="{GUTTER}" y="{y}" width="{wide}" height="{ROW - 2}"/>')
        edge = -1.0
        for mark in marks:
            x, w = GUTTER + mark.start_ns * scale, mark.length_ns * scale
            if x + max(w, 0.5) <= edge:
                continue
            edge = x + max(w, 0.5)
            body.append(_mark(mark, classes[mark.instruction.op], x, y, w))
        y += ROW
    points = picture.memory.get(DEVICE)
    if points:
        y = _memory(body, points, scale, end, y)
    return y + 6


def _mark(mark: Mark, name: str, x: float, y: int, w: float) -> str:
    label = mark.instruction.label
    title = escape(
        f"{label}: {seconds(mark.length_ns / 1e9)} from {seconds(mark.start_ns / 1e9)}, writes {size(mark.written)}"
    )
    pale = mark.wait_ns / max(mark.length_ns, 1) * w  # waiting for the last to arrive
    x, w = x + pale, w - pale
    drawn = max(w - (0.6 if w > 2 else 0), 0.5)
    box = (
        f'<rect class="{name}" x="{x:.2f}" y="{y}" width="{drawn:.2f}" height="{ROW - 2}"><title>{title}</title></rect>'
    )
    if pale > 0:
        box += f'<rect class="{name} w" x="{x - pale:.2f}" y="{y}" width="{pale:.2f}" height="{ROW - 2}"/>'
    if w < LETTER * len(label) + 4:
        return box
    return f'{box}<text class="l {name}i" x="{x + w / 2:.2f}" y="{y + 12}" text-anchor="middle">{escape(label)}</text>'


def _memory(body: list[str], points: Sequence[tuple[int, int]], scale: float, end: int, y: int) -> int:
    peak = max(size_ for _, size_ in points)
    line, last = [], float(y + MEMORY)
    for time, bytes_ in points:
        x, level = GUTTER + time * scale, y + 2 + (MEMORY - 4) * (1 - bytes_ / peak)
        line.append(f"{x:.1f} {last:.1f} {x:.1f} {level:.1f}")
        last = level
    body.append(f'<polyline class="m" points="{" ".join(line)} {GUTTER + end * scale:.1f} {last:.1f}"/>')
    body.append(f'<text class="n" x="{GUTTER - 8}" y="{y + 16}" text-anchor="end">peak {size(peak)}</text>')
    return y + MEMORY


def _axis(body: list[str], longest: int, scale: float, y: int) -> int:
    step = 10 ** (len(str(longest)) - 1)
    step = next((s for s in (step // 5, step // 2, step) if s and longest / s <= 10), step) or 1
    for time in range(0, longest + 1, step):
        x = GUTTER + time * scale
        body.append(f'<text class="n" x="{x:.1f}" y="{y + 10}" text-anchor="middle">{seconds(time / 1e9)}</text>')
    return y + 22
