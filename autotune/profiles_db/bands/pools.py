"""Which residuals make the band of a prediction: those of its class, or the nearest wider pool that has enough.

A pool never holds a surer grade than the prediction's own: what a measured price is off by says nothing of a datasheet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp

from autotune.profiles_db.bands.conformal import interval
from autotune.spec.band import (
    CALIBRATED,
    COUNTED,
    GRADES,
    LEVEL,
    PEAK,
    PREFILL,
    STEP,
    TIMES,
    TOKEN,
    Band,
    Kind,
    Residual,
    mostly,
)
from autotune.spec.machine import Profile
from autotune.spec.prediction import Prediction

# Where a residual was kept: the plan database, predicted by this version of the cost model; the same by another
# version; the file that ships. Of one row the first of these counts.
HERE, BEFORE, SHIPPED = "here", "before", "shipped"
ORIGINS = (HERE, BEFORE, SHIPPED)


@dataclass(frozen=True)
class Pool:
    """A choice of residuals: `words` say which, `takes` whether a residual is of it for a figure of that kind."""

    words: str
    takes: Callable[[Kind, Residual], bool]
    pooled: bool = True


def _own(kind: Kind, r: Residual) -> bool:
    return r.kind == kind


def _quantity(kind: Kind, r: Residual) -> bool:
    return r.kind.quantity == kind.quantity


def _family(kind: Kind, r: Residual) -> bool:
    """Times with times, memory with memory."""
    return (r.kind.quantity in TIMES) == (kind.quantity in TIMES)


def _grade(kind: Kind, r: Residual) -> bool:
    return r.kind.grade == kind.grade


def _weaker(kind: Kind, r: Residual) -> bool:
    return GRADES.index(r.kind.grade) >= GRADES.index(kind.grade)


def _device(kind: Kind, r: Residual) -> bool:
    return r.kind.device == kind.device


def _workload(kind: Kind, r: Residual) -> bool:
    return r.kind.workload == kind.workload


def _all(*conditions: Callable[[Kind, Residual], bool]) -> Callable[[Kind, Residual], bool]:
    return lambda kind, r: all(condition(kind, r) for condition in conditions)


# The narrowest first. A line here is all that a further pool takes.
POOLS: tuple[Pool, ...] = (
    Pool("its class, in this plan database", lambda kind, r: r.origin == HERE and r.kind == kind, pooled=False),
    Pool("its class", _own, pooled=False),
    Pool("all figures of its grade, device and workload", _all(_family, _grade, _device, _workload)),
    Pool("all workloads", _all(_quantity, _grade, _device)),
    Pool("all figures of its grade and device", _all(_family, _grade, _device)),
    Pool("all devices", _all(_family, _grade)),
    Pool("its grade and weaker ones", _all(_family, _weaker, _device, _workload)),
    Pool("its grade and weaker ones, all workloads", _all(_family, _weaker, _device)),
    Pool("its grade and weaker ones, all devices", _all(_family, _weaker)),
)


class Bands:
    """Bands of one level from stated residuals."""

    def __init__(self, residuals: Iterable[Residual], level: float = LEVEL) -> None:
        self.level = level
        self.residuals = distinct(residuals)
        self._known: dict[tuple[Kind, str], Band | None] = {}

    def ratio(self, kind: Kind, but: str = "") -> Band | None:
        """The band of measured / predicted. `but`: a row whose own residuals stay out. None: too few everywhere."""
        if (kind, but) not in self._known:
            self._known[kind, but] = self._ratio(kind, but)
        return self._known[kind, but]

    def _ratio(self, kind: Kind, but: str) -> Band | None:
        if kind.grade not in GRADES:
            return None
        others = [r for r in self.residuals if not but or r.row.partition("\0")[0] != but]
        for pool in POOLS:
            values = [r.value for r in others if pool.takes(kind, r)]
            found = interval(values, self.level)
            if found is not None:
                low, high = map(exp, found)
                return Band(low, high, self.level, kind.grade, len(values), pool.words, pool.pooled)
        return None

    def upon(self, prediction: Prediction, profile: Profile, workload: str, but: str = "") -> Prediction:
        """The prediction with a band for each figure: step_s, tokens_per_s, prefill_s, decode_s, and peak_bytes, which
        is of the fullest rank."""
        rests = rests_on(prediction, profile)
        peak = max(prediction.peak_bytes, default=0)
        figures = {
            "step_s": (STEP, rests, prediction.step_s),
            "prefill_s": (PREFILL, rests, prediction.prefill_s),
            "decode_s": (TOKEN, rests, prediction.decode_s),
            "peak_bytes": (PEAK, COUNTED, float(peak)),
        }
        bands: dict[str, Band] = {}
        for name, (quantity, grade, value) in figures.items():
            ratio = self.ratio(Kind(quantity, grade, profile.device.kind, workload), but) if value > 0 else None
            if ratio:
                bands[name] = ratio.times(value)
                if name == "step_s":
                    bands["tokens_per_s"] = ratio.inverse(prediction.tokens_per_s)
        return replace(prediction, bands=bands)


def rests_on(prediction: Prediction, profile: Profile) -> str:
    """The grade of a prediction's times: what most of it rests on, or that its profile was calibrated."""
    # A profile's grade of that name is the same word.
    return CALIBRATED if profile.grade == CALIBRATED else mostly(prediction.grades)


def distinct(residuals: Iterable[Residual]) -> Sequence[Residual]:
    """One residual a row and quantity: plans that run again and again are one observation. The surest origin wins, and
    of one origin the first."""
    found: dict[tuple[str, Kind], Residual] = {}
    for residual in sorted(residuals, key=lambda r: ORIGINS.index(r.origin)):
        found.setdefault((residual.row, residual.kind), residual)
    return tuple(found.values())
