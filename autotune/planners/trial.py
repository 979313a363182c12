"""Trials: plans looked at in stages, each dearer than the last, in this process or on every core.

A plan is left at the first stage that shows that it cannot fit, or that others are more promising: two looks at its
ranks alone, its program's memory, its simulated time.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from autotune.planners.alone import LOOKS, Alone
from autotune.planners.parent import follower, uninterrupted
from autotune.planners.predict import TooLarge, TooSlow
from autotune.planners.resolve import uncollected
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction

PARALLEL_FROM = 0.25  # seconds of trials left that are worth two processes

Outcome = Prediction | TooLarge | TooSlow


class Trial(NamedTuple):
    """A plan to try, and what makes it of no use, in seconds.

    `look`: the first of the looks at its ranks alone that it has not had. `wanted`: what is to be beaten. `limit`: from
    here on the step need not be told. `patience`: from here on others come first, if this is its bound. `allowed`:
    bytes of a device, in place of what all plans are allowed. `stairs`: pairs of seconds and bytes; a plan that takes
    at least both of one is of no use.
    """

    plan: Plan
    look: int = 0
    wanted: float = float("inf")
    limit: float = float("inf")
    patience: float = float("inf")
    allowed: int | None = None
    stairs: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Worker:
    """What tries plans; processes that are forked have it with all that is priced already."""

    alone: Alone

    def run(self, trial: Trial) -> Outcome:
        plan, first, wanted, limit, patience, allowed, stairs = trial
        predictor = self.alone.bounder.predictor
        if predictor.workload.kind != "train":
            return predictor.predict(plan, timeline=False)
        for look in range(first, LOOKS):
            found = self.alone.look(plan, look, wanted, allowed)
            if isinstance(found, TooLarge) or found.seconds > patience:
                return found
            if any(found.seconds >= seconds and found.bytes >= size for seconds, size in stairs):
                return found
        return predictor.attempt(plan, self.alone.allowed if allowed is None else allowed, limit)


_WORKER: Worker | None = None


def _run(trials: Sequence[Trial]) -> list[Outcome]:
    assert _WORKER is not None
    with uncollected():
        return list(map(_WORKER.run, trials))


def _forked() -> ProcessPoolExecutor:
    """A process that shares what is already priced; nothing here has threads."""
    pool = ProcessPoolExecutor(1, mp.get_context("fork"), follower())
    pool.submit(int)  # the first task is what starts it
    return pool


def order_of(plan: Plan) -> tuple[object, ...]:
    """The axes that say which order a plan's steps have: plans with one order are best tried by one process, which
    then has it already."""
    return (
        plan.schedule,
        plan.split,
        plan.pipeline,
        plan.chunks,
        plan.data * plan.micro_batch,
        plan.vocabulary,
        plan.tensor,
    )


class Workers:
    """Runs trials in this process until that gets slow, then on every core."""

    def __init__(self, worker: Worker) -> None:
        global _WORKER
        _WORKER = worker
        self.pools: list[ProcessPoolExecutor] = []  # of one process each
        self.owner: dict[tuple[object, ...], int] = {}  # order -> which of them has it
        self.rate = 0.0  # seconds a trial

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def run(self, trials: Sequence[Trial], waiting: int) -> list[Outcome]:
        """The outcome of each trial, in order; `waiting` more may follow."""
        cores = len(os.sched_getaffinity(0))
        if (
            not self.pools
            and cores > 1
            and self.rate * waiting > PARALLEL_FROM
            and "fork" in mp.get_all_start_methods()
        ):
            with uninterrupted():
                self.pools = [_forked() for _ in range(cores)]
        begin = time.monotonic()
        found = self._shared_out(trials) if self.pools else _run(trials)
        self.rate = (time.monotonic() - begin) / max(len(trials), 1)
        return found

    def _shared_out(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Every process gets the trials of the orders that it has, and of new ones those that even out the rest."""
        by_order: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for number, trial in enumerate(trials):
            by_order[order_of(trial.plan)].append(number)
        shares: list[list[int]] = [[] for _ in self.pools]
        for order, numbers in sorted(by_order.items(), key=lambda each: each[0] not in self.owner):
            least = min(range(len(shares)), key=lambda n: len(shares[n]))
            shares[self.owner.setdefault(order, least)] += numbers
        tasks = [pool.submit(_run, [trials[n] for n in share]) for pool, share in zip(self.pools, shares, strict=True)]
        found = dict[int, Outcome]()
        for share, task in zip(shares, tasks, strict=True):
            found |= zip(share, task.result(), strict=True)
        return [found[number] for number in range(len(trials))]
