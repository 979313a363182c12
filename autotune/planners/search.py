"""The search: enumerate, bound, simulate best bound first, measure the most promising, say how good the answer is.

When the next bound is no better than the best simulated plan, the search is over and the answer is optimal under the
cost model. Ended early (budget, Ctrl-C), it reports the gap that is left.
"""

from __future__ import annotations

import heapq
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.measured import measure_best
from autotune.planners.parent import follower
from autotune.planners.predict import Predictor
from autotune.planners.space import Enumeration
from autotune.spec.errors import InfeasibleError
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Prediction, Question, Space

BATCH = 16  # plans simulated between two looks at the clock, and written to the database together
FIRST = 2  # before it is known how long one takes, and so whether another process is worth starting
PARALLEL_FROM = 0.25  # seconds of simulation left that are worth two processes
RANKED = 64  # predictions that the answer keeps


def limit_bytes(question: Question) -> int:
    """Device bytes that a plan may allocate on one rank: the share that is allowed, less the runtime's own."""
    device, sharing = question.profile.device, question.profile.sharing(question.devices)
    return int(device.memory_bytes * question.memory_fraction / sharing - device.context_bytes)


def objective(question: Question, prediction: Prediction) -> float:
    """What is minimised."""
    return {
        "step_time": prediction.step_s,
        "tokens_per_s": -prediction.tokens_per_s,
        "latency": prediction.step_s,
        "peak_memory": float(max(prediction.peak_bytes)),
    }[question.minimize]


@dataclass
class _State:
    """What a search knows so far."""

    question: Question
    simulated: list[Prediction] = field(default_factory=list)
    rejected: int = 0
    count: int = 0
    bounded: int = 0  # beyond those bounded before the first was simulated

    def best(self) -> Prediction | None:
        return min(self.simulated, key=lambda p: objective(self.question, p), default=None)


@dataclass(frozen=True)
class _Worker:
    """What simulates a plan; processes that are forked have it with all that is priced already."""

    bounder: Bounder
    allowed: int

    def simulate(self, plan: Plan) -> Prediction | _TooLarge:
        """The prediction; or, where the plan's order alone shows that it cannot fit, the bytes that it needs."""
        predictor = self.bounder.predictor
        if predictor.workload.kind == "train":
            least = self.bounder.ordered_memory(plan)
            if least > self.allowed:
                return _TooLarge(plan, least)
        return predictor.predict(plan, timeline=False)


class _TooLarge(NamedTuple):
    plan: Plan
    bytes: int


_WORKER: _Worker | None = None


def _simulate(plan: Plan) -> Prediction | _TooLarge:
    assert _WORKER is not None
    return _WORKER.simulate(plan)


