"""One page on a recipe: the answer and what it rests on, its timelines, the plans it was chosen from, the runs so far.

Everything on it is in the database or the lock; it is put together here and nothing is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from autotune.report.bands import level, span, verdict, within
from autotune.report.document import document
from autotune.report.explain import taken
from autotune.report.explanation import Explanation
from autotune.report.plot import charts
from autotune.report.scatter import STYLE as DOTS
from autotune.report.scatter import Axis, Point, front, scatter
from autotune.report.units import percent, seconds, signed, size
from autotune.spec.machine import Profile
from autotune.spec.prediction import Prediction
from autotune.spec.timeline import Timeline

STYLE = (
    DOTS
    + """
.cards{display:flex;flex-wrap:wrap;gap:8px;margin:0 0 14px;padding:0;list-style:none}
.cards li{background:var(--row);border:1px solid var(--line);border-radius:8px;padding:8px 12px;min-width:128px}
.cards b{display:block;font-size:18px;font-weight:600}.cards span{color:var(--soft);font-size:12px}
pre{margin:0 0 8px;overflow-x:auto;font:12.5px/1.5 ui-monospace,monospace;background:var(--row);
border-radius:8px;padding:8px 12px}
h2{text-transform:none;margin:18px 0 6px}
td.left,th.left{text-align:left}
"""
)


@dataclass(frozen=True)
class PastRun:
    """A run of the recipe's work, of whatever plan: median seconds of a step, and what it was."""

    started: str
    id: str
    plan: str
    step_s: float
    error: float | None  # of the prediction, as a signed fraction
    peak_bytes: int
    git: str = ""
    inside: bool | None = None  # whether the step fell into the prediction's band; None: it had none


@dataclass(frozen=True)
class Sheet:
    """What the page shows. `plans`: the answer first, then others of the space; `measured`: plan id to seconds."""

    title: str
    explanation: Explanation
    plans: Sequence[Prediction]
    timelines: Sequence[Timeline]
    runs: Sequence[PastRun]  # oldest first
    profile: Profile
    measured: dict[str, float]
    gap: float | None = None
    fraction: float = 1.0  # of a device's memory that a plan may use


def page(sheet: Sheet) -> str:
    """The page as HTML."""
    body, data = [_cards(sheet), _front(sheet), _history(sheet.runs), _sections(sheet.explanation)], None
    if sheet.timelines:
        markup, data = charts(sheet.timelines)
        body += ["<h2>Timelines</h2>", markup]
    body.append(_machine(sheet.profile))
    return document(sheet.title, "\n".join(part for part in body if part), data, STYLE)


def _cards(sheet: Sheet) -> str:
    best = sheet.plans[0]
    cards = [(seconds(best.step_s), _expected("predicted", best, "step_s", best.step_s, seconds))]
    cards.append((f"{best.tokens_per_s:,.0f}", "tokens/s predicted"))
    if found := sheet.measured.get(best.plan.id):
        band = best.bands.get("step_s")
        fallen = f", {verdict(band.holds(found))} its band" if band else ""
        cards.append((seconds(found), f"measured{fallen}; prediction {signed(best.step_s / found - 1)}"))
    if best.decode_s:
        cards.append((seconds(best.decode_s), _expected("a token", best, "decode_s", best.decode_s, seconds)))
    peak = max(best.peak_bytes, default=0)
    if "peak_bytes" in best.bands:
        cards.append((size(peak), _expected("peak of the fullest rank", best, "peak_bytes", peak, size)))
    fullest = max(taken(best), default=0)
    allowed = sheet.fraction * sheet.profile.device.memory_bytes / sheet.profile.sharing(best.plan.world)
    cards.append((size(fullest), f"of {size(allowed)} that a rank may use"))
    cards.append(("unknown" if sheet.gap is None else percent(sheet.gap), "at most above the best of the space"))
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in cards)
    return f'<p>{escape(best.plan.describe())}</p>\n<ul class="cards">{items}</ul>'


