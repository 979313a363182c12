"""Metrics of a schedule's order, timed with stated durations."""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.schedules import SCHEDULES
from autotune.planners.schedules.schedule import Order, Pipe
from autotune.planners.schedules.timing import peaks, timed


def busiest(order: Order, pipe: Pipe) -> float:
    """Compute time of the rank that has most to do."""
    return max(sum(pipe.times.of(step.op, step.stage) for step in steps) for steps in order)


def bubble_rate(order: Order, pipe: Pipe) -> float:
    """1 - m(F+B+W) / the longest span of a rank, from its first start to its last end (2401.10241, section 5).

    That a rank starts later than another is no bubble to this metric, as the next step may start before others end.
    """
    return 1 - busiest(order, pipe) / timed(order, pipe).longest_rank


METRICS: dict[str, Callable[[Order, Pipe], float]] = {
    "bubble rate": bubble_rate,
    "makespan bubble rate": lambda order, pipe: 1 - busiest(order, pipe) / timed(order, pipe).makespan,
    "peak": lambda order, pipe: max(peaks(order, pipe.kept)),  # chunk activations of the rank that holds most
}


def measure(schedule: str, metric: str, pipe: Pipe) -> float:
    """The metric of our order. ValueError where the schedule refuses the pipe."""
    why = SCHEDULES[schedule].refuse(pipe)
    if why is not None:
        raise ValueError(f"{schedule} needs {why}")
    return METRICS[metric](SCHEDULES[schedule].order(pipe), pipe)
