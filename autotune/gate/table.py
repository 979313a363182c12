"""A gate as lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from autotune.gate.outcome import Outcome
from autotune.spec.lock import Launch
from autotune.spec.words import counted


def lines(outcome: Outcome) -> list[str]:
    """The outcome of one recipe, a fact a line; the first has the verdict."""
    found = [f"{outcome.recipe}: {outcome.verdict}"]
    rows = [("plan", outcome.plan_id), ("baseline", outcome.baseline)]
    if outcome.new:
        rows.append(("this", _side(outcome.new)))
    if outcome.base:
        rows.append(("then", _side(outcome.base)))
    if outcome.found and outcome.base:
        one = outcome.found
        rows.append(("ratio", f"{one.ratio:.4f} ({one.low:.4f} to {one.high:.4f}); {outcome.threshold:.1%} counts"))
    if outcome.set_aside:
        aside = counted(outcome.set_aside, "launch", "launches")
        rows.append(("set aside", f"{aside}: the machine was under load or throttled beside them"))
    rows += [(check.name, f"{check.state}: {check.said}") for check in outcome.checks]
    rows += [("note", note) for note in outcome.notes]
    rows.append(("why", outcome.message.split("\n")[0]))
    return found + [f"  {name:<16}  {value}" for name, value in rows if value]


def _side(launches: Sequence[Launch]) -> str:
    medians = [launch.median_s for launch in launches]
    spread = (max(medians) - min(medians)) / median(medians)
    many = counted(len(medians), "launch", "launches")
    return f"{median(medians) * 1e3:.4g} ms a step, median of {many} that span {spread:.1%}"
