"""From an order to instructions: the schedule's order becomes compute instructions over buffers.

Buffers of stage s and micro-batch m: x.s.m the stage's input; what its forward keeps for the backward, k.s.m where the
weights' gradients need it and a.s.m where only the input's does; b.s.m what B leaves for W; d.s.m the gradient of the
stage's output. w.s weights, g.s gradients, tw the weights of a frozen model that makes the first stage's input;
`tokens` and `targets` the step's data, `loss` its sum; `sight`, where there are masks, which rows see which.

A step of a stage is made for all micro-batches at once (a column): ranks and plans with the same stage share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from autotune.planners.lower.traits import Traits
from autotune.planners.passes import vocabulary
from autotune.planners.passes.columns import Column, column, named, same
from autotune.planners.schedules import Step
from autotune.spec.program import Instruction


def compute(steps: Sequence[Step], rank: int, traits: Traits) -> list[Instruction]:
    """A rank's steps with the buffers that each reads, writes and frees."""
    columns = {key: _column(*key, rank, traits) for key in dict.fromkeys((op, stage) for op, stage, _ in steps)}
    return [columns[op, stage][item] for op, stage, item in steps]


def _column(op: str, stage: int, rank: int, traits: Traits) -> Column:
    if op in vocabulary.STEPS:  # beyond F, B, W and BW
        return vocabulary.STEPS[op](op, stage, rank, traits)
    first, last = stage == 0 and traits.ends, stage == traits.pipe.stages - 1 and traits.ends
    frozen = first and traits.frozen
    return _stage_column(op, stage, traits.pipe.items, first, last, traits.late[stage], frozen, traits.masked)


@lru_cache(maxsize=512)
def _stage_column(
    op: str, s: int, items: int, first: bool, last: bool, late: bool, frozen: bool, masked: bool
) -> Column:
    """`first`, `last`: the stage has the embedding or the head. `late`: W reads the gradient of its output. `frozen`:
    another model makes its input. `masked`: which rows see which is said beside them."""

    def own(kind: str, stage: int = s) -> tuple[Sequence[str], ...]:
        return (named(kind, stage, items),)

    def one(name: str) -> tuple[Sequence[str], ...]:
        return (same(name, items),)

    x, d = () if first else own("x"), () if last else own("d")
    a, k, b = own("a"), own("k"), own("b")
    source, targets = one("tokens") if first else x, one("targets") if last else ()
    output, back = one("loss") if last else own("x", s + 1), () if first else own("d", s - 1)
    weight, gradient, sight = one(f"w.{s}"), one(f"g.{s}"), one("sight") if masked else ()
    if op == "F":
        other = one("tw") if frozen else ()
        return column(op, s, items, (*weight, *source, *targets, *sight, *other), (*a, *k, *output))
    if op == "BW":
        reads = (*weight, *source, *targets, *sight, *a, *k, *d)
        return column(op, s, items, reads, (*gradient, *back), (*a, *k, *x, *d))
    kept = d if late else ()
    if op == "B":
        reads = (*weight, *source, *targets, *sight, *a, *k, *d)
        return column(op, s, items, reads, (*b, *back), (*a, *(() if late else d)))
    return column(op, s, items, (*source, *k, *b, *kept), gradient, (*k, *b, *x, *kept))
