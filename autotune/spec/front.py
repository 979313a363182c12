"""A Pareto front: the plans of a search that no other is as good as in every objective, and how complete they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any

from autotune.spec.objectives import KNEE, OBJECTIVES, Rate
from autotune.spec.plan import Plan


@dataclass(frozen=True)
class FrontPoint:
    """A plan of a front. `values`: one an objective, as users read them (seconds, bytes, tokens a second, the price's
    currency, joules); `step_s`, `peak_bytes`: as predicted, of the fullest device."""

    plan: Plan
    values: tuple[float, ...]
    step_s: float
    peak_bytes: int
    roles: tuple[str, ...] = ()  # "locked", "knee", "best step_time"

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "plan_id": self.plan.id,
            "devices": self.plan.world,
            "values": list(self.values),
            "step_s": self.step_s,
            "peak_bytes": self.peak_bytes,
            "roles": list(self.roles),
        }


@dataclass(frozen=True)
class Front:
    """`points` by the first objective, the best first.

    `tolerance`: of every plan of the space one of the points is at most this share worse in every objective. `missing`:
    of the volume that may be dominated the share that is not proven to be; 0 where the search came to its end, None
    where plans were left that nobody has bounded. `pruned`: plans left because their bounds were dominated.
    """

    objectives: tuple[str, ...]
    points: tuple[FrontPoint, ...]
    prefer: str
    tolerance: float
    missing: float | None
    pruned: int
    rates: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def locked(self) -> FrontPoint:
        return next(point for point in self.points if "locked" in point.roles)

    def to_dict(self) -> dict[str, Any]:
        return {
            "objectives": list(self.objectives),
            "points": [point.to_dict() for point in self.points],
            "prefer": self.prefer,
            "tolerance": self.tolerance,
            "missing": self.missing,
            "pruned": self.pruned,
            "rates": {name: rate.to_dict() for name, rate in self.rates.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "front") -> Front:
        """The inverse of `to_dict`. Raises UsageError, KeyError, TypeError or ValueError for what `to_dict` did not
        make."""
        points = tuple(
            FrontPoint(
                Plan.from_dict(dict(one["plan"]), f"{source}: points.{number}"),
                tuple(map(float, one["values"])),
                float(one["step_s"]),
                int(one["peak_bytes"]),
                tuple(map(str, one["roles"])),
            )
            for number, one in enumerate(raw["points"])
        )
        objectives = tuple(map(str, raw["objectives"]))
        if not points or sum("locked" in point.roles for point in points) != 1:
            raise ValueError("one of the points must be the locked one")
        if {*objectives} - OBJECTIVES.keys() or any(len(point.values) != len(objectives) for point in points):
            raise ValueError(f"each point must have a value of each objective, and these be of {list(OBJECTIVES)}")
        return cls(
            objectives,
            points,
            str(raw["prefer"]),
            float(raw["tolerance"]),
            None if raw["missing"] is None else float(raw["missing"]),
            int(raw["pruned"]),
            {str(name): Rate(**rate) for name, rate in raw["rates"].items()},
        )


def knee(vectors: Sequence[Sequence[float]]) -> int | None:
    """Which point of a front is nearest to the best of every objective at once, each scaled to run from 0 at its best to
    1 at its worst; None of fewer than three, where none lies between the ends."""
    if len(vectors) < 3:
        return None
    columns = list(zip(*vectors, strict=True))
    least, span = [min(c) for c in columns], [max(c) - min(c) for c in columns]

    def far(vector: Sequence[float]) -> float:
        return hypot(*((v - low) / wide if wide else 0.0 for v, low, wide in zip(vector, least, span, strict=True)))

    return min(range(len(vectors)), key=lambda n: far(vectors[n]))


def preferred(prefer: str, objectives: Sequence[str], vectors: Sequence[Sequence[float]]) -> int:
    """Which of a front's vectors (the less the better) is to be locked: the knee, or the best of an objective, ties by
    the other objectives. Without a knee it is the best of the first objective."""
    if prefer == KNEE and (middle := knee(vectors)) is not None:
        return middle
    lead = objectives.index(prefer) if prefer in objectives else 0
    return min(range(len(vectors)), key=lambda n: (vectors[n][lead], *vectors[n]))
