"""A Program: for each rank an ordered list of instructions, on lanes, over buffers.

The simulator, the interpreter and the drawing know only what is here. None of them asks which technique made an
instruction: order comes from lanes and buffers, durations from a cost table, values from an operation table.

Meaning, for one rank:
- instructions on one lane start in list order, each after the one before it has ended;
- an instruction starts when every buffer it reads has been written, and ends at once for all its `peers`: those
  that name the same `meet` on other ranks. A `meet` of None concerns this rank alone;
- memory is accounted in *issue order* (list order): a written buffer is allocated when its writer is issued, a freed
  one is released when its reader has been issued. That is what a caching allocator on a stream does, and it makes
  peak bytes a property of the program, not of timing;
- a written buffer that is still live is changed in place: nothing is allocated;
- with lag k an instruction reads the version of its buffers written k steps ago. 0 is this step's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

COMPUTE = "compute"  # the lane that every rank has
H2D, D2H = "h2d", "d2h"  # copies from the host and to it
# Lanes named after an axis of the mesh, or after one and a dot: what is on them meets along that axis.
TENSOR, DATA = "tensor", "data"  # data: all that hold the same weights, ranks that share a sequence included
CONTEXT, RING = "context", "ring"  # inside bodies: who exchange heads for tokens, who pass keys around
EXPERT = "expert"  # inside bodies: who divide a layer's experts among themselves
COPIES = "copies"  # no lane's name: of those along the data axis, who hold the same experts
AXES = (TENSOR, DATA, CONTEXT, RING, EXPERT)
BESIDE = "beside."  # how lanes begin whose meetings ranks wait for beside compute, once a micro-batch
ALL_TENSOR = "*tensor"  # how a lane's name ends whose meetings join all tensor ranks of their peers
DEVICE = "device"  # the tier that every buffer is in unless it says otherwise
HOST = "host"
TIERS = (DEVICE, "peer", HOST, "disk")


class Instruction(NamedTuple):
    """One operation of one rank. `op` is a key of the operation and cost tables."""

    op: str
    stage: int = 0
    item: int = 0  # micro-batch, chunk or request
    part: int = 0
    lane: str = COMPUTE
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()
    meet: str | None = None  # the rendezvous: instructions of several ranks with one name run together
    peers: tuple[int, ...] = ()  # every rank that meets here, this one included, in group order
    lag: int = 0

    @property
    def meets(self) -> bool:
        """Whether other ranks take part: its peers, or those along the axis that its lane is named after."""
        return bool(self.peers) or self.lane.partition(".")[0] in AXES

    @property
    def label(self) -> str:
        """`2F0`: stage, operation, item; with the part where it has one, and the peer where it meets one."""
        part = f".{self.part}" if self.part else ""
        lag = f"~{self.lag}" if self.lag else ""
        arrow = f">{'+'.join(map(str, self.peers))}" if self.peers else ""
        return f"{self.stage}{self.op}{self.item}{part}{arrow}{lag}"


# Fields of an instruction as functions, for loops over tens of thousands of them.
reads_of, writes_of = itemgetter(5), itemgetter(6)
changes_of = itemgetter(6, 7)  # (writes, frees)
uses_of = itemgetter(6, 5)  # (writes, reads)
likeness_of = itemgetter(0, 1, 3)  # (op, stage, part)


class Buffer(NamedTuple):
    """Where a value lives: bytes on one rank, and the tier they are in. A token has no bytes and only orders.

    `persistent` buffers outlive the step (weights, optimizer states): they are there before the first instruction
    and are never freed; a write to one makes its next version.
    """

    size: int = 0
    tier: str = DEVICE
    persistent: bool = False


@dataclass(frozen=True)
class Program:
    """One step: `ranks[r]` is rank r's list, `buffers[r]` its buffers by name. Immutable by convention."""

    ranks: tuple[tuple[Instruction, ...], ...]
    buffers: tuple[Mapping[str, Buffer], ...]
    live: tuple[frozenset[str], ...] = ()  # a rank's buffers that are there at the start and may be freed
    facts: Mapping[str, object] = field(default_factory=dict)  # what the generator wants to be remembered by

    @property
    def world(self) -> int:
        return len(self.ranks)

    def __len__(self) -> int:
        return sum(map(len, self.ranks))

    def __iter__(self) -> Iterator[tuple[int, int, Instruction]]:
        """(rank, position, instruction) of every instruction."""
        for rank, listing in enumerate(self.ranks):
            for position, instruction in enumerate(listing):
                yield rank, position, instruction

    def given(self, rank: int) -> frozenset[str]:
        """Names that may be read before anything has written them: what persists, and what is live at the start."""
        return self._given[rank]

    @cached_property
    def _given(self) -> tuple[frozenset[str], ...]:
        kept = [frozenset([n for n, buffer in mine.items() if buffer.persistent]) for mine in self.buffers]
        return tuple(map(frozenset.union, kept, self.live)) if self.live else tuple(kept)

    def lanes(self, rank: int) -> tuple[str, ...]:
        """The lanes of a rank in order of first use."""
        return tuple(dict.fromkeys(instruction.lane for instruction in self.ranks[rank]))
