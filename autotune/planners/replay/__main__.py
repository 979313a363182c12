"""`python -m autotune.planners.replay [TABLE ...]`: published figures beside ours, and the errors of each table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from autotune.planners.replay.row import Table, replay, summary
from autotune.planners.replay.tables import TABLES
from autotune.spec.errors import nearest_name

COLUMNS = "{:<22} {:<16} {:<20} {:<22} {:>9} {:>9} {:>10}"


def lines(table: Table) -> list[str]:
    """A title, a line a row, and a line a metric with mean and worst difference."""
    unit = "%" if table.relative else ""
    results = replay(table)
    text = [f"{table.title}, with {table.machine}"]
    text += [COLUMNS.format("source", "setup", "name", "metric", "published", "ours", "difference")]
    for row, ours, off in results:
        shown = f"{off:+.1f}%" if table.relative else f"{off:+.4f}"
        numbers = (f"{row.published:.4f}", f"{ours:.4f}", shown)
        text.append(COLUMNS.format(row.source, row.setup, row.name, row.metric, *numbers))
    for metric, (mean, worst) in summary(results).items():
        digits = 1 if table.relative else 4
        text.append(f"{metric}: mean {mean:.{digits}f}{unit}, worst {worst:+.{digits}f}{unit}")
    for metric, (mean, worst) in summary(results, fitted=True).items():
        text.append(f"{metric}, rows fitted to: mean {mean:.{digits}f}{unit}, worst {worst:+.{digits}f}{unit}")
    return text


def main(names: Sequence[str]) -> int:
    for name in names:
        if name not in TABLES:
            near = nearest_name(name, TABLES)
            print(f"table {name!r} is unknown (nearest {near or next(iter(TABLES))!r}; known {', '.join(TABLES)})",
                  file=sys.stderr)  # fmt: skip
            return 2
    for name in names or TABLES:
        print("\n".join(lines(TABLES[name])), flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