def _expected(what: str, best: Prediction, figure: str, value: float, form: Callable[[float], str]) -> str:
    """`predicted: 441 to 489 at 90 %, interpolated`."""
    band = best.bands.get(figure)
    return f"{what}: {span(value, band, form)} at {level(band)}, {band.rests_on}" if band else what


def _front(sheet: Sheet) -> str:
    """Time against memory: the plans that no other beats in both are the front."""
    points = [_point(sheet, prediction) for prediction in sheet.plans]
    if len(points) < 2:
        return ""
    line = front(points)
    drawn = [p._replace(kind="front") if p in line and not p.kind else p for p in points]
    unit = float(1 << 30 if max(p.x for p in points) >= 1 << 31 else 1 << 20)
    memory = Axis("peak memory of the fullest rank", size, unit)
    picture = scatter(drawn, memory, Axis("predicted time", seconds), line)
    told = (
        f"{len(points)} plans of the space; {len(line)} that no other beats in both time and memory; the answer is red."
    )
    return f"<h2>Time and memory</h2>\n<p>{told}</p>\n{picture}"


def _point(sheet: Sheet, prediction: Prediction) -> Point:
    plan, peak = prediction.plan, float(max(taken(prediction), default=0))
    said = within(prediction.step_s, prediction.bands.get("step_s"), seconds)
    label = f"{plan.id} {plan.describe()}: {said}, {size(peak)}"
    if found := sheet.measured.get(plan.id):
        label += f", measured {seconds(found)}"
    return Point(peak, prediction.step_s, label, "best" if prediction is sheet.plans[0] else "")


def _history(runs: Sequence[PastRun]) -> str:
    if not runs:
        return "<h2>Runs</h2>\n<p>None of this work is stored yet.</p>"
    points = [
        Point(float(n), run.step_s, f"{run.started} plan {run.plan}: {seconds(run.step_s)}", "front")
        for n, run in enumerate(runs, 1)
    ]
    picture = (
        scatter(points, Axis("run", lambda n: f"{n:.0f}", least=1.0), Axis("median step", seconds))
        if len(runs) > 1
        else ""
    )
    names = ("started", "run", "plan", "step", "prediction", "band", "peak", "git")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    rows = [
        "<tr>"
        f"<th>{escape(run.started)}</th><td>{escape(run.id)}</td><td>{escape(run.plan)}</td>"
        f"<td>{seconds(run.step_s)}</td><td>{'–' if run.error is None else signed(run.error)}</td>"
        f"<td>{'–' if run.inside is None else verdict(run.inside)}</td>"
        f"<td>{size(run.peak_bytes)}</td><td>{escape(run.git[:10]) or '–'}</td></tr>"
        for run in reversed(runs)
    ]
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<h2>Runs</h2>\n{picture}\n{table}"


def _sections(explanation: Explanation) -> str:
    parts = [f"<p>{escape(explanation.subject)}</p>"]
    for section in explanation.sections:
        lines = escape("\n".join(section.text))
        parts.append(f"<h2>{escape(section.title)}</h2>\n<pre>{lines}</pre>")
    return "\n".join(parts)


def _machine(profile: Profile) -> str:
    device = profile.device
    rows = [
        ("profile", f"{profile.name} ({profile.grade})"),
        ("devices", f"{device.count} x {device.name}, {size(device.memory_bytes)}"),
        ("memory bandwidth", f"{device.memory_bandwidth / 1e9:,.0f} GB/s"),
        *((f"peak {name}", f"{value / 1e12:,.1f} TFLOP/s") for name, value in device.peak_flops.items()),
        *(
            (f"link {link.name}", f"{link.bandwidth / 1e9:,.1f} GB/s, {link.size or 'any'} devices")
            for link in profile.links
        ),
        ("samples", f"{len(profile.samples):,}"),
    ]
    body = "".join(f'<tr><th>{escape(name)}</th><td class="left">{escape(value)}</td></tr>' for name, value in rows)
    return f'<h2>The machine</h2>\n<div class="scroll"><table><tbody>{body}</tbody></table></div>'
