"""Trials: plans looked at in stages, each dearer than the last, in this process or on every core.

A plan is left at the first stage that shows that it cannot fit, or that others are more promising: two looks at its
ranks alone, its program's memory, its simulated time.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from autotune.planners.alone import LOOKS, Alone
from autotune.planners.parent import follower
from autotune.planners.predict import TooLarge, TooSlow
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction

PARALLEL_FROM = 0.25  # seconds of trials left that are worth two processes

Outcome = Prediction | TooLarge | TooSlow


class Trial(NamedTuple):
    """A plan to try, and what makes it of no use, in seconds.

    `look`: the first of the looks at its ranks alone that it has not had. `wanted`: what is to be beaten. `limit`: from
    here on the step need not be told. `patience`: from here on others come first, if this is its bound.
    """

    plan: Plan
    look: int = 0
    wanted: float = float("inf")
    limit: float = float("inf")
    patience: float = float("inf")


@dataclass(frozen=True)
class Worker:
    """What tries plans; processes that are forked have it with all that is priced already."""

    alone: Alone

    def run(self, trial: Trial) -> Outcome:
        plan, first, wanted, limit, patience = trial
        predictor = self.alone.bounder.predictor
        if predictor.workload.kind != "train":
            return predictor.predict(plan, timeline=False)
        for look in range(first, LOOKS):
            found = self.alone.look(plan, look, enough=wanted)
            if isinstance(found, TooLarge) or found.seconds > patience:
                return found
        return predictor.attempt(plan, self.alone.allowed, limit)


_WORKER: Worker | None = None


def _run(trial: Trial) -> Outcome:
    assert _WORKER is not None
    return _WORKER.run(trial)


class Workers:
    """Runs trials in this process until that gets slow, then on every core."""

    def __init__(self, worker: Worker) -> None:
        global _WORKER
        _WORKER = worker
        self.pool: ProcessPoolExecutor | None = None
        self.rate = 0.0  # seconds a trial

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def run(self, trials: Sequence[Trial], waiting: int) -> Iterator[Outcome]:
        """The outcome of each trial, in order; `waiting` more may follow."""
        cores = len(os.sched_getaffinity(0))
        if (
            self.pool is None
            and cores > 1
            and self.rate * waiting > PARALLEL_FROM
            and "fork" in mp.get_all_start_methods()
        ):
            # Forked, so that what is already priced is shared; nothing here has threads.
            self.pool = ProcessPoolExecutor(cores, mp.get_context("fork"), follower())
        begin = time.monotonic()
        if self.pool is not None:
            yield from self.pool.map(_run, trials)  # one by one: they differ a lot in how long they take
        else:
            yield from map(_run, trials)
        self.rate = (time.monotonic() - begin) / max(len(trials), 1)
