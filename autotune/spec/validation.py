"""A validation: what was predicted beside what was measured, row by row, and what the rows say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TIME, MEMORY, OTHER = "time", "memory", "other"
STATED = "stated"  # the grade of what rests on the source's own durations, no price of ours


def kind_of(metric: str) -> str:
    """time | memory | other, by the unit that a metric's name ends with."""
    unit = metric.rpartition(" ")[2]
    return {"s": TIME, "ms": TIME, "bytes": MEMORY, "GiB": MEMORY}.get(unit, OTHER)


@dataclass(frozen=True)
class Judgement:
    """One figure, predicted and measured in the metric's unit.

    `grade` is what most of the prediction rests on, `shares` all of it: measured, interpolated, extrapolated,
    datasheet, or stated where the durations are the source's. `calibrated`: with coefficients that were fitted to runs;
    a `fitted` row is one of those runs, and never judged. `case`: rows of one case are alternatives, of which the least
    is the best. `relative`: the error is a fraction of the measured value, else a difference in the metric's own unit.
    """

    table: str
    source: str
    setup: str
    name: str
    metric: str
    predicted: float
    measured: float
    grade: str = STATED
    shares: Mapping[str, float] = field(default_factory=dict)
    fitted: bool = False
    case: str = ""
    traits: Mapping[str, int | str] = field(default_factory=dict)
    relative: bool = True
    calibrated: bool = False

    @property
    def error(self) -> float:
        """Predicted / measured - 1, or predicted - measured."""
        return self.predicted / self.measured - 1 if self.relative else self.predicted - self.measured

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Judgement:
        return cls(**{key: value for key, value in raw.items() if key != "error"})


@dataclass(frozen=True)
class Summary:
    """The rows of one table and metric, all judged or all fitted to.

    `tau` and `rho` (Kendall's tau-b, Spearman's rho) need eight rows; `regret` is what the plan predicted best took
    longer than the best measured, in the mean over `cases` of two rows or more, `worst_regret` the most; None: not to
    be told from these rows. `group`: the trait and value that the rows share; "": they are all.
    """

    table: str
    metric: str
    fitted: bool
    rows: int
    mean: float  # of the errors' sizes
    bias: float  # of the errors
    worst: float  # with its sign
    relative: bool = True
    tau: float | None = None
    rho: float | None = None
    regret: float | None = None
    worst_regret: float | None = None
    cases: int = 0
    group: str = ""

    @property
    def kind(self) -> str:
        return kind_of(self.metric)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kind": self.kind}


@dataclass(frozen=True)
class Validation:
    """The answer of `autotune validate`. `failed`: plans that did not run, and why."""

    suite: str
    machine: str  # where it ran, in words; for published figures what they were measured on
    profile: str  # what predicted, with its grade
    cost_model: str
    rows: tuple[Judgement, ...]
    summaries: tuple[Summary, ...]
    groups: tuple[Summary, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
