"""The offload pass: activations that wait long for their backward are moved to the host and back.

PipeOffload (2503.01328): of every rank's chunk activations, the plan's share is moved, those first that the order
keeps longest. A move out (OFFLOAD, on the lane d2h) starts when the forward has ended; RELEASE gives the memory back
once the copy is out, `WINDOW` compute steps later, so that a copy longer than those steps costs no memory unseen:
it costs time instead. A move back (RELOAD, on the lane h2d) starts `WINDOW` steps before the backward: a token that
compute writes there (MARK) says when. Where a forward and its backward are closer than twice that, nothing moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.columns import Column, column, named
from autotune.planners.passes.seat import Listing, Seat
from autotune.spec.program import D2H, H2D, Instruction

WINDOW = 2  # compute steps that a copy may take before it is waited for
MOVED = "ak"  # first letters of the buffers that a move takes along; a host copy's name begins with "h"


class Wait(NamedTuple):
    """A chunk activation of one rank: the positions of its forward and of the backward that first reads it."""

    stage: int
    item: int
    forward: int
    backward: int

    @property
    def span(self) -> int:
        return self.backward - self.forward


class Timed(Protocol):
    """A compute step: an order's, or a program's instruction."""

    @property
    def op(self) -> str: ...
    @property
    def stage(self) -> int: ...
    @property
    def item(self) -> int: ...


def waits(listing: Iterable[Timed]) -> list[Wait]:
    """Every chunk activation that a rank keeps."""
    forwards: dict[tuple[int, int], int] = {}
    found = []
    for position, i in enumerate(listing):
        if i.op == "F":
            forwards[i.stage, i.item] = position
        elif i.op in ("B", "BW"):
            found.append(Wait(i.stage, i.item, forwards[i.stage, i.item], position))
    return found


def chosen(listing: Sequence[Timed], percent: int) -> list[Wait]:
    """The share of a rank's chunk activations that moves: the longest waits, and of equal ones an even spread, so that
    whenever the rank holds many, the same share of them is away."""
    by_span: dict[int, list[Wait]] = {}
    for wait in waits(listing):
        by_span.setdefault(wait.span, []).append(wait)
    left = sum(map(len, by_span.values())) * percent // 100
    found = []
    for span in sorted((s for s in by_span if s > 2 * WINDOW), reverse=True):
        alike = by_span[span]
        take, count = min(left, len(alike)), len(alike)
        found += [wait for i, wait in enumerate(alike) if (i + 1) * take // count > i * take // count]
        left -= take
    return found


@lru_cache(maxsize=256)
def _moves(stage: int, items: int) -> tuple[Column, Column, Column, Column]:
    """OFFLOAD, RELEASE, MARK and RELOAD of a stage."""
    device = [named(letter, stage, items) for letter in MOVED]
    host = [named(f"h{letter}", stage, items) for letter in MOVED]
    token = named("t", stage, items)
    return (
        column("OFFLOAD", stage, items, device, host, lane=D2H),
        column("RELEASE", stage, items, host, frees=device),
        column("MARK", stage, items, (), (token,)),
        column("RELOAD", stage, items, (*host, token), device, (*host, token), lane=H2D),
    )


def offload(listing: Listing, seat: Seat, traits: Traits) -> Listing:
    """Adds OFFLOAD, RELEASE and RELOAD. It runs before messages are added: every position is a compute step."""
    if not traits.offload:
        return listing
    after: dict[int, list[Instruction]] = defaultdict(list)  # behind the step at this position
    before: dict[int, list[Instruction]] = defaultdict(list)
    for stage, item, forward, backward in chosen(listing, traits.offload):
        out, release, mark, back = _moves(stage, traits.pipe.items)
        after[forward].append(out[item])
        after[forward + WINDOW].append(release[item])
        before[backward - WINDOW] += (mark[item], back[item])
    found: list[Instruction] = []
    for position, instruction in enumerate(listing):
        if position in before:
            found += before[position]
        found.append(instruction)
        if position in after:
            found += after[position]
    return found