def search(
    question: Question,
    *,
    known: Mapping[str, float] | None = None,
    remember: Callable[[Sequence[Prediction]], None] = lambda batch: None,
    measure: Callable[[Plan], float] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Found:
    """Finds the best plan of the question's space.

    `known` maps plan ids to measured seconds of an earlier, interrupted search: they are not measured again.
    `remember` is given every prediction in batches. `measure` runs a plan and gives its step seconds. Raises
    InfeasibleError when no plan fits, with the binding constraints.
    """
    global _WORKER
    began = time.monotonic()
    predictor = Predictor(question.model, question.workload, question.profile)
    bounder, allowed = Bounder(predictor), limit_bytes(question)
    _WORKER = _Worker(bounder, allowed)
    space = Enumeration(question, PricedAdvice(bounder))
    queue, bounded = _bounded(question, bounder, space, allowed)
    lowest = queue[0][0] if queue else 0.0
    least = f"; none can take less than {lowest:.4g} s" if question.minimize in ("step_time", "latency") else ""
    progress(f"{space.structures} structures, {len(queue)} feasible{least}")
    state = _State(question)
    finished, interrupted = True, False
    left: float | None = lowest
    try:
        left = _explore(question, state, bounder, queue, space, allowed, began, remember, progress)
        finished = left is None
    except KeyboardInterrupt:
        finished, interrupted, left = False, True, queue[0][0] if queue else None
        progress("interrupted: keeping what was found")
    best = state.best()
    if best is None and interrupted:
        raise KeyboardInterrupt  # nothing was found yet: that is no word on what fits
    if best is None and not finished:
        raise InfeasibleError(f"the budget ended before a plan that fits was found; {state.count} were simulated",
                              hint="raise [search] budget")  # fmt: skip
    if best is None:
        raise InfeasibleError(_nothing_fits(question, space, allowed))
    ranking = sorted(state.simulated, key=lambda p: objective(question, p))[:RANKED]
    measured: dict[str, float] = dict(known or {})
    if measure is not None and question.measure_budget > 0 and finished:
        measured = measure_best(question, ranking, measured, measure, progress)
        ran = [p for p in ranking if p.plan.id in measured]
        ran.sort(key=lambda p: measured[p.plan.id])
        ranking = ran + [p for p in ranking if p.plan.id not in measured]
    ranking[0] = predictor.predict(ranking[0].plan)
    value = objective(question, best)
    floor = value if left is None else min(left, value)
    gap = value / floor - 1 if floor > 0 else 0.0
    return Found(
        question,
        tuple(ranking),
        Bound(abs(floor), abs(gap)),
        Space(
            space.structures, space.structures - sum(space.infeasible.values()), dict(space.infeasible.most_common())
        ),
        bounded + state.bounded,
        state.count,
        measured,
        finished,
    )


Queue = list[tuple[float, int, Plan]]


def _bounded(question: Question, bounder: Bounder, space: Enumeration, allowed: int) -> tuple[Queue, int]:
    """A heap of feasible plans by their bound. Without a bound for the objective (generation), all tie at 0."""
    queue: Queue = []
    train = question.workload.kind == "train"
    bounded = 0
    for plan in space:
        if train:
            bounded += _offer(question, bounder, space, allowed, queue, (plan,))
        else:
            bounded += 1
            queue.append((float("-inf") if question.minimize == "tokens_per_s" else 0.0, bounded, plan))
    heapq.heapify(queue)
    return queue, bounded


def _offer(
    question: Question,
    bounder: Bounder,
    space: Enumeration,
    allowed: int,
    queue: Queue,
    plans: Iterable[Plan],
) -> int:
    """Bounds plans and appends those that may fit, or what relieves those that cannot; how many were bounded."""
    waiting, count = list(plans), 0
    while waiting:
        plan, count = waiting.pop(), count + 1
        least = bounder.memory(plan)
        if least > allowed:
            space.reject(_too_large(least, allowed))
            waiting += space.relieved(plan)
            continue
        bound = bounder.time(plan)
        if question.minimize == "tokens_per_s":
            bound = -question.workload.tokens / bound
        elif question.minimize == "peak_memory":
            bound = float(least)
        queue.append((bound, space.structures + len(queue), plan))
    return count


def _too_large(found: int, allowed: int) -> str:
    return f"memory of a device: at most {allowed / 2**30:.1f} GiB (found {found / 2**30:.1f} GiB)"


def _explore(
    question: Question,
    state: _State,
    bounder: Bounder,
    queue: Queue,
    space: Enumeration,
    allowed: int,
    began: float,
    remember: Callable[[Sequence[Prediction]], None],
    progress: Callable[[str], None],
) -> float | None:
    """Simulates best bound first until the bound closes (None) or the budget ends (the next bound)."""
    incumbent = float("inf")

    def offer(plans: Iterable[Plan]) -> None:
        late: Queue = []
        state.bounded += _offer(question, bounder, space, allowed, late, plans)
        for entry in late:
            heapq.heappush(queue, entry)

    def refuse(plan: Plan, found: int) -> None:
        space.reject(_too_large(found, allowed))
        offer(space.relieved(plan))

    with _Workers() as workers:
        while queue:
            # Whatever the bound says, some plans are there to be ranked and measured.
            wanted = incumbent if state.count >= BATCH else float("inf")
            if queue[0][0] >= wanted:
                return None
            spent = state.count >= question.simulate_budget or time.monotonic() - began > question.seconds
            if spent and state.count:  # one batch is always simulated
                return queue[0][0]
            batch: list[Plan] = []
            size = BATCH if workers.rate else FIRST
            while queue and len(batch) < size and queue[0][0] < wanted:
                batch.append(heapq.heappop(queue)[2])
            fitting = []
            for prediction in workers.simulate(batch, len(queue)):
                if isinstance(prediction, _TooLarge):
                    refuse(*prediction)
                    continue
                state.count += 1
                if max(prediction.peak_bytes) > allowed:
                    refuse(prediction.plan, max(prediction.peak_bytes))
                    continue
                offer(space.eased(prediction.plan))
                fitting.append(prediction)
                incumbent = min(incumbent, objective(question, prediction))
            state.simulated += fitting
            remember(fitting)
            best = state.best()
            if best is not None:
                progress(f"simulated {state.count}, best {best.plan.describe()}: {best.step_s:.4g} s a step")
    return None


class _Workers:
    """Simulates in this process until that gets slow, then on every core."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.rate = 0.0  # seconds a plan

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def simulate(self, plans: Sequence[Plan], waiting: int) -> Iterator[Prediction | _TooLarge]:
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
            yield from self.pool.map(_simulate, plans, chunksize=max(1, len(plans) // (4 * cores)))
        else:
            yield from map(_simulate, plans)
        self.rate = (time.monotonic() - begin) / max(len(plans), 1)


def _nothing_fits(question: Question, space: Enumeration, allowed: int) -> str:
    """Why there is no feasible plan: the reasons by count, with one example each."""
    where = f"{question.model.name} on {question.devices} x {question.profile.device.name}"
    lines = [f"no feasible plan for {where}; {space.structures} structures were looked at:"]
    for kind, count in space.infeasible.most_common(8):
        lines.append(f"  {count} x {space.examples[kind]}")
    if not space.structures:
        lines.append(f"  no data x tensor x pipeline of the given axes makes {question.devices} devices")
    return "\n".join(lines)
