"""A band: between which figures a measurement of a predicted one is expected, and what that rests on.

A residual is log(measured / predicted) of a figure that was predicted and then measured. Residuals of one class (the
quantity, the grade of the prices that the prediction rests on, the kind of device, the kind of workload) make the band
of the next prediction of that class: see profiles_db.bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

LEVEL = 0.9  # of bands that are shown: the share of measurements that fall inside
STEP, PREFILL, TOKEN, PEAK = "step time", "prefill", "decoded token", "peak memory"
TIMES = (STEP, PREFILL, TOKEN)
COUNTED, STATED, CALIBRATED = "counted", "stated", "calibrated"
# What a prediction rests on, the surest first. `counted`: bytes of a program, which no price goes into.
GRADES = (COUNTED, "measured", "interpolated", CALIBRATED, "extrapolated", "datasheet")

# Metrics of predicted and measured figures: the quantity, and whether more of the metric is less of the quantity.
METRICS: Mapping[str, tuple[str, bool]] = {
    "step s": (STEP, False),
    "step ms": (STEP, False),
    "tokens/s": (STEP, True),
    "MFU %": (STEP, True),
    "TFLOP/s a GPU": (STEP, True),
    "prefill s": (PREFILL, False),
    "prefill ms": (PREFILL, False),
    "decoded token s": (TOKEN, False),
    "decoded token ms": (TOKEN, False),
    "TPOT ms": (TOKEN, False),
    "peak bytes": (PEAK, False),
    "peak MiB": (PEAK, False),
    "peak GiB": (PEAK, False),
    "peak ratio": (PEAK, False),  # predicted / measured, of a measured one: where only the error was printed
}


@dataclass(frozen=True)
class Kind:
    """The class that a residual is of."""

    quantity: str  # STEP | PREFILL | TOKEN | PEAK
    grade: str  # one of GRADES
    device: str  # cpu | cuda | ...
    workload: str  # train | generate

    def __str__(self) -> str:
        return f"{self.quantity}, {self.grade}, {self.device}, {self.workload}"


@dataclass(frozen=True)
class Residual:
    """`value` is log(measured / predicted) of the quantity; `row` names the plan and work that it is of, and says for
    ever which half it belongs to; `origin` is where it was kept (see profiles_db.bands)."""

    kind: Kind
    value: float
    row: str
    origin: str


@dataclass(frozen=True)
class Band:
    """`level` of measurements are expected from `low` to `high`, both in the figure's own unit.

    `rests_on` is the grade of the prediction. `residuals` made the band, and `pool` says in words of which classes:
    pooled where there were too few of the figure's own.
    """

    low: float
    high: float
    level: float
    rests_on: str
    residuals: int
    pool: str
    pooled: bool

    def holds(self, measured: float) -> bool:
        """Whether what was measured fell inside."""
        return self.low <= measured <= self.high

    def times(self, factor: float) -> Band:
        """The band of the figure in another unit."""
        return replace(self, low=self.low * factor, high=self.high * factor)

    def inverse(self, factor: float) -> Band:
        """The band of `factor` over the figure."""
        return replace(self, low=factor / self.high, high=factor / self.low)

    def to_dict(self) -> dict[str, Any]:
        """The form in JSON."""
        return {
            "interval": [self.low, self.high],
            "level": self.level,
            "rests_on": self.rests_on,
            "residuals": self.residuals,
            "pool": self.pool,
            "pooled": self.pooled,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Band:
        """The inverse."""
        low, high = raw["interval"]
        return cls(low, high, raw["level"], raw["rests_on"], raw["residuals"], raw["pool"], raw["pooled"])


def mostly(shares: Mapping[str, float]) -> str:
    """The grade that most of a prediction rests on; STATED where no price went into it."""
    return max(shares, key=lambda grade: shares[grade]) if shares else STATED


def residual(
    metric: str, predicted: float, measured: float, *, grade: str, device: str, workload: str, row: str, origin: str
) -> Residual | None:
    """The residual of a figure; None for a metric, grade or value that has none."""
    if metric not in METRICS or grade not in GRADES or not device or not min(predicted, measured) > 0:
        return None
    quantity, inverse = METRICS[metric]
    value = math.log(measured / predicted)
    kind = Kind(quantity, grade, device, workload)
    return Residual(kind, -value if inverse else value, f"{row}\0{quantity}", origin)
