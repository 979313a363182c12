"""What `autotune validate --require` holds a validation to: stated bars, and whether its summaries keep them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autotune.spec.errors import Problem, UsageError, nearest_name
from autotune.spec.validation import MEMORY, TIME, Summary, Validation

TARGETS = "targets"
KINDS = (TIME, MEMORY)
# By name: what is compared, and whether less of it is better.
FIGURES = {"mean": True, "worst": True, "tau": False, "rho": False, "regret": True}


@dataclass(frozen=True)
class Bar:
    """`figure` of the judged rows of `kind` is to be at most (tau, rho: at least) `limit`. `table`: of it alone; ""
    of every table. A bar that is asked for by name is missed where its figure cannot be told."""

    kind: str
    figure: str
    limit: float
    table: str = ""
    asked: bool = True

    def __str__(self) -> str:
        return f"{self.kind}.{self.figure} {'<=' if FIGURES[self.figure] else '>='} {self.limit:g}"


# The project's own: those of a published table by its name, "" those of what runs on the machine at hand.
STATED: Mapping[str, tuple[tuple[str, str, float], ...]] = {
    "": (
        (TIME, "mean", 0.05),
        (TIME, "worst", 0.12),
        (TIME, "tau", 0.9),
        (TIME, "regret", 0.02),
        (MEMORY, "worst", 0.03),
    ),
    "vtrain": ((TIME, "mean", 0.10), (TIME, "rho", 0.97)),
    "aiconfigurator": ((TIME, "mean", 0.15),),
}


def read(texts: Sequence[str], tables: Sequence[str]) -> tuple[Bar, ...]:
    """The bars that `--require` names: `mean=0.05`, `memory.worst=0.03`, or `targets`, the project's own for `tables`
    (published ones; none: a suite that runs). UsageError for anything else, all problems at once."""
    bars: list[Bar] = []
    problems: list[Problem] = []
    for text in texts:
        if text.strip() == TARGETS:
            stated = {table: STATED.get(table, ()) for table in tables} if tables else {"": STATED[""]}
            bars += [Bar(*bar, table=table, asked=False) for table, own in stated.items() for bar in own]
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        kind, _, figure = name.rpartition(".")
        limit = _number(value)
        wanted = f"{TARGETS}, or [{'|'.join(KINDS)}.]{'|'.join(FIGURES)}=NUMBER"
        if figure not in FIGURES or kind not in ("", *KINDS):
            near = nearest_name(figure, [*FIGURES, TARGETS])
            problems.append(Problem("--require", text, f"{name!r}", wanted, near))
        elif not equals or limit is None:
            problems.append(Problem("--require", text, repr(value) if equals else "no value", wanted))
        else:
            bars.append(Bar(kind or TIME, figure, limit))
    if problems:
        raise UsageError("cannot tell what is required", problems=problems)
    return tuple(bars)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def missed(bars: Sequence[Bar], found: Validation) -> list[str]:
    """A sentence for each bar that the validation misses; a plan that failed misses every bar."""
    told = [line for bar in bars for line in _missed(bar, found.summaries)]
    return told + [f"{plan} did not run: {why}" for plan, why in found.failed.items()] if bars else []


def _missed(bar: Bar, summaries: Sequence[Summary]) -> Iterator[str]:
    judged = [s for s in summaries if s.kind == bar.kind and not s.fitted and bar.table in ("", s.table)]
    values = [(s, getattr(s, bar.figure)) for s in judged]
    if bar.asked and all(value is None for _, value in values):
        yield f"{bar}: nothing to tell it from"
    for summary, value in values:
        if value is not None and (abs(value) > bar.limit if FIGURES[bar.figure] else value < bar.limit):
            yield f"{summary.table}, {summary.metric}: {bar.figure} {value:.3g}, required {bar}"
