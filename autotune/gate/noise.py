"""How much launches of one program differ, from launches that the plan database keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import mean, median
from typing import TYPE_CHECKING

from autotune.gate.rule import LEAST

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the logarithm of a launch's median step, within a run (about the fraction of it), and of a
    run's mean from another's of the same plan and work, beyond what the former explains."""

    launch: float
    drift: float
    runs: int
    launches: int


def noise_of(groups: Sequence[Sequence[Sequence[float]]]) -> Noise:
    """Of groups of runs, each of the same plan, model, work and machine; a run is its launches' median seconds.

    Pooled within runs; between runs of a group the variance of means, less the launches' share (one-way analysis of
    variance: Searle, Casella and McCulloch, "Variance Components", 1992, section 3.6), not below 0. Raises ValueError
    where no run has LEAST launches.
    """
    within, freedom, between, pairs, runs, launches = 0.0, 0, 0.0, 0, 0, 0
    for group in groups:
        logs = [[log(seconds) for seconds in run] for run in group if len(run) >= LEAST]
        for run in logs:
            within += sum((value - mean(run)) ** 2 for value in run)
            freedom += len(run) - 1
            launches += len(run)
        runs += len(logs)
        if len(logs) > 1:
            means = [mean(run) for run in logs]
            between += sum((value - mean(means)) ** 2 for value in means)
            pairs += len(logs) - 1
    if not freedom:
        raise ValueError(f"no run has {LEAST} launches or more")
    each = within / freedom
    share = each * runs / launches
    drift = max(0.0, between / pairs - share) if pairs else 0.0
    return Noise(sqrt(each), sqrt(drift), runs, launches)


def stored_groups(store: Store, limit: int = 1000) -> list[list[list[float]]]:
    """The finished runs of the plan database with LEAST launches or more, grouped by plan, model, work and machine."""
    groups: dict[tuple[str, str, str, str], list[list[float]]] = {}
    for run in store.runs(limit):
        medians = [median(launch.steps) for launch in run.launches if launch.steps]
        if run.status == "finished" and len(medians) >= LEAST:
            key = (run.plan.digest, run.model.digest, run.workload.digest, run.machine)
            groups.setdefault(key, []).append(medians)
    return list(groups.values())
