"""Published tables replayed: every row has its source, and the errors are those that docs/accuracy.md states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autotune.planners.replay.__main__ import lines, main
from autotune.planners.replay.row import replay, summary
from autotune.planners.replay.tables import TABLES

ACCURACY = Path(__file__).parents[1] / "docs" / "accuracy.md"
SOURCE = re.compile(r"\d{4}\.\d{5}|[\w-]+ \d+\.\d+\.\d+$")  # a paper, or a published package
STATED = re.compile(r"^\| `([\w-]+)` \| ([^|]+) \| (\d+) \| ([\d.]+)( %)? \| ([+-][\d.]+)( %)? \|$", re.MULTILINE)


@pytest.mark.parametrize("name", TABLES)
def test_errors_are_those_of_the_documentation(name: str) -> None:
    """To the last digit that the document prints: a change of a prediction changes the document."""
    table = TABLES[name]
    results = replay(table)
    assert results and all(SOURCE.match(row.source) and row.setup for row, _, _ in results)
    digits = 1 if table.relative else 4
    found = {
        (
            metric,
            sum(r.metric == metric and not r.fitted for r, _, _ in results),
            round(mean, digits),
            round(worst, digits),
        )
        for metric, (mean, worst) in summary(results).items()
    }
    stated = {
        (metric, int(count), float(mean), float(worst))
        for table_name, metric, count, mean, _, worst, _ in STATED.findall(ACCURACY.read_text())
        if table_name == name
    }
    assert stated == found


def test_orders_that_are_stated_in_full_are_exact() -> None:
    for row, found, _ in replay(TABLES["controllable-memory"]):
        assert round(found, 4) == row.published, (row.name, row.setup, row.metric)


def test_a_line_has_published_ours_and_signed_difference() -> None:
    printed = lines(TABLES["zero-bubble"])
    assert len(printed) == 2 + 15 + 1  # title and head, the rows, one metric
    assert printed[2].split()[-3:] == ["0.1985", "0.1985", "+0.0000"]


def test_an_unknown_table_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vocabluary"]) == 2
    assert "nearest 'vocabulary'" in capsys.readouterr().err
