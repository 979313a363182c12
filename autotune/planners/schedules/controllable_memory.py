"""V-Min, V-Half and V-ZB (Qi et al., 2405.15362): two chunks a rank in a V, and memory chosen by the building block.

The offsets between a step and the same step of the next rank decide how long activations live: 1 and 1 slots hold a
third of 1F1B's, 2 and 1 half, 4 and 2 as much, without bubble. Each costs twice 1F1B's messages.
"""

from __future__ import annotations

from functools import partial

from autotune.planners.schedules.block import Block, Slot
from autotune.planners.schedules.reorder import order
from autotune.planners.schedules.schedule import Order, Pipe, Schedule, wave

PERIOD = 6  # F, B and W of two chunks


def block(name: str, ranks: int) -> Block:
    """F0, F1, B1, B0 of one micro-batch on each rank, as the paper's appendix places them; W is left to free slots."""
    p = ranks
    lists = []
    for i in range(p):
        if name == "v-min":
            gap = 2 if p % 3 == 0 else 0  # keeps the slots of a rank apart modulo the period
            at = (i, 2 * p - i - 1, 2 * p + gap + i, 4 * p + gap - i - 1)
        elif name == "v-half":
            gap = 3 if p % 2 == 0 else 0
            at = (2 * i, 3 * p - i - 2, 3 * p + gap + 2 * i - 1, 6 * p + gap - i - 2)
        else:
            at = (4 * i, 6 * p - 5 - 2 * i, 6 * p - 4 + 4 * i, 12 * p - 9 - 2 * i)
        lists.append(
            [Slot("F", i, 0, at[0]), Slot("F", 2 * p - 1 - i, 0, at[1]), Slot("B", 2 * p - 1 - i, 0, at[2]), Slot("B", i, 0, at[3])]
        )
    return Block(lists, PERIOD)
