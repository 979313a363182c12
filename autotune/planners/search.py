"""The search: enumerate, bound, simulate best bound first, measure the most promising, say how good the answer is.

When the next bound is no better than the best simulated plan, the search is over and the answer is optimal under the
cost model. Ended early (budget, Ctrl-C), it reports the gap that is left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.lower.traits import micro_batches
from autotune.planners.measured import measure_best
from autotune.planners.predict import Predictor, TooLarge, TooSlow
from autotune.planners.space import Enumeration
from autotune.planners.trial import Trial, Worker, Workers
from autotune.spec.errors import InfeasibleError
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Prediction, Question, Space

BATCH = 16  # plans simulated between two looks at the clock, and written to the database together
FIRST = 2  # before it is known how long one takes, and so whether another process is worth starting
FRONT = 64  # of the most promising plans, those among which the first to be simulated are
RANKED = 64  # predictions that the answer keeps


def limit_bytes(question: Question) -> int:
    """Device bytes that a plan may allocate on one rank: the share that is allowed, less the runtime's own."""
    device = question.profile.device
    whole = device.memory_bytes * question.memory_fraction
    if device.kind == "cpu":  # workers share the node's memory
        whole /= min(question.devices, max(device.count, 1))
    return int(whole - device.context_bytes)


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

    def limit(self) -> float:
        """The value from which a plan is not among the best few."""
        values = sorted(objective(self.question, p) for p in self.simulated)
        return values[BATCH - 1] if len(values) >= BATCH else float("inf")


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
    began = time.monotonic()
    predictor = Predictor(question.model, question.workload, question.profile)
    bounder, allowed = Bounder(predictor), limit_bytes(question)
    space = Enumeration(question, PricedAdvice(bounder))
    queue, bounded = _bounded(question, bounder, space, allowed)
    lowest = queue[0].bound if queue else 0.0
    least = f"; none can take less than {lowest:.4g} s" if question.minimize in ("step_time", "latency") else ""
    progress(f"{space.structures} structures, {len(queue)} feasible{least}")
    state = _State(question)
    finished, interrupted = True, False
    left: float | None = lowest
    try:
        left = _explore(question, state, bounder, queue, space, allowed, began, remember, progress)
        finished = left is None
    except KeyboardInterrupt:
        finished, interrupted, left = False, True, queue[0].bound if queue else None
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


class Waiting(NamedTuple):
    """A plan in the queue: `number` breaks ties. `close`: its bound is that of its ranks alone already."""

    bound: float
    number: int
    plan: Plan
    close: bool = False


Queue = list[Waiting]


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
            queue.append(Waiting(float("-inf") if question.minimize == "tokens_per_s" else 0.0, bounded, plan))
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
        bound = float(least) if question.minimize == "peak_memory" else _valued(question, bounder.time(plan))
        queue.append(Waiting(bound, space.structures + len(queue), plan))
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
    """Simulates best bound first until the bound closes (None) or the budget ends (the next bound).

    A plan that comes to its turn is bounded more closely first, and goes back to the queue where others then come
    before it.
    """
    incumbent = float("inf")

    def offer(plans: Iterable[Plan]) -> None:
        late: Queue = []
        state.bounded += _offer(question, bounder, space, allowed, late, plans)
        for entry in late:
            heapq.heappush(queue, entry)

    with Workers(Worker(bounder, allowed)) as workers:
        while queue:
            proven = queue[0].bound >= incumbent
            if proven and state.count >= BATCH:
                return None
            spent = state.count >= question.simulate_budget or time.monotonic() - began > question.seconds
            if spent and state.count:  # one batch is always simulated
                return queue[0].bound
            size = BATCH if workers.rate else FIRST
            # Until one is known to fit nothing can be left out; and some are there to be ranked and measured alone.
            hurried = proven or incumbent == float("inf")
            batch = _quickest(question, queue, size) if hurried else _next(queue, size, incumbent)
            following = float("inf") if hurried or not queue else min(incumbent, queue[0].bound)
            limit = state.limit()
            trials = [_trial(question, entry, incumbent, limit, following) for entry in batch]
            fitting = []
            for entry, outcome in zip(batch, workers.run(trials, len(queue)), strict=True):
                if isinstance(outcome, TooLarge):
                    space.reject(_too_large(outcome.bytes, allowed))
                    offer(space.relieved(entry.plan))
                    continue
                if not entry.close:  # fewer moves may take less time than these, whatever these take
                    offer(space.eased(entry.plan))
                if isinstance(outcome, TooSlow):
                    bound = max(entry.bound, _valued(question, outcome.seconds))
                    heapq.heappush(queue, Waiting(bound, entry.number, entry.plan, True))
                    continue
                state.count += 1
                if max(outcome.peak_bytes) > allowed:
                    space.reject(_too_large(max(outcome.peak_bytes), allowed))
                    offer(space.relieved(entry.plan))
                    continue
                fitting.append(outcome)
                incumbent = min(incumbent, objective(question, outcome))
            state.simulated += fitting
            remember(fitting)
            best = state.best()
            if best is not None:
                progress(f"simulated {state.count}, best {best.plan.describe()}: {best.step_s:.4g} s a step")
    return None


def _valued(question: Question, seconds: float) -> float:
    """The objective of a step of so many seconds."""
    return -question.workload.tokens / seconds if question.minimize == "tokens_per_s" else seconds


def _seconds(question: Question, value: float) -> float:
    """The step seconds of an objective's value."""
    if question.minimize != "tokens_per_s":
        return value
    return -question.workload.tokens / value if value < 0 else float("inf")


def _trial(question: Question, entry: Waiting, wanted: float, limit: float, following: float) -> Trial:
    """What is asked of a plan, in seconds. Objectives other than time are no reason to leave a plan."""
    if question.minimize == "peak_memory" or question.workload.kind != "train":
        return Trial(entry.plan, entry.close)
    return Trial(entry.plan, entry.close, *(_seconds(question, value) for value in (wanted, limit, following)))


def _next(queue: Queue, size: int, incumbent: float) -> list[Waiting]:
    """Takes the plans out of the queue that may take least, as far as they may beat the best so far."""
    found: list[Waiting] = []
    while queue and len(found) < size and queue[0].bound < incumbent:
        found.append(heapq.heappop(queue))
    return found


def _quickest(question: Question, queue: Queue, size: int) -> list[Waiting]:
    """Takes those of the most promising plans out of the queue that are simulated soonest."""
    front = [heapq.heappop(queue) for _ in range(min(len(queue), FRONT))]
    if question.workload.kind == "train":
        front.sort(key=lambda entry: micro_batches(entry.plan, question.workload) * entry.plan.stages)
    for entry in front[size:]:
        heapq.heappush(queue, entry)
    return front[:size]


def _nothing_fits(question: Question, space: Enumeration, allowed: int) -> str:
    """Why there is no feasible plan: the reasons by count, with one example each."""
    where = f"{question.model.name} on {question.devices} x {question.profile.device.name}"
    lines = [f"no feasible plan for {where}; {space.structures} structures were looked at:"]
    for kind, count in space.infeasible.most_common(8):
        lines.append(f"  {count} x {space.examples[kind]}")
    if not space.structures:
        lines.append(f"  no data x tensor x pipeline of the given axes makes {question.devices} devices")
    return "\n".join(lines)
