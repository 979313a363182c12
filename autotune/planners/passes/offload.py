"""The offload pass: activations that wait long for their backward are moved to the host and back.

PipeOffload (2503.01328): of every rank's chunk activations, the plan's share is moved, first those of the stages whose
activations the order keeps longest (selective; uniform: of each stage the same share). A move out (OFFLOAD, on the lane
d2h) starts when the forward has ended; RELEASE gives the memory back once the copy is out, a window of compute steps
later, so that a copy longer than those steps costs no memory unseen: it costs time instead. A move back (RELOAD, on the
lane h2d) starts a window before the backward: a token that compute writes there (MARK) says when. Where a forward and
its backward are closer than two windows, nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

from autotune.planners.lower.traits import Traits
from autotune.spec.program import COMPUTE, D2H, H2D, Instruction, Program

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


def on_device(listing: Sequence[Timed], moves: Moves) -> tuple[tuple[int, int], ...]:
    """(chunk activations, inputs of chunks) that are on a rank's device at once whatever its copies take, where no
    other moment has more of both. An activation is there if it stays, has not had time to leave, or is being read;
    an input stays."""
    moved = set(chosen(listing, moves))
    activations, inputs = [0] * (len(listing) + moves.window + 2), [0] * (len(listing) + 2)
    for wait in waits(listing):
        stays = [(wait.forward, wait.backward)]
        if wait in moved:
            stays = [(wait.forward, wait.forward + moves.window), (wait.backward, wait.backward)]
        for first, last in stays:
            activations[first] += 1
            activations[last + 1] -= 1
        inputs[wait.forward] += 1
        inputs[wait.backward + 1] -= 1
    found = set(zip(accumulate(activations), accumulate(inputs), strict=False))
    return tuple(p for p in found if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in found))


def offload(program: Program, traits: Traits) -> Program:
    """Adds OFFLOAD, RELEASE and RELOAD. It runs before messages are added: every position is a compute step."""
    if not traits.offload:
        return program
    moves, ranks = Moves(traits.offload, traits.offload_choice, traits.offload_window), []
    for listing in program.ranks:
        after: dict[int, list[Instruction]] = {}  # behind the step at this position
        before: dict[int, list[Instruction]] = {}
        for wait in chosen(listing, moves):
            s, m = wait.stage, wait.item
            device = tuple(f"{letter}.{s}.{m}" for letter in MOVED)
            host = tuple(f"h{name}" for name in device)
            after.setdefault(wait.forward, []).append(Instruction("OFFLOAD", s, m, lane=D2H, reads=device, writes=host))
            release = Instruction("RELEASE", s, m, lane=COMPUTE, reads=host, frees=device)
            after.setdefault(wait.forward + moves.window, []).append(release)
            token = f"t.{s}.{m}"
            mark = Instruction("MARK", s, m, writes=(token,))
            reload = Instruction("RELOAD", s, m, lane=H2D, reads=(*host, token), writes=device, frees=(*host, token))
            before.setdefault(wait.backward - moves.window, []).extend((mark, reload))
        out: list[Instruction] = []
        for position, instruction in enumerate(listing):
            out += before.get(position, ())
            out.append(instruction)
            out += after.get(position, ())
        ranks.append(tuple(out))
    return Program(tuple(ranks), program.buffers, program.live, program.facts)
