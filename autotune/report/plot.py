"""Timelines as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from autotune.report.document import document
from autotune.report.figures import Figures, figures
from autotune.report.palette import colour, ink
from autotune.report.perfetto import perfetto
from autotune.report.picture import RankPicture, nanoseconds, pictures
from autotune.report.svg import svg
from autotune.report.units import percent, seconds, signed, size
from autotune.spec.program import DEVICE
from autotune.spec.timeline import Timeline

__all__ = ["html", "perfetto", "svg"]


def html(timelines: Sequence[Timeline], title: str) -> str:
    """The page: headline figures, a legend, and every timeline on one time scale, one above the other.

    Each rank has a row a lane and its memory over time; zoom, pan, hover or tap for an instruction's times and bytes.
    """
    body, data = charts(timelines)
    return document(title, body, data)


def charts(timelines: Sequence[Timeline]) -> tuple[str, dict[str, Any]]:
    """(markup, what the page's script draws into it)."""
    ops = list(dict.fromkeys(i.op for t in timelines for listing in t.program.ranks for i in listing))
    measured = [figures(t) for t in timelines]
    data = {
        "ops": [{"colour": list(colour(op)), "ink": [ink(c) for c in colour(op)]} for op in ops],
        "timelines": [_timeline(t, f, ops) for t, f in zip(timelines, measured, strict=True)],
    }
    legend = "".join(f"<li><i></i>{escape(op)}</li>" for op in ops)
    body = f"""<div class="scroll">{_table(measured)}</div>
<ul id="legend">{legend}</ul>
<div id="bar">
<div id="tools">
<button id="left" aria-label="earlier">←</button><button id="right" aria-label="later">→</button>
<button id="out" aria-label="zoom out">−</button><button id="in" aria-label="zoom in">+</button>
<button id="fit">Fit</button>
<label class="box"><input type="checkbox" id="critical">Critical path</label>
<label class="box"><input type="checkbox" id="pair">By rank</label>
</div>
<canvas id="axis" aria-hidden="true"></canvas>
</div>
<div id="charts"></div>
<noscript><p>The timelines are drawn by this page's own script; the figures above need none.</p></noscript>
<p class="hint">Drag to pan; Ctrl and wheel, pinch, or + and − to zoom; hover or tap for details.</p>"""
    return body, data


def _table(columns: Sequence[Figures]) -> str:
    """Headline figures, a column a timeline; for one predicted and one measured also the prediction's error."""
    rows = [
        ("makespan", [f.makespan_s for f in columns], seconds),
        ("idle share of compute", [f.idle_share for f in columns], percent),
        ("exposed communication, worst rank", [max(f.exposed_s, default=0.0) for f in columns], seconds),
        ("peak memory, worst rank", [float(max(f.peak_bytes, default=0)) for f in columns], size),
        ("sent, all ranks", [float(sum(f.sent_bytes)) for f in columns], size),
    ]
    kinds = [f.kind for f in columns]
    paired = sorted(kinds) == ["measured", "predicted"]
    head = "".join(f"<th>{escape(kind)}</th>" for kind in kinds) + ("<th>error</th>" if paired else "")
    body = []
    for name, values, form in rows:
        cells = [form(value) for value in values]
        if paired:
            guess, truth = values[kinds.index("predicted")], values[kinds.index("measured")]
            points = form is percent
            cells.append(
                f"{100 * (guess - truth):+.1f} points" if points else signed(guess / truth - 1) if truth else "–"
            )
        body.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _timeline(timeline: Timeline, summary: Figures, ops: Sequence[str]) -> dict[str, Any]:
    index = {op: k for k, op in enumerate(ops)}
    return {
        "kind": timeline.kind,
        "length": nanoseconds(timeline.makespan),
        "peak": max((timeline.peak(r, tier) for r, tiers in enumerate(timeline.memory) for tier in tiers), default=0),
        "ranks": [_rank(picture, summary, index) for picture in pictures(timeline)],
    }


def _rank(picture: RankPicture, summary: Figures, index: dict[str, int]) -> dict[str, Any]:
    """Columns rather than objects: a third of the bytes for 30,000 spans."""
    rank = picture.rank
    peak = size(summary.peak_bytes[rank])
    idle = 1 - summary.busy_s[rank] / summary.makespan_s if summary.makespan_s else 0.0
    exposed = f" · exposed {seconds(summary.exposed_s[rank])}" if summary.exposed_s[rank] > 0 else ""
    return {
        "rank": rank,
        "peak": peak,
        "note": f"peak {peak} · idle {percent(idle)}{exposed}",
        "rows": [
            {
                "lane": lane,
                "start": [m.start_ns for m in marks],
                "length": [m.length_ns for m in marks],
                "wait": [m.wait_ns for m in marks],
                "op": [index[m.instruction.op] for m in marks],
                "position": [m.position for m in marks],
                "label": [m.instruction.label for m in marks],
                "written": [m.written for m in marks],
                "critical": [int(m.critical) for m in marks],
            }
            for lane, marks in zip(picture.lanes, picture.rows, strict=True)
        ],
        "memory": [
            {"tier": tier, "time": [t for t, _ in points], "bytes": [b for _, b in points]}
            for tier, points in sorted(picture.memory.items(), key=lambda item: item[0] != DEVICE)
        ],
    }
