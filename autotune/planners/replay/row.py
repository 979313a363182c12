"""A row of a published table beside what we find for it, and the errors of a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A published value. `found` computes ours, in the same unit; no published value of a judged row goes into it.

    `rests`: the share of what was found that rests on each grade of price; none where durations are the source's own.
    A `fitted` row is one that coefficients were fitted to: it is shown and never judged.
    """

    source: str  # paper and table
    setup: str
    name: str  # schedule or plan, as the paper calls it
    metric: str  # with its unit
    published: float
    found: Callable[[], float]
    rests: Callable[[], Mapping[str, float]] = dict
    fitted: bool = False
    calibrated: bool = False  # whether coefficients of the profile behind it were fitted to runs
    case: str = ""  # rows of one case are alternatives, of which the least value is the best; "": there is none
    traits: Mapping[str, int | str] = field(default_factory=dict, compare=False)  # by which errors are grouped


@dataclass(frozen=True)
class Table:
    """Rows of one source. `machine` says where durations come from; `relative`: differences in percent of published.
    `device` and `workload` are the kinds of what was measured."""

    title: str
    machine: str
    relative: bool
    rows: Callable[[], Iterator[Row]]
    device: str = "cuda"
    workload: str = "train"


def difference(table: Table, row: Row, found: float) -> float:
    """Ours less the published value: in percent of it, or in the metric's own unit."""
    return 100 * (found / row.published - 1) if table.relative else found - row.published


def replay(table: Table) -> list[tuple[Row, float, float]]:
    """(row, ours, difference) of every row, in the order of the source."""
    found = [(row, row.found()) for row in table.rows()]
    return [(row, ours, difference(table, row, ours)) for row, ours in found]


def summary(results: list[tuple[Row, float, float]], fitted: bool = False) -> dict[str, tuple[float, float]]:
    """By metric: the mean of the differences' sizes, and the largest difference with its sign. Of the rows that are
    judged, or of those that were fitted to."""
    by_metric: dict[str, list[float]] = {}
    for row, _, off in results:
        if row.fitted == fitted:
            by_metric.setdefault(row.metric, []).append(off)
    return {m: (statistics.fmean(map(abs, offs)), max(offs, key=abs)) for m, offs in by_metric.items()}
