"""Instructions put into a list before and behind what stands there: how a pass adds to a rank's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autotune.spec.program import Instruction

Added = Mapping[int, Sequence[Instruction]]  # by position in the list


def woven(listing: Sequence[Instruction], before: Added, after: Added) -> list[Instruction]:
    """The list with these before and behind the instruction at each position; `before` its end: at the end."""
    found: list[Instruction] = []
    for position, instruction in enumerate(listing):
        if position in before:
            found += before[position]
        found.append(instruction)
        if position in after:
            found += after[position]
    return [*found, *before.get(len(listing), ())]
