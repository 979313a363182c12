"""Why a plan takes the time and the memory it takes, why it won, and how far the answer can be trusted.

Pure functions from what was predicted or found to text and figures. Kinds of time, classes of memory, reasons and axes
are whatever the prediction names: nothing here knows a technique.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autotune.report.bands import interval, pools, short, verdict, within
from autotune.report.compare import critical_path
from autotune.report.explanation import Explanation, Section, table
from autotune.report.figures import figures
from autotune.report.units import percent, seconds, signed, size
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Found, Prediction
from autotune.spec.timeline import Timeline

TIGHT = 0.05  # less memory left than this share and the section says that memory binds
MOST_REASONS = 8
OVERHEAD = "overhead"  # the class of memory that the runtime takes, not the plan: no part of Prediction.peak_bytes


def explain_prediction(prediction: Prediction, profile: Profile) -> Explanation:
    """Where the time goes, what bounds the step, memory a rank against the device, and what the figures rest on."""
    sections = [_changes(prediction.plan), _time(prediction)]
    sections = [section for section in sections if section.text]
    if prediction.timeline is not None and prediction.timeline.spans:
        sections.append(_path(prediction.timeline))
    sections += [_memory(prediction, profile, 1.0), _grades(prediction, profile)]
    return Explanation(
        f"{prediction.plan.describe()} on {profile.name}: "
        f"{within(prediction.step_s, prediction.bands.get('step_s'), seconds)} predicted, "
        f"{prediction.tokens_per_s:,.0f} tokens/s",
        tuple(sections),
    )


def explain_versus(a: Prediction, b: Prediction) -> Explanation:
    """Why `a` and `b` differ: their axes, the seconds by kind and the peak memory by class (a minus b)."""
    return Explanation(f"{a.plan.describe()}  against  {b.plan.describe()}", (_versus(a, b),))


def explain_found(found: Found) -> Explanation:
    """Why the winner won: its time and memory, the runner-up, its neighbours, who was infeasible, and the proof."""
    question = found.question
    subject = (
        f"{question.model.name}, {question.workload.kind}, on {question.devices} x {question.profile.name}: "
        f"minimize {question.minimize}"
    )
    if not found.ranking:
        return Explanation(subject, (_space(found), _proof(found)))
    best = found.best
    sections = [_answer(found), *explain_prediction(best, question.profile).sections]
    memory = _memory(best, question.profile, question.memory_fraction)
    sections = [memory if section.key == "memory" else section for section in sections]
    if len(found.ranking) > 1:
        sections.append(_versus(best, found.ranking[1], found.measured))
    sections += [_neighbours(found), _space(found), _proof(found)]
    return Explanation(subject, tuple(section for section in sections if section.text))


def changed(a: Plan, b: Plan) -> dict[str, tuple[object, object]]:
    """The axes on which two plans differ: name to (value in a, value in b)."""
    return {
        f.name: (getattr(a, f.name), getattr(b, f.name))
        for f in fields(Plan)
        if getattr(a, f.name) != getattr(b, f.name)
    }


def taken(prediction: Prediction) -> tuple[int, ...]:
    """Device bytes that each rank takes: the peak of what its plan allocates, and the runtime's own beside it."""
    ranks = zip(prediction.peak_bytes, prediction.memory, strict=True)
    return tuple(peak + memory.get(OVERHEAD, 0) for peak, memory in ranks)


def headroom(prediction: Prediction, profile: Profile) -> tuple[float, float]:
    """(bytes one rank may have, share of it that the fullest rank leaves). A CPU's memory is shared by its workers."""
    available = profile.device.memory_bytes / profile.sharing(prediction.plan.world)
    return available, 1 - max(taken(prediction), default=0) / available if available else 0.0


