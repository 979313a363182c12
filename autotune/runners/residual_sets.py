"""`python -m autotune.runners.residual_sets [docs/accuracy.md]`: writes the residuals that ship with the package.

Two sources: tables of predicted against measured in the page, which were printed by the commands above them on machines
that are not at hand; and the published tables, replayed here and now, but for rows that coefficients were fitted to.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.planners.replay.tables import TABLES
from autotune.profiles_db.bands.shipped import FILE, SCHEMA
from autotune.runners.validating import of_table
from autotune.spec.band import COUNTED, METRICS, STATED

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
REPLAY = "autotune validate --suite papers"
BEFORE = "(before"  # marks rows that an earlier predictor made, whose faults the page tells

# By the headings of the page's tables: (metric, column predicted, column measured). A column of both has "a / b".
STEPS = (("step ms", "predicted ms", "measured ms"),)
MIB = ("peak MiB", "predicted MiB", "measured MiB")
RATIO = ("peak ratio", "memory error", "")  # a signed percentage
PASSES = (("prefill ms", "prefill", ""), ("decoded token ms", "a token", ""), RATIO)
PARTS = (
    ("prefill ms", "predicted prefill ms", "measured"),
    ("decoded token ms", "predicted ms a token", "measured (median)"),
    RATIO,
)
LATER = (*PARTS[:1], ("decoded token ms", "predicted ms a token", "measured+"), RATIO)
RATES = (("tokens/s", "predicted tokens/s", "measured"),)


@dataclass(frozen=True)
class Source:
    """A table of the page: under which heading the how manyth, of which suite and model, and how its columns are read.
    `names`: the columns that name a plan, as the suite's rows are named where the page says as much."""

    heading: str
    number: int
    table: str
    setup: str
    device: str
    workload: str
    date: str
    metrics: Sequence[tuple[str, str, str]]
    names: Sequence[str] = ("plan",)
    only: str = ""  # how the names of its rows begin


CPU, TRAINED, SERVED = ("cpu", "train"), ("cuda", "train"), ("cuda", "generate")
LLAMA_1B, LLAMA_8B = "meta-llama--Llama-3.2-1B", "meta-llama--Llama-3.1-8B"
NOBODY, SAME, DECODING = "Plans that nobody", "The same on 2026-11-24", "One H200: decoding"
SOURCES = (
    Source("Two CPU cores", 0, "cpu", "llama-7m", *CPU, "2026-11-29", (*STEPS, MIB)),
    Source("The same machine, a model", 0, "cpu-held-out", "qwen-4m", *CPU, "2026-11-29", (*STEPS, MIB)),
    Source("Four gloo ranks", 0, "cpu-schedules", "llama-51m", *CPU, "2026-11-24", (*STEPS, MIB)),
    Source("One H200: the Llama-3.2-1B", 0, "h200", LLAMA_1B, *TRAINED, "2026-11-28", (*STEPS, MIB)),
    Source(NOBODY, 0, "h200-qwen3", "", *TRAINED, "2026-11-28", (*STEPS, RATIO), ("model", "plan"), "Qwen3-0.6B"),
    Source(NOBODY, 1, "h200-qwen2.5", "", *TRAINED, "2026-11-30", (*STEPS, RATIO), ("model", "plan")),
    Source("Two H200: the Llama-3.2-1B", 0, "h200x2", LLAMA_1B, *TRAINED, "2026-11-28", (*STEPS, MIB)),
    Source("Two H200: pipeline", 0, "h200x2-schedules", "llama-1b-untied", *TRAINED, "2026-11-28", (*STEPS, MIB)),
    Source("Llama-3.1-8B on", 0, "h200-8b", LLAMA_8B, *SERVED, "2026-11-30", PASSES, ("prompt x sequences", "kernels")),
    Source(SAME, 0, "h200-generate", "", *SERVED, "2026-11-24", PARTS, ("shape", "batch")),
    Source(SAME, 1, "h200-generate", "", *SERVED, "2026-11-29", LATER, ("shape", "at once", "kernels")),
    Source(DECODING, 0, "h200-decoding", "byte-85m", *SERVED, "2026-11-29", RATES, ("batch", "decoding")),
    Source(DECODING, 1, "h200-heads", "byte-85m", *SERVED, "2026-11-29", RATES, ("decoding",)),
)


