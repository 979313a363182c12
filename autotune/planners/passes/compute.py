"""The first pass: a schedule's order becomes compute instructions over buffers.

Buffers of stage s and micro-batch m: x.s.m the stage's input; what its forward keeps for the backward, k.s.m where the
weights' gradients need it and a.s.m where only the input's does; b.s.m what B leaves for W; d.s.m the gradient of the
stage's output. w.s weights, g.s gradients; `tokens` and `targets` the step's data, `loss` its sum.
"""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.lower.traits import Traits
from autotune.planners.passes import vocabulary
from autotune.planners.schedules import Order, Step
from autotune.spec.program import Instruction

# Steps beyond F, B, W and BW: what makes the instruction of each.
OTHERS: dict[str, Callable[[Step, Traits, int], Instruction]] = {**vocabulary.STEPS}


def compute(order: Order, traits: Traits) -> list[list[Instruction]]:
    """Every step with the buffers that it reads, writes and frees."""
    return [
        [OTHERS[step.op](step, traits, rank) if step.op in OTHERS else _instruction(step, traits) for step in steps]
        for rank, steps in enumerate(order)
    ]


def _instruction(step: Step, traits: Traits) -> Instruction:
    op, s, m = step
    first, last = s == 0 and traits.ends, s == traits.pipe.stages - 1 and traits.ends
    x, d = () if first else (f"x.{s}.{m}",), () if last else (f"d.{s}.{m}",)
    a, k, b = (f"a.{s}.{m}",), (f"k.{s}.{m}",), (f"b.{s}.{m}",)
    source = ("tokens",) if first else x
    targets = ("targets",) if last else ()
    back = () if first else (f"d.{s - 1}.{m}",)
    weight = (f"w.{s}",)
    if op == "F":
        output = ("loss",) if last else (f"x.{s + 1}.{m}",)
        return Instruction(op, s, m, reads=(*weight, *source, *targets), writes=(*a, *k, *output))
    if op == "BW":
        frees = (*a, *k, *x, *d)
        reads = (*weight, *source, *targets, *a, *k, *d)
        return Instruction(op, s, m, reads=reads, writes=(f"g.{s}", *back), frees=frees)
    late = d if traits.late[s] else ()
    if op == "B":
        frees = (*a, *(() if late else d))
        reads = (*weight, *source, *targets, *a, *k, *d)
        return Instruction(op, s, m, reads=reads, writes=(*b, *back), frees=frees)
    frees = (*k, *b, *x, *late)
    return Instruction(op, s, m, reads=(*source, *k, *b, *late), writes=(f"g.{s}",), frees=frees)