def _answer(found: Found) -> Section:
    best = found.best
    text = [
        f"{best.plan.id}  {best.plan.describe()}",
        f"predicted {within(best.step_s, best.bands.get('step_s'), seconds)}, {best.tokens_per_s:,.0f} tokens/s",
    ]
    measured = found.measured.get(best.plan.id)
    if measured:
        band = best.bands.get("step_s")
        fallen = f", {verdict(band.holds(measured))} its band" if band else ""
        off = signed(best.step_s / measured - 1)
        text.append(f"measured {seconds(measured)}{fallen}; the prediction is {off} off")
    facts = {
        "plan_id": best.plan.id,
        "plan": best.plan.to_dict(),
        "predicted_step_s": best.step_s,
        **interval(best.bands.get("step_s")),
        "measured_step_s": measured,
        "tokens_per_s": best.tokens_per_s,
    }
    return Section("answer", "The answer", tuple(text), facts)


def _changes(plan: Plan) -> Section:
    """What of the plan changes results; no lines for most plans."""
    found = plan.changes
    return Section("changes", "What changes results", found, {"changes": list(found)})


def _time(prediction: Prediction) -> Section:
    whole = sum(prediction.breakdown.values())
    ordered = sorted(prediction.breakdown.items(), key=lambda item: -item[1])
    rows = [(kind, seconds(value), percent(value / whole)) for kind, value in ordered if whole and value > 0]
    text = list(table(rows))
    facts: dict[str, Any] = {"step_s": prediction.step_s, "breakdown_s": dict(ordered)}
    if prediction.decode_s:
        first = within(prediction.prefill_s, prediction.bands.get("prefill_s"), seconds)
        then = within(prediction.decode_s, prediction.bands.get("decode_s"), seconds)
        text.append(f"prefill {first}, then {then} a token")
        facts.update(prefill_s=prediction.prefill_s, decode_s=prediction.decode_s)
    elif whole and abs(whole / prediction.step_s - 1) > 0.01:
        why = "some of it runs at the same time" if whole > prediction.step_s else "the rest is waiting"
        text.append(f"({seconds(whole)} in a step of {seconds(prediction.step_s)}: {why})")
    if prediction.timeline is not None and prediction.timeline.spans:
        line = figures(prediction.timeline)
        text.append(
            f"over all ranks: compute idle {percent(line.idle_share)}, exposed communication at most "
            f"{seconds(max(line.exposed_s))} a rank"
        )
        facts.update(idle_share=line.idle_share, exposed_communication_s=list(line.exposed_s))
    return Section("time", "Where the time goes (slowest rank)", tuple(text), facts)


def _path(timeline: Timeline) -> Section:
    """The critical path by operation and stage: what a faster step would have to speed up."""
    path = critical_path(timeline)
    totals: dict[str, list[float]] = defaultdict(list)
    for span in path:
        instruction = timeline.instruction(span)
        totals[f"{instruction.stage}{instruction.op}"].append(span.end - span.start)
    makespan = timeline.makespan
    ordered = sorted(totals.items(), key=lambda item: -sum(item[1]))
    rows = [
        (name, f"{len(each)} x", seconds(sum(each) / len(each)), percent(sum(each) / makespan))
        for name, each in ordered[:MOST_REASONS]
        if makespan
    ]
    rest = sum(sum(each) for _, each in ordered[MOST_REASONS:])
    text = [*table(rows)]
    if rest > 0:
        text.append(f"and {len(ordered) - MOST_REASONS} more kinds, {percent(rest / makespan)}")
    facts = {
        "instructions": len(path),
        "seconds": {name: sum(each) for name, each in ordered},
        "makespan_s": makespan,
    }
    return Section(
        "critical_path", f"What the step waits for ({len(path)} instructions in a chain)", tuple(text), facts
    )


