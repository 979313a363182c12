"""Splits every full backward of an order into its input gradient B and its weight gradient W, and places the W.

2BP (2405.18047) does so to any schedule (the axis `split`): the stage before waits for B alone, which shortens the way
back. Where W goes is the choice: right after its B, in the waits of its rank, or after the rank's last B, stage by
stage, where the products of all micro-batches can be one. What a W still needs is held until then.
"""

from __future__ import annotations

from typing import Literal

from autotune.planners.schedules.schedule import Order, Pipe, Step
from autotune.planners.schedules.timing import timed

Placement = Literal["immediate", "fill", "end"]
PLACEMENTS: dict[str, Placement] = {"immediate": "immediate", "fill": "fill", "end": "end"}


def split(order: Order, placement: Placement, pipe: Pipe) -> Order:
    """The order with B and W for each BW. `fill` alone looks at the pipe: at its times, its W delay no F and no B."""
    if placement == "immediate":
        return [[part for step in steps for part in _parts(step)] for steps in order]
    urgent = [[step._replace(op="B") if step.op == "BW" else step for step in steps] for steps in order]
    if placement == "end":
        return [steps + _left(steps) for steps in urgent]
    timing = timed(urgent, pipe)
    return [_filled(*rank, pipe) for rank in zip(urgent, timing.start, timing.end, strict=True)]


def _parts(step: Step) -> list[Step]:
    return [step._replace(op=op) for op in step.op] if step.op == "BW" else [step]


def _left(steps: list[Step]) -> list[Step]:
    """The W of every B in `steps` that has none: those of a stage together, stages in the order of their last B."""
    done = {(step.stage, step.item) for step in steps if step.op == "W"}
    left = [step._replace(op="W") for step in steps if step.op == "B" and (step.stage, step.item) not in done]
    last = {step.stage: position for position, step in enumerate(left)}
    return sorted(left, key=lambda step: last[step.stage])


def _filled(steps: list[Step], start: list[float], end: list[float], pipe: Pipe) -> list[Step]:
    """A rank's steps with a W, oldest first, wherever the whole of it fits in a wait; the others at the end."""
    filled: list[Step] = []
    pending: list[Step] = []
    clock = 0.0
    for step, begin, finish in zip(steps, start, end, strict=True):
        while pending and clock + pipe.times.of("W", pending[0].stage) <= begin * (1 + 1e-12):
            clock += pipe.times.of("W", pending[0].stage)
            filled.append(pending.pop(0))
        filled.append(step)
        clock = finish
        if step.op == "B":
            pending.append(step._replace(op="W"))
    return filled + _left(filled)
