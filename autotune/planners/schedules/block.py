"""Building blocks: steps of a few micro-batches at fixed slots, repeated every `period` slots (2405.15362, section 3).

Any schedule with a steady state is one block repeated, and how long the block keeps an activation tells what the whole
holds: at most ceil(lifespan / period) of each chunk.
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


def weighted(block: Block) -> Block:
    """The block with a W for each B, in the first slot after it that the rank's repeated steps leave free."""
    lists = []
    for slots in block.ranks:
        taken = {at % block.period for slot in slots for at in range(slot.at, slot.at + SLOTS[slot.op])}
        weights = []
        for slot in sorted((slot for slot in slots if slot.op == "B"), key=lambda slot: slot.at):
            at = next(at for at in range(slot.at + 1, slot.at + 1 + block.period) if at % block.period not in taken)
            taken.add(at % block.period)
            weights.append(Slot("W", slot.stage, slot.item, at))
        lists.append([*slots, *weights])
    return Block(lists, block.period, block.items)


def lifespan_peak(block: Block) -> list[int]:
    """For each rank, the most chunk activations that it holds when the block repeats for ever (section 3.2).

    One that lives for l slots, from its F to the end of its W or BW, overlaps with its own repetitions: there are
    floor(l / period) at any time and one more in l mod period of the slots. The sum is largest in one of the slots.
    """
    found = []
    for slots in block.ranks:
        begin = {(slot.stage, slot.item): slot.at for slot in slots if slot.op == "F"}
        alive = [0] * block.period
        for op, stage, item, at in slots:
            if op in ("W", "BW"):
                for slot in range(begin[stage, item], at + SLOTS[op]):
                    alive[slot % block.period] += 1
        found.append(max(alive))
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