def _memory(prediction: Prediction, profile: Profile, fraction: float) -> Section:
    """A row a pipeline rank: the classes that add up to its peak, the runtime's overhead, and both together.

    The last lines compare the fullest rank, overhead included, with the device and with what a plan may use.
    """
    available, left = headroom(prediction, profile)
    names = {name for classes in prediction.memory for name in classes} - {OVERHEAD}
    classes = sorted(names, key=lambda n: (-_most(prediction, n), n))
    rows = [("rank", *classes, "peak", OVERHEAD, "all")]
    whole = taken(prediction)
    for rank, (memory, peak) in enumerate(zip(prediction.memory, prediction.peak_bytes, strict=True)):
        figures_of = (*(memory.get(name, 0) for name in classes), peak, memory.get(OVERHEAD, 0), whole[rank])
        rows.append((str(rank), *map(size, figures_of)))
    fullest = max(whole, default=0)
    band = prediction.bands.get("peak_bytes")
    expected = [f"peak of the fullest rank {within(max(prediction.peak_bytes), band, size)}"] if band else []
    text = [
        *table(rows),
        *expected,
        f"the fullest rank leaves {size(available - fullest)} of {size(available)} ({percent(left)})",
    ]
    if fraction < 1:
        text.append(f"a plan may use {percent(fraction)}, {size(fraction * available)}, overhead included")
    if fraction - fullest / max(available, 1.0) < TIGHT:
        text.append("memory binds here: a plan that needs little more does not fit")
    facts = {
        "available_bytes": int(available),
        "allowed_bytes": int(fraction * available),
        "headroom": left,
        "ranks": [dict(memory) for memory in prediction.memory],
        "peak_bytes": list(prediction.peak_bytes),
        "taken_bytes": list(whole),
    }
    return Section("memory", "Memory a rank", tuple(text), facts)


def _most(prediction: Prediction, name: str) -> int:
    return max((memory.get(name, 0) for memory in prediction.memory), default=0)


