"""What a sensitivity says to people: a row for each step, with what it does to time and memory or why it cannot be."""

from __future__ import annotations

from typing import Any

from autotune.planners.sensitivity import Moved, Sensitivity
from autotune.report.bands import interval, short
from autotune.report.explain import changed
from autotune.report.explanation import Section, table
from autotune.report.units import percent, seconds, signed, size
from autotune.spec.digest import digest
from autotune.spec.plan import Plan
from autotune.spec.words import counted

LONGEST = 24  # characters of a value that is shown whole
EVEN = 5e-4  # of a step's time: less is no difference


def sensitivity_section(found: Sensitivity) -> Section:
    """Key "sensitivity": the steps that fit, the fastest first, then what does not fit and what cannot run."""
    base = found.base
    peak = max(base.peak_bytes, default=0)
    fit = [moved for moved in found.moved if not moved.reason]
    rows = []
    for moved in fit:
        assert moved.prediction is not None  # only what cannot run has none
        most = max(moved.prediction.peak_bytes, default=0)
        bands = moved.prediction.bands
        said = short(moved.prediction.step_s, bands.get("step_s"), seconds)
        told = (signed(moved.prediction.step_s / base.step_s - 1), said)
        held = f"peak {short(most, bands.get('peak_bytes'), size)}"
        rows.append((_named(base.plan, moved), *told, held, signed(most / peak - 1)))
    text = [_verdict(found), *table(rows)]
    out = [f"{_named(base.plan, moved)}: {moved.reason}" for moved in found.moved if moved.reason]
    if out:
        text += [f"{counted(len(out), 'step does', 'steps do')} not fit or cannot run:", *(f"  {line}" for line in out)]
    if any(not moved.offered for moved in found.moved):
        text.append("* outside the choices that the recipe gives the search")
    text.append(f"{counted(len(found.still), 'axis has', 'axes have')} no other value to step to here")
    facts = {
        "plan_id": base.plan.id,
        "step_s": base.step_s,
        "peak_bytes": peak,
        "steps": [_facts(found, moved) for moved in found.moved],
        "still": list(found.still),
    }
    return Section("sensitivity", "One step along each axis (predicted)", tuple(text), facts)


def _verdict(found: Sensitivity) -> str:
    """Whether some step is faster, and whether the search could have taken it."""
    base = found.base.step_s
    fit = [(m.prediction.step_s / base - 1, m) for m in found.moved if m.prediction and not m.reason]
    faster = [(change, m) for change, m in fit if change < -EVEN]
    told = f"of {counted(len(fit), 'step', 'steps')} that can be taken {len(faster) or 'none'}"
    if not faster:
        return f"{told} is predicted to be faster"
    change, best = min(faster, key=lambda pair: pair[0])
    inside = sum(m.offered for _, m in faster)
    where = "" if inside == len(faster) else f", {inside or 'none'} of them among the recipe's choices"
    verb = "is" if len(faster) == 1 else "are"
    return f"{told} {verb} predicted to be faster{where}: {_named(found.base.plan, best)} by {percent(-change)}"


def _named(base: Plan, moved: Moved) -> str:
    """The axes that a step changes, the one it is taken along first."""
    axes = changed(base, moved.plan)
    first = [axis for axis in axes if axis == moved.axis]
    names = [*first, *(axis for axis in axes if axis != moved.axis)]
    told = ", ".join(f"{axis} {_short(axes[axis][0])} -> {_short(axes[axis][1])}" for axis in names)
    return told if moved.offered else f"{told} *"


def _short(value: object) -> str:
    text = str(value)
    if len(text) > LONGEST or "\n" in text:
        return digest(value)[:10]
    return text or "default"


def _facts(found: Sensitivity, moved: Moved) -> dict[str, Any]:
    prediction, base = moved.prediction, found.base
    most = max(prediction.peak_bytes, default=0) if prediction else None
    return {
        "axis": moved.axis,
        "changes": {axis: list(values) for axis, values in changed(base.plan, moved.plan).items()},
        "plan_id": moved.plan.id,
        "offered": moved.offered,
        "fits": moved.reason is None,
        "reason": moved.reason,
        "step_s": prediction.step_s if prediction else None,
        **interval(prediction.bands.get("step_s") if prediction else None),
        "change": prediction.step_s / base.step_s - 1 if prediction else None,
        "peak_bytes": most,
        "peak_change": most / max(base.peak_bytes) - 1 if most is not None else None,
    }
