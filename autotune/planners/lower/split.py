"""The two halves of a block's backward: B, the gradient of its input, and W, the gradients of its weights.

Zero Bubble (2401.10241, section 2) delays W to fill bubbles. The halves are a partition of the instructions that the
whole backward is made of, so splitting does no work twice: what a weight's gradient alone needs (the repeated gather of
its input, a recomputed activation) is made in W, everything else in B, in the order that both have in the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.spec.program import Instruction


@dataclass(frozen=True)
class Halves:
    """B and W without frees, and what passes between the forward, B and W, by name."""

    inputs: tuple[Instruction, ...]
    weights: tuple[Instruction, ...]
    kept: frozenset[str]  # saved by the forward and read by W: these outlive B
    made: frozenset[str]  # written by B and read by W
    gradient: bool  # whether W reads the gradient of the block's output


def halve(listing: Sequence[Instruction], result: str | None, output: str, saved: set[str]) -> Halves:
    """Splits a whole backward. `result` is the gradient it leaves, `output` the one it is given, `saved` what the
    forward left."""
    late: list[bool] = []
    early_reads: set[str] = set() if result is None else {result}  # what some instruction of B, or the caller, reads
    for instruction in reversed(listing):
        weight = instruction.op.endswith(".wgrad")
        # An instruction that changes a value in place counts as its reader: its own reads keep the order.
        wanted = any(name in early_reads for name in instruction.writes)
        late.append(weight or not wanted)
        if not late[-1]:
            early_reads.update(instruction.reads)
    late.reverse()
    inputs = tuple(i for i, second in zip(listing, late, strict=True) if not second)
    weights = tuple(i for i, second in zip(listing, late, strict=True) if second)
    own = {name for i in weights for name in i.writes}
    read = {name for i in weights for name in i.reads}
    first = {name for i in inputs for name in i.writes}
    return Halves(
        inputs,
        weights,
        frozenset(read & saved),
        frozenset((read & first) - saved - own),
        output in read,
    )
