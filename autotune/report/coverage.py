"""How often bands held what they promise, as cells of a table."""

from __future__ import annotations

from autotune.report.bands import judged
from autotune.report.units import percent
from autotune.spec.validation import Coverage

COVERAGE = "of rows that bands were not made from, those inside; by the binomial the true share is in the last column"
COVERAGE_HEAD = ("quantity", "rests on", "of", "made from", "measured / predicted", "inside", "at 95 %", "")


def coverage_cells(part: Coverage) -> list[str]:
    """The cells under COVERAGE_HEAD."""
    return [
        part.quantity,
        part.grade,
        f"{part.device}, {part.workload}",
        f"{part.residuals} of {part.pool}",
        f"{part.band[0]:.3f} to {part.band[1]:.3f}",
        judged(part.inside, part.judged),
        f"{percent(part.low)} to {percent(part.high)}",
        f"short of {100 * part.level:g} %" if part.short else "",
    ]
