"""A gate for GitHub Actions: annotations of files, and a summary of the step.

Workflow commands are lines of standard output, `::error file=F,title=T::MESSAGE`, in which some characters must be
escaped (GitHub documentation, "Workflow commands for GitHub Actions"; actions/toolkit, packages/core/src/command.ts).
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.gate.outcome import REPORTED, UPDATED, Outcome
from autotune.gate.rule import IMPROVED

MOST = 10  # annotations of a kind that GitHub shows for a step
SUMMARY_BYTES = 1 << 20  # that a step's summary may have
CUT = "\n\n... cut: the summary of a step may have 1 MiB\n"


def escaped(text: str) -> str:
    """A command's message."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escaped_property(text: str) -> str:
    """The value of one of a command's properties."""
    return escaped(text).replace(":", "%3A").replace(",", "%2C")


def commands(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each recipe that did not pass, worst first as they come, at most ten; errors for what failed, notices
    for what a person may want to know."""
    told = [outcome for outcome in outcomes if outcome.exit_code or outcome.verdict in (IMPROVED, REPORTED, UPDATED)]
    told.sort(key=lambda outcome: outcome.exit_code == 0)
    shown = told if len(told) <= MOST else told[: MOST - 1]
    found = [_line(outcome) for outcome in shown]
    if len(told) > len(shown):
        found.append(f"::error title=autotune gate::{len(told) - len(shown)} more recipes; the step's summary has all")
    return found


def _line(outcome: Outcome) -> str:
    kind = "error" if outcome.exit_code else "notice"
    title = escaped_property(f"autotune gate: {outcome.verdict}")
    text = outcome.message + (f"\n{outcome.hint}" if outcome.hint else "")
    return f"::{kind} file={escaped_property(outcome.recipe)},title={title}::{escaped(text)}"


def summary(outcomes: Sequence[Outcome], room: int = SUMMARY_BYTES) -> str:
    """Markdown with a row a recipe, at most `room` bytes."""
    rows = ["### autotune gate", "", "| recipe | verdict | ratio | interval | why |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        one = outcome.found if outcome.base else None
        figures = (f"{one.ratio:.4f}", f"{one.low:.4f} to {one.high:.4f}") if one else ("", "")
        cells = (outcome.recipe, outcome.verdict, *figures, outcome.message)
        rows.append("| " + " | ".join(map(cell, cells)) + " |")
    text = "\n".join(rows) + "\n"
    if len(text.encode()) <= room:
        return text
    kept = text.encode()[: max(0, room - len(CUT.encode()))].decode(errors="ignore")
    return kept[: kept.rfind("\n") + 1].rstrip("\n") + CUT


def cell(text: str) -> str:
    """Text in a cell of a Markdown table: nothing in it is markup."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return " ".join(text.split())
