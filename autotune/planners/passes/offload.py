"""The offload pass: activations that wait long for their backward are moved to the host and back.

PipeOffload (2503.01328): of every rank's chunk activations, the plan's share is moved, first those of the stages whose
activations the order keeps longest (selective; uniform: of each stage the same share). A move out (OFFLOAD, on the lane
d2h) starts when the forward has ended; RELEASE gives the memory back once the copy is out, a window of compute steps
later, so that a copy longer than those steps costs no memory unseen: it costs time instead. A move back (RELOAD, on the
lane h2d) starts a window before the backward: a token that compute writes there (MARK) says when. Where a forward and
its backward are closer than two windows, nothing moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.columns import Column, column, named
from autotune.planners.passes.seat import Listing, Seat
from autotune.planners.passes.woven import woven
from autotune.spec.program import D2H, H2D, Instruction

SELECTIVE, UNIFORM = "selective", "uniform"
MOVED = "ak"  # first letters of the buffers that a move takes along; a host copy's name begins with "h"


class Moves(NamedTuple):
    """What of a rank's chunk activations moves, and the compute steps that a copy may take before it is waited for."""

    percent: int
    choice: str = SELECTIVE
    window: int = 2

    @property
    def shortest(self) -> int:
        """Compute steps that an activation must wait longer than to be moved."""
        return 2 * self.window


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


def chosen(listing: Sequence[Timed], moves: Moves) -> list[Wait]:
    """The share of a rank's chunk activations that moves: those of the stages whose activations wait longest, or of
    each stage the same share (uniform). Of a stage that moves in part an even spread, so that whenever the rank holds
    many, the same share of them is away. What waits too short a time stays."""
    of_stage: dict[int, list[Wait]] = {}
    for wait in waits(listing):
        of_stage.setdefault(wait.stage, []).append(wait)
    if moves.choice == UNIFORM:
        found = [w for own in of_stage.values() for w in _spread(own, len(own) * moves.percent // 100)]
        return [wait for wait in found if wait.span > moves.shortest]
    left = sum(map(len, of_stage.values())) * moves.percent // 100
    found = []
    for own in sorted(of_stage.values(), key=lambda own: -sum(wait.span for wait in own) / len(own)):
        long = [wait for wait in own if wait.span > moves.shortest]
        found += _spread(long, take := min(left, len(long)))
        left -= take
    return found


def _spread(alike: Sequence[Wait], take: int) -> list[Wait]:
    """`take` of them, evenly."""
    count = len(alike)
    return [wait for i, wait in enumerate(alike) if (i + 1) * take // count > i * take // count]


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
    moves = Moves(traits.offload, traits.offload_choice, traits.offload_window)
    after: dict[int, list[Instruction]] = defaultdict(list)  # behind the step at this position
    before: dict[int, list[Instruction]] = defaultdict(list)
    for stage, item, forward, backward in chosen(listing, moves):
        out, release, mark, back = _moves(stage, traits.pipe.items)
        after[forward].append(out[item])
        after[forward + moves.window].append(release[item])
        before[backward - moves.window] += (mark[item], back[item])
    return woven(listing, before, after)
