"""A validation: what was predicted beside what was measured, row by row, and what the rows say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from autotune.spec.band import CALIBRATED, STATED

TIME, MEMORY, OTHER = "time", "memory", "other"


def kind_of(metric: str) -> str:
    """time | memory | other, by the unit that a metric's name ends with."""
    unit = metric.rpartition(" ")[2]
    return {"s": TIME, "ms": TIME, "bytes": MEMORY, "GiB": MEMORY}.get(unit, OTHER)


def row_name(table: str, setup: str, name: str) -> str:
    """What names a row wherever it is kept: the same plan of the same work, whenever it is measured."""
    return "\n".join((table, setup, name))


@dataclass(frozen=True)
class Judgement:
    """One figure, predicted and measured in the metric's unit.

    `grade` is what most of the prediction rests on, `shares` all of it: measured, interpolated, extrapolated,
    datasheet, or stated where the durations are the source's. `calibrated`: with coefficients that were fitted to runs;
    a `fitted` row is one of those runs, and never judged. `case`: rows of one case are alternatives, of which the least
    is the best. `relative`: the error is a fraction of the measured value, else a difference in the metric's own unit.
    `device` (cpu | cuda) and `workload` (train | generate) are of what was measured; "" in rows of earlier versions.
    `interval`: between what the measured value was expected, of a row that bands are judged by; None of one that makes
    them.
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
    device: str = ""
    workload: str = ""
    interval: tuple[float, float] | None = None

    @property
    def rests_on(self) -> str:
        """The grade that the row's band is of."""
        return CALIBRATED if self.calibrated else self.grade

    @property
    def inside(self) -> bool | None:
        """Whether the measured value fell into the interval; None without one."""
        return None if self.interval is None else self.interval[0] <= self.measured <= self.interval[1]

    @property
    def error(self) -> float:
        """Predicted / measured - 1, or predicted - measured."""
        return self.predicted / self.measured - 1 if self.relative else self.predicted - self.measured

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error, "inside": self.inside}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Judgement:
        known = {key: value for key, value in raw.items() if key not in ("error", "inside")}
        return cls(**known | {"interval": tuple(known["interval"]) if known.get("interval") else None})


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
class Coverage:
    """How many judged rows of one class fell into the band that other rows make for them.

    `residuals` made the band, `pool` says of which class; `band` is the least and the most of measured / predicted.
    `low` and `high` are what the true share may be by the binomial at 95 %, were the rows independent.
    """

    quantity: str
    grade: str
    device: str
    workload: str
    level: float
    residuals: int
    pool: str
    band: tuple[float, float]
    judged: int
    inside: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.inside / self.judged

    @property
    def short(self) -> bool:
        """Whether chance does not explain how few fell inside."""
        return self.high < self.level

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share, "short": self.short}


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
    coverage: tuple[Coverage, ...] = ()