def _grades(prediction: Prediction, profile: Profile) -> Section:
    parts = sorted(prediction.grades.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{percent(share)} {grade}" for grade, share in parts if share > 0) or "nothing that was priced"
    bands = {figure: band.to_dict() for figure, band in prediction.bands.items()}
    facts = {"profile": profile.name, "profile_grade": profile.grade, "shares": dict(parts), "bands": bands}
    text = [f"busy seconds: {shown}; profile {profile.name} ({profile.grade})"]
    text += [f"bands: {told}"] if (told := pools(prediction)) else []
    return Section("rests_on", "What the figures rest on", tuple(text), facts)


def _versus(a: Prediction, b: Prediction, measured: Mapping[str, float] | None = None) -> Section:
    """Kinds sorted by how much they part the two; negative: `a` is faster there."""
    known = measured or {}
    seconds_of = [known.get(p.plan.id, p.step_s) for p in (a, b)]
    both = all(p.plan.id in known for p in (a, b))
    if not both:
        seconds_of = [a.step_s, b.step_s]
    axes = changed(a.plan, b.plan)
    told = _faster(seconds_of[0], seconds_of[1]) + (" (measured)" if both else "")
    text = [f"{b.plan.id}  {b.plan.describe()}: {told}"]
    if not both and "step_s" in a.bands and "step_s" in b.bands:
        said = [within(p.step_s, p.bands["step_s"], seconds) for p in (a, b)]
        text.append(f"predicted {said[0]} against {said[1]}")
    text += [f"{name}: {mine} instead of {other}" for name, (mine, other) in axes.items()]
    by_kind = _parts(a.breakdown, b.breakdown)
    text += table([(kind, _plus(value)) for kind, value in by_kind.items() if abs(value) > 1e-4 * max(b.step_s, 1e-12)])
    peaks = [max(p.peak_bytes, default=0) for p in (a, b)]
    held = [short(peak, p.bands.get("peak_bytes"), size) for peak, p in zip(peaks, (a, b), strict=True)]
    text.append(f"peak memory {held[0]} against {held[1]}")
    by_class = _parts(*({name: _most(p, name) for m in p.memory for name in m} for p in (a, b)))
    rows = [
        (f"{name} (most on a rank)", ("+" if value > 0 else "") + size(value))
        for name, value in by_class.items()
        if abs(value) > 0.01 * max(peaks[1], 1)
    ]
    text += table(rows)
    facts = {
        "plan_ids": [a.plan.id, b.plan.id],
        "axes": {name: list(values) for name, values in axes.items()},
        "step_s": seconds_of,
        "measured": both,
        "breakdown_s": by_kind,
        "peak_bytes": peaks,
        "memory_bytes": by_class,
    }
    return Section("versus", "Against the runner-up" if measured is not None else "The difference", tuple(text), facts)


def _neighbours(found: Found) -> Section:
    """What each axis is worth: the best other plan found that differs from the winner on that axis alone."""
    best = found.best
    nearest: dict[str, Prediction] = {}
    for prediction in found.ranking[1:]:
        axes = changed(best.plan, prediction.plan)
        if len(axes) == 1:
            nearest.setdefault(next(iter(axes)), prediction)
    rows = []
    for axis, other in sorted(nearest.items(), key=lambda item: -item[1].step_s):
        mine, theirs = changed(best.plan, other.plan)[axis]
        peak = short(max(other.peak_bytes, default=0), other.bands.get("peak_bytes"), size)
        rows.append((f"{axis} {mine} -> {theirs}", signed(other.step_s / best.step_s - 1), f"peak {peak}"))
    facts = {axis: {"plan_id": p.plan.id, "step_s": p.step_s} for axis, p in nearest.items()}
    return Section("one_axis", "One axis changed", table(rows), facts)


def _space(found: Found) -> Section:
    """Counts by reason, the most common first: these are the constraints that bind the space."""
    space = found.space
    reasons = sorted(space.infeasible.items(), key=lambda item: (-item[1], item[0]))
    out = space.structures - space.feasible
    text = [f"{space.feasible:,} of {space.structures:,} structures are feasible"]
    if space.unseen:
        text.append(f"{space.unseen:,} choices of the outer axes were not looked at, each one structure or more")
    text += [
        f"{count:>8,} ({percent(count / out if out else 0)})  {reason}" for reason, count in reasons[:MOST_REASONS]
    ]
    if len(reasons) > MOST_REASONS:
        text.append(f"{sum(c for _, c in reasons[MOST_REASONS:]):>8,}  for {len(reasons) - MOST_REASONS} other reasons")
    facts = {"structures": space.structures, "feasible": space.feasible, "infeasible": dict(reasons)}
    facts["unseen"] = space.unseen
    return Section("space", "Why others are out", tuple(text), facts)


def _proof(found: Found) -> Section:
    bound = found.bound
    text = []
    if found.ranking:
        if bound.gap is None:
            text.append(
                "how far the answer is above the best is unknown: the budget left plans that nobody has bounded"
            )
        else:
            text.append(
                f"no plan in this space can take less than {seconds(bound.step_s)} under this model: "
                f"the answer is at most {percent(bound.gap)} above the best"
            )
    text.append(
        f"{found.bounded:,} bounded, {found.simulated:,} simulated, {len(found.measured):,} measured; "
        + ("the search is complete" if found.finished else "stopped before the bound closed: run it again to go on")
    )
    facts = {
        "bound_s": bound.step_s,
        "gap": bound.gap,
        "bounded": found.bounded,
        "simulated": found.simulated,
        "measured": len(found.measured),
        "finished": found.finished,
    }
    return Section("proof", "How good it is", tuple(text), facts)


def _parts(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """a minus b by name, the largest magnitude first."""
    names = dict.fromkeys([*a, *b])
    differences = {name: a.get(name, 0) - b.get(name, 0) for name in names}
    return dict(sorted(differences.items(), key=lambda item: -abs(item[1])))


def _faster(a: float, b: float) -> str:
    if not b or abs(a / b - 1) < 5e-4:
        return f"as fast, {seconds(b)}"
    word = "slower" if b > a else "faster"
    return f"{seconds(b)}, {percent(abs(b / a - 1)) if a else 'much'} {word}"


def _plus(value: float) -> str:
    return ("+" if value > 0 else "") + seconds(value)
