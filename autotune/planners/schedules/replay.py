"""Published figures against ours: `python -m autotune.planners.schedules.replay` prints them row by row.

Ours is the schedule's own order, made and timed with the paper's durations; no published value goes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autotune.planners.schedules import SCHEDULES
from autotune.planners.schedules.published import Figure, figures
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


def ours(figure: Figure) -> float:
    """The figure's metric of our order. ValueError where the schedule refuses the figure's pipe."""
    schedule = SCHEDULES[figure.schedule]
    why = schedule.refuse(figure.pipe)
    if why is not None:
        raise ValueError(f"{figure.schedule} needs {why} for {figure.setup} of {figure.source}")
    return METRICS[figure.metric](schedule.order(figure.pipe), figure.pipe)


def table(rows: Sequence[Figure]) -> str:
    """One line a figure: source, setup, schedule, metric, published, ours, difference."""
    columns = "{:<22} {:<16} {:<8} {:<22} {:>9} {:>9} {:>9}"
    lines = [columns.format("source", "setup", "schedule", "metric", "published", "ours", "ours - it")]
    for row in rows:
        found = ours(row)
        numbers = (f"{row.value:.4f}", f"{found:.4f}", f"{found - row.value:+.4f}")
        lines.append(columns.format(row.source, row.setup, row.name, row.metric, *numbers))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(figures()))
