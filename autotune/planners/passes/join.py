"""The joining pass: W's of one stage in a row become one, whose products go over the tokens of all their micro-batches.

2BP (2405.18047) makes the weight gradients of all micro-batches at the end in one product a layer, over what forwards
and input gradients have left, put together. It takes any W's that a schedule, and what was put into it, leaves side by
side. The `part` of the one W is how many micro-batches it has, its `item` the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.seat import Listing, Seat
from autotune.spec.program import Instruction


def join(listing: Listing, seat: Seat, traits: Traits) -> Listing:
    """Joins what is side by side."""
    return list(_joined(listing)) if traits.joined else listing


def _joined(listing: Sequence[Instruction]) -> Iterator[Instruction]:
    for (op, _), alike in groupby(listing, key=lambda i: (i.op, i.stage)):
        row = list(alike)
        if op == "W" and len(row) > 1:
            yield row[0]._replace(
                part=len(row),
                reads=tuple(dict.fromkeys(name for i in row for name in i.reads)),
                frees=tuple(name for i in row for name in i.frees),
            )
        else:
            yield from row
