"""A validation as lines of text and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autotune.cli import _output as out
from autotune.cli._settings import current
from autotune.report.coverage import COVERAGE, COVERAGE_HEAD, coverage_cells
from autotune.report.validation import ROW_HEAD, SUMMARY_HEAD, facts, row_cells, summary_cells, tables
from autotune.spec.validation import Validation

SHORT = 60  # rows of a table that are printed; of a longer one the worst, unless -v asks for all
WORST = 5


def validation_lines(found: Validation) -> Iterator[str]:
    """What was predicted and measured, row by row, then what the rows say together."""
    yield f"suite      {found.suite}"
    for fact in facts(found):
        yield f"           {fact}"
    for name, rows in tables(found).items():
        yield ""
        if len(rows) <= SHORT or current().verbose:
            yield name
            yield from out.table([ROW_HEAD, *map(row_cells, rows)], right=(3, 4, 5, 6))
            continue
        judged = sorted((row for row in rows if not row.fitted), key=lambda row: -abs(row.error))
        yield f"{name}: {len(rows)} rows, of which the worst judged ones (-v prints every row)"
        yield from out.table([ROW_HEAD, *map(row_cells, judged[:WORST])], right=(3, 4, 5, 6))
    yield ""
    yield from out.table([SUMMARY_HEAD, *map(summary_cells, found.summaries)], right=tuple(range(2, 10)))
    if found.groups:
        yield ""
        yield "judged rows by group"
        cells = [summary_cells(group)[:6] for group in found.groups]
        yield from out.table([SUMMARY_HEAD[:6], *cells], right=(2, 3, 4, 5))
    if found.coverage:
        yield ""
        yield COVERAGE
        yield from out.table([COVERAGE_HEAD, *map(coverage_cells, found.coverage)], right=(4, 5, 6))
    for plan, why in found.failed.items():
        yield f"did not run: {plan}: {why}"


def validation_json(found: Validation, id: str) -> dict[str, Any]:
    """The content of "autotune.validate/1"."""
    return {
        "validation_id": id,
        "suite": found.suite,
        "machine": found.machine,
        "profile": found.profile,
        "cost_model": found.cost_model,
        "rows": [row.to_dict() for row in found.rows],
        "summary": [summary.to_dict() for summary in found.summaries],
        "groups": [group.to_dict() for group in found.groups],
        "coverage": [part.to_dict() for part in found.coverage],
        "failed": dict(found.failed),
        "notes": list(found.notes),
    }
