"""Orders whose backwards come later: room for what the last stage's backward must wait for.

Two ways, neither always better. By forwards: every backward moves behind some forwards more, which in an order that
alternates them is the least that can be kept alive. By the clock: every backward moves to a later time. Where ranks
take their stages in another rhythm each (a V, a wave, two directions), counting would part what belongs together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autotune.planners.schedules.schedule import Order, Pipe, Step
from autotune.planners.schedules.timing import timed

SHIFTS = (0.5, 1.0)  # times the interval between two micro-batches


def delayed(steps: Sequence[Step], forwards: int) -> list[Step]:
    """A rank's steps with every backward behind `forwards` forwards more, as far as there are any."""
    coming = [step for step in steps if step.op == "F"]
    out: list[Step] = []
    passed = taken = 0
    for step in steps:
        if step.op == "F":
            passed += 1
            continue
        until = min(len(coming), passed + forwards)
        out += coming[taken:until]
        taken = max(taken, until)
        out.append(step)
    return out + coming[taken:]


def shifted(order: Order, starts: Sequence[Sequence[float]], later: float) -> Order:
    """The order with every backward `later` on its clock, which says when each step starts.

    It cannot deadlock: with these times too every step comes after what it needs.
    """
    found: Order = []
    for steps, begun in zip(order, starts, strict=True):
        at = [start + (0.0 if step.op == "F" else later) for step, start in zip(steps, begun, strict=True)]
        found.append([steps[k] for k in sorted(range(len(steps)), key=lambda k: (at[k], steps[k].op != "F", k))])
    return found


def delays(order: Order, pipe: Pipe, waits: int) -> Iterator[Order]:
    """Orders to choose from whose backwards have `waits` things to wait for; only the first may deadlock."""
    yield [delayed(steps, waits) for steps in order]
    starts = timed(order, pipe).start
    interval = max(sum(pipe.times.of(step.op, step.stage) for step in steps) for steps in order) / pipe.items
    for share in SHIFTS:
        yield shifted(order, starts, share * interval)
