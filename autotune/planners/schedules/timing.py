"""When the steps of an order run, given the pipe's times: the small simulator that schedules are made and judged with.

It knows compute and hop latency alone: what `planners.simulate` says of the lowered program is the prediction. Orders
that are searched (automatic, memory-limited, solved) ask it thousands of times, and tests of closed forms once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autotune.planners.schedules.schedule import Order, Pipe, Step


@dataclass(frozen=True)
class Timing:
    """Start and end of every step, [rank][position]."""

    start: list[list[float]]
    end: list[list[float]]

    @property
    def makespan(self) -> float:
        return max(ends[-1] for ends in self.end if ends) - min(starts[0] for starts in self.start if starts)

    @property
    def longest_rank(self) -> float:
        """The longest time from a rank's first start to its last end: Zero Bubble's metric (2401.10241, section 5)."""
        return max(ends[-1] - starts[0] for starts, ends in zip(self.start, self.end, strict=True) if ends)


def timed(order: Order, pipe: Pipe) -> Timing:
    """Runs each rank's steps in order, every step as early as its inputs allow. ValueError where the order deadlocks.

    F of a stage needs F of the stage before it, B or BW that of the stage after it (both a hop later between ranks)
    and its own F; W needs its own B.
    """
    times, last = pipe.times, pipe.stages - 1
    done: dict[tuple[str, int, int], tuple[float, int]] = {}  # (F or B, stage, item) -> (end, rank)
    clock = [0.0] * len(order)
    start: list[list[float]] = [[] for _ in order]
    end: list[list[float]] = [[] for _ in order]
    waiting = set(range(len(order)))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            steps = order[rank]
            while len(end[rank]) < len(steps):
                step = steps[len(end[rank])]
                ready = inputs_ready(step, rank, last, done, times.hop)
                if ready is None:
                    break
                begin = max(clock[rank], ready)
                clock[rank] = begin + times.of(step.op, step.stage)
                start[rank].append(begin)
                end[rank].append(clock[rank])
                if step.op != "W":
                    done[step.op[0], step.stage, step.item] = (clock[rank], rank)
                moved = True
            if len(end[rank]) == len(steps):
                waiting.discard(rank)
        if waiting and not moved:
            stuck = ", ".join(f"rank {rank} in {_text(order[rank][len(end[rank])])}" for rank in sorted(waiting))
            raise ValueError(f"the order deadlocks: {stuck}")
    return Timing(start, end)


def _text(step: Step) -> str:
    return f"{step.stage}{step.op}{step.item}"


def inputs_ready(
    step: Step, rank: int, last: int, done: Mapping[tuple[str, int, int], tuple[float, int]], hop: float
) -> float | None:
    """When a step's inputs are there; None: not yet known. `done`: (F or B, stage, item) -> (end, rank)."""
    op, stage, item = step
    if op == "W":
        needs = [("B", stage, item)]
    elif op == "F":
        needs = [("F", stage - 1, item)] if stage else []
    else:
        needs = [("F", stage, item), *([("B", stage + 1, item)] if stage < last else [])]
    ready = 0.0
    for need in needs:
        if need not in done:
            return None
        at, where = done[need]
        ready = max(ready, at + (hop if where != rank else 0.0))
    return ready


def peaks(order: Order, after_input_gradient: float = 1.0) -> list[float]:
    """The most chunk activations that each rank holds at once: 1 from F to B, `after_input_gradient` from B to W."""
    found = []
    for steps in order:
        now = most = 0.0
        for step in steps:
            now += {"F": 1.0, "W": -after_input_gradient, "BW": -1.0}.get(step.op, 0.0)
            most = max(most, now)  # while a step runs, what it frees is still there
            now += after_input_gradient - 1.0 if step.op == "B" else 0.0
        found.append(most)
    return found
