"""Columns: the instructions of one step for every micro-batch, made together.

A program has tens of thousands of instructions and a few hundred columns. What is made by column costs a fraction of
what is made one by one, and every name of a buffer is one string wherever it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat

from autotune.spec.program import COMPUTE, Instruction

Column = Sequence[Instruction]  # [micro-batch]
Names = Sequence[Sequence[str]]  # [buffer][micro-batch]


@lru_cache(maxsize=4096)
def named(kind: str, stage: int, items: int) -> tuple[str, ...]:
    """The names of a kind of buffer, [micro-batch]."""
    return tuple([f"{kind}.{stage}.{item}" for item in range(items)])


def same(name: str, items: int) -> tuple[str, ...]:
    """One buffer for every micro-batch."""
    return (name,) * items


def column(
    op: str, stage: int, items: int, reads: Names, writes: Names = (), frees: Names = (), lane: str = COMPUTE
) -> list[Instruction]:
    """The column of an operation that meets nobody."""
    return instructions(
        *(repeat(op), repeat(stage), range(items), repeat(0), repeat(lane)),
        *(_by_item(reads), _by_item(writes), _by_item(frees)),
        *(repeat(None), repeat(()), repeat(0)),
    )


def instructions(*fields: Iterable[object]) -> list[Instruction]:
    """Instructions by their fields, each for all of them, as many as the shortest has."""
    # A named tuple's own constructor is Python; its base's is not.
    return list(map(tuple.__new__, repeat(Instruction), zip(*fields, strict=False)))


def _by_item(names: Names) -> Iterator[tuple[str, ...]]:
    return zip(*names, strict=True) if names else repeat(())
