"""Rows of suites and of published tables as judgements, and what judgements say together.

Nothing here measures anything: a suite's rows are those of `runners.suite`, a table's are `planners.replay`'s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from autotune.planners.replay.calibration import DATA
from autotune.planners.replay.row import Row as Published
from autotune.planners.replay.tables import TABLES
from autotune.runners.agreement import kendall_tau, regrets, spearman_rho
from autotune.runners.ledger import Row
from autotune.runners.suites import Suite
from autotune.spec.band import COUNTED, mostly
from autotune.spec.digest import digest
from autotune.spec.plan import Plan
from autotune.spec.validation import TIME, Judgement, Summary, kind_of

ORDERED = 8  # rows that are enough to judge an order by
PAPERS = "papers"  # every published table

# Of a suite's row: the metric, and what the row calls the prediction and the measurement.
MEASURED = (
    ("step s", "predicted_s", "measured_s"),
    ("peak bytes", "predicted", "measured"),
    ("prefill s", "predicted_prefill_s", "prefill_s"),
    ("decoded token s", "predicted_decode_s", "decode_s"),
)


def of_suite(name: str, suite: Suite, rows: Iterable[Row]) -> Iterator[Judgement]:
    """The judgements of the rows that ran. Plans of a suite are alternatives, of which its step time chooses one."""
    for row in rows:
        if "failed" in row or not row["medians"]:
            continue
        for metric, said, ran in MEASURED:
            if row.get(ran):
                grade = mostly(row.get("grades", {}))
                case = name if metric == "step s" and not suite.check else ""
                yield Judgement(
                    name,
                    "measured here",
                    suite.model.name,
                    row["plan"],
                    metric,
                    float(row[said]),
                    float(row[ran]),
                    # Peaks are counted, not priced: nothing of a profile goes into them.
                    COUNTED if metric == "peak bytes" else grade,
                    {} if metric == "peak bytes" else row.get("grades", {}),
                    case=case,
                    device=suite.device,
                    workload=suite.workload.kind,
                )


def failures(rows: Iterable[Row]) -> dict[str, str]:
    return {row["plan"]: str(row["failed"]) for row in rows if "failed" in row}


def of_table(name: str, row: Published) -> Judgement:
    """A published figure beside ours."""
    found = row.found()
    shares = dict(row.rests())
    return Judgement(
        name,
        row.source,
        row.setup,
        row.name,
        row.metric,
        found,
        row.published,
        mostly(shares),
        shares,
        row.fitted,
        row.case,
        dict(row.traits),
        TABLES[name].relative,
        row.calibrated,
        TABLES[name].device,
        TABLES[name].workload,
    )


def chosen_tables(name: str) -> tuple[str, ...]:
    """The published tables that a suite's name means: all, one, or none."""
    if name == PAPERS:
        return tuple(TABLES)
    return (name,) if name in TABLES else ()


def published_question(names: Sequence[str], cost_model: str) -> str:
    """A digest of what the answer depends on: which tables, their files and our own source."""
    files = {path.name: digest(path.read_text()) for path in sorted(Path(DATA).iterdir()) if path.is_file()}
    return digest(["published", list(names), files, cost_model])


def suite_question(name: str, plans: Sequence[Plan], facts: Mapping[str, object]) -> str:
    """A digest of what the rows depend on: plans, profile, machine, cost model, and how often plans run."""
    return digest(["suite", name, [plan.digest for plan in plans], dict(facts)])


def summaries(rows: Sequence[Judgement]) -> list[Summary]:
    """One a table and metric, in the order of the rows; rows that were fitted to apart, after the judged ones."""
    parts: dict[tuple[str, str, bool], list[Judgement]] = {}
    for row in rows:
        parts.setdefault((row.table, row.metric, row.fitted), []).append(row)
    return [summed(part) for part in parts.values()]


def groups(rows: Sequence[Judgement]) -> list[Summary]:
    """The same of judged rows that share a trait, for tables whose rows have traits."""
    parts: dict[tuple[str, str, str, int | str], list[Judgement]] = {}
    for row in rows:
        if not row.fitted:
            for trait, value in row.traits.items():
                parts.setdefault((row.table, row.metric, trait, value), []).append(row)
    ordered = sorted(parts.items(), key=lambda item: (*item[0][:3], str(item[0][3]).rjust(12)))
    return [summed(part, f"{key[2]} {key[3]}") for key, part in ordered]


def summed(rows: Sequence[Judgement], group: str = "") -> Summary:
    """The summary of rows of one table and metric. At least one."""
    errors = [row.error for row in rows]
    predicted, measured = [row.predicted for row in rows], [row.measured for row in rows]
    ordered = len(rows) >= ORDERED
    costs = regrets((row.case, row.predicted, row.measured) for row in rows) if kind_of(rows[0].metric) == TIME else []
    return Summary(
        rows[0].table,
        rows[0].metric,
        rows[0].fitted,
        len(rows),
        statistics.fmean(map(abs, errors)),
        statistics.fmean(errors),
        max(errors, key=abs),
        rows[0].relative,
        known(kendall_tau(predicted, measured)) if ordered else None,
        known(spearman_rho(predicted, measured)) if ordered else None,
        statistics.fmean(costs) if costs else None,
        max(costs) if costs else None,
        len(costs),
        group,
    )


def known(value: float) -> float | None:
    return None if math.isnan(value) else value