def tables_under(page: str, heading: str) -> list[list[list[str]]]:
    """The tables of the section whose heading begins so, up to the next heading: rows of cells, the head first."""
    parts = re.split(r"^#+ (.*)$", page, flags=re.MULTILINE)
    sections = [body for title, body in zip(parts[1::2], parts[2::2], strict=True) if title.startswith(heading)]
    if len(sections) != 1:
        raise ValueError(f"found {len(sections)} sections {heading!r}; expected one")
    found: list[list[list[str]]] = []
    last = ""
    for line in sections[0].splitlines():
        if line.startswith("|"):
            if not last.startswith("|"):
                found.append([])
            if not set(line) <= set("|-"):
                found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        last = line
    return found


def rows_of(page: str, source: Source) -> Iterator[list[Any]]:
    """`[setup, name, metric, predicted, measured]` of every row and metric."""
    head, *rows = tables_under(page, source.heading)[source.number]
    for row in rows:
        name = " ".join(row[head.index(column)] for column in source.names)
        if BEFORE in name or not name.startswith(source.only):
            continue
        for metric, said, ran in source.metrics:
            yield [source.setup, name, metric, *_pair(head, row, said, ran)]


def _pair(head: Sequence[str], row: Sequence[str], said: str, ran: str) -> tuple[float, float]:
    """(predicted, measured). `measured+`: the column of that name that comes last."""
    cell = row[head.index(said)]
    if not ran and cell.endswith("%"):
        return round(1 + float(cell.rstrip("% ")) / 100, 4), 1.0
    if not ran:
        first, second = cell.split("/")
        return float(first), float(second)
    at = len(head) - 1 - list(reversed(head)).index(ran[:-1]) if ran.endswith("+") else head.index(ran)
    return float(cell), float(row[at])


def printed(page: str) -> Iterator[dict[str, Any]]:
    """The sets of the page."""
    for source in SOURCES:
        yield {
            "table": source.table,
            "source": f"docs/accuracy.md, {source.heading}…, table {source.number + 1}, {source.date}",
            "device": source.device,
            "workload": source.workload,
            "grade": "measured",  # the operations of every plan were measured before it was predicted
            "peaks": COUNTED,
            "rows": list(rows_of(page, source)),
        }


def replayed() -> Iterator[dict[str, Any]]:
    """The sets of the published tables whose durations are ours."""
    for name, table in TABLES.items():
        judged = (of_table(name, each) for each in table.rows() if not each.fitted)
        rows = [row for row in judged if row.grade != STATED and row.metric in METRICS]
        if rows:
            (grade,) = {row.rests_on for row in rows}
            yield {
                "table": name,
                "source": f"{rows[0].source}; `{REPLAY}`",
                "device": table.device,
                "workload": table.workload,
                "grade": grade,
                "peaks": grade,  # of other engines' allocators: not of what this one counts
                "rows": [[r.setup, r.name, r.metric, float(f"{r.predicted:.6g}"), r.measured] for r in rows],
            }


def text(sets: Sequence[dict[str, Any]]) -> str:
    """The file: a line a row, so that a diff reads."""
    parts = []
    for each in sets:
        head = {key: value for key, value in each.items() if key != "rows"}
        rows = ",\n   ".join(json.dumps(row) for row in each["rows"])
        parts.append(f'  {json.dumps(head)[:-1]}, "rows": [\n   {rows}\n  ]}}')
    return f'{{"schema": {json.dumps(SCHEMA)}, "sets": [\n' + ",\n".join(parts) + "\n]}\n"


def main(arguments: Sequence[str]) -> int:
    page = (Path(arguments[0]) if arguments else PAGE).read_text()
    FILE.write_text(text([*printed(page), *replayed()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
