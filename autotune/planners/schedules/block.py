"""Building blocks: the steps of a few micro-batches at fixed slots, repeated every `period` slots (2405.15362, section 3).

Any schedule with a steady state is one block repeated. What the block says of one micro-batch tells the memory of the
whole: a rank holds at most ceil(lifespan / period) activations of each of its chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autotune.planners.schedules.schedule import Order, Step

SLOTS = {"F": 1, "B": 1, "W": 1, "BW": 2}


class Slot(NamedTuple):
    """A step of the block: which one, for which of the block's micro-batches, and the slot in which it begins."""

    op: str
    stage: int
    item: int
    at: int


@dataclass(frozen=True)
class Block:
    """[rank] -> its slots, for `items` micro-batches; the next `items` follow `period` slots later."""

    ranks: Sequence[Sequence[Slot]]
    period: int
    items: int = 1


def repeat(block: Block, items: int) -> Order:
    """Each rank's steps of `items` micro-batches, in the order of their slots."""
    rounds = range(-(-items // block.items))
    lists: Order = []
    for slots in block.ranks:
        ordered = sorted(
            (slot.at + turn * block.period, slot.op, slot.stage, slot.item + turn * block.items)
            for slot in slots
            for turn in rounds
        )
        lists.append([Step(op, stage, item) for _, op, stage, item in ordered if item < items])
    return lists


def collision(block: Block) -> str | None:
    """Which two steps of a rank would run at once when the block repeats; None: none do."""
    for rank, slots in enumerate(block.ranks):
        taken: dict[int, Slot] = {}
        for slot in slots:
            for at in range(slot.at, slot.at + SLOTS[slot.op]):
                other = taken.setdefault(at % block.period, slot)
                if other is not slot:
                    return f"rank {rank}: {slot.op} of stage {slot.stage} meets {other.op} of stage {other.stage}"
    return None


def lifespan_peak(block: Block) -> list[int]:
    """For each rank, the most chunk activations that repeating the block can hold at once.

    Each lives from its F to the end of its W or BW; of one that lives for l slots, ceil(l / period) copies overlap.
    """
    found = []
    for slots in block.ranks:
        begin = {(slot.stage, slot.item): slot.at for slot in slots if slot.op == "F"}
        spans = [
            slot.at + SLOTS[slot.op] - begin[slot.stage, slot.item] for slot in slots if slot.op in ("W", "BW")
        ]
        found.append(sum(-(-span // block.period) for span in spans))
    return found


def looped(ranks: int, chunks: int, group: int, hops: tuple[int, int], split: bool = False) -> Block:
    """The block of the 1F1B family on Megatron's placement: groups of micro-batches, chunk by chunk inside a group.

    A forward follows the one of the rank before it by hops[0] slots, a backward that of the rank after it by hops[1].
    (1, 2) with one chunk is 1F1B; (3, 3) with more is interleaved 1F1B, which holds more so that a hop may take up to
    two slots; (1, 2) with more is the least memory that the order of chunks allows. `split` writes BW as B, W.
    """
    forward, backward = hops
    lists: list[list[Slot]] = []
    first = 3 * (chunks - 1) * group + forward * (ranks - 1) + 1  # the last stage's first backward
    for rank in range(ranks):
        slots = []
        for chunk in range(chunks):
            for item in range(group):
                at = 3 * (chunk * group + item)
                slots.append(Slot("F", chunk * ranks + rank, item, at + forward * rank))
                stage, at = (chunks - 1 - chunk) * ranks + rank, at + first + backward * (ranks - 1 - rank)
                if split:
                    slots += [Slot("B", stage, item, at), Slot("W", stage, item, at + 1)]
                else:
                    slots.append(Slot("BW", stage, item, at))
        lists.append(slots)
    return Block(lists, 3 * chunks * group, group)
