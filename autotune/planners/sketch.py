"""A sketch of one rank's list: what bounds the step, whatever its instructions take and its buffers weigh.

Most plans of a search share their order with many others and differ in what its steps take and weigh. So a list is
looked at once: who waits for whom in it, and which buffers are alive together while which instruction runs. What a plan
makes of that is sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from autotune.planners.lower.train import kind_of, lasts
from autotune.planners.passes import Listing
from autotune.planners.passes.shard import Visits
from autotune.planners.resolve import own_waits
from autotune.planners.simulate import alike
from autotune.spec.program import COMPUTE, DEVICE, Buffer, Instruction

BACKWARDS = ("B", "BW")  # what hands a gradient on
STEPS = ("F", *BACKWARDS, "W")

Row = tuple[tuple[int, ...], int]
Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Around:
    """Seconds that a rank owes to the others, by stage: before its forwards and backwards, and after the latter."""

    forward: Sequence[float]
    backward: Sequence[float]
    after: Sequence[float]

    def floor(self, instruction: Instruction) -> float:
        """The earliest start of an instruction."""
        op, stage = instruction.op, instruction.stage
        return self.forward[stage] if op == "F" else self.backward[stage] if op in BACKWARDS else 0.0


class Ends(NamedTuple):
    """Seconds that no execution of a list can undercut: until its stages' own steps are done, until all that its rank
    computes is, until the stages before have done what a gradient still has to pass, and until everything is over."""

    steps: float
    compute: float
    drained: float
    whole: float


@dataclass(frozen=True)
class Moments:
    """What is alive at once: `rows` are the different moments, how many buffers of each of `kinds` and while which
    instruction (a number); `at` says which of them each position of the list is."""

    kinds: tuple[str, ...]
    rows: Sequence[Row]
    at: Sequence[int]

    @cached_property
    def _counts(self) -> Integers:
        return np.array([counts for counts, _ in self.rows], np.int64).reshape(len(self.rows), len(self.kinds))

    @cached_property
    def _beside(self) -> Integers:
        return np.array([number for _, number in self.rows], np.int64)

    def bytes(self, buffers: Mapping[str, Buffer], transient: Sequence[int]) -> Integers:
        """Device bytes of each row, given the buffer of each kind and the bytes that each instruction takes itself."""
        known = [buffers[kind] for kind in self.kinds]
        sizes = np.array([buffer.size if buffer.tier == DEVICE else 0 for buffer in known], np.int64)
        beside = np.array(transient, np.int64)
        found: Integers = self._counts @ sizes + beside[self._beside]
        return found


@dataclass(frozen=True)
class Together:
    """Moments of one list that were found apart."""

    one: Moments
    other: Moments

    @cached_property
    def _pairs(self) -> tuple[Integers, Integers]:
        first, second = zip(*dict.fromkeys(zip(self.one.at, self.other.at, strict=True)), strict=True)
        return np.array(first), np.array(second)

    def peak(self, buffers: Mapping[str, Buffer], transient: Sequence[int]) -> int:
        """The most bytes that are alive at once."""
        first, second = self._pairs
        return int((self.one.bytes(buffers, transient)[first] + self.other.bytes(buffers, (0,))[second]).max())


@dataclass(frozen=True)
class Sketch:
    """`listing` is one rank's own. `inline`: the host that issues also computes (see `resolve`)."""

    listing: Listing
    inline: bool = False

    @cached_property
    def _alike(self) -> tuple[Sequence[int], Sequence[int]]:
        return alike(self.listing)

    @cached_property
    def different(self) -> list[Instruction]:
        """One instruction of each operation, stage and part: those that take and weigh the same."""
        return [self.listing[position] for position in self._alike[0]]

    @cached_property
    def _waits(self) -> list[list[int]]:
        made = set(chain.from_iterable(i.writes for i in self.listing))
        read = set(chain.from_iterable(i.reads for i in self.listing))
        return own_waits(self.listing, frozenset((read - made) | set(filter(lasts, made))), self.inline)

    def ends(self, seconds: Sequence[float], around: Around) -> Ends:
        """What `different` taking so many seconds says."""
        floors = list(map(around.floor, self.different))
        end: list[float] = []
        last = [0.0] * len(seconds)  # those alike are on one lane if they are computed: the last one ends last
        for wait, number in zip(self._waits, self._alike[1], strict=True):
            at = floors[number]
            for earlier in wait:
                if end[earlier] > at:
                    at = end[earlier]
            last[number] = at = at + seconds[number]
            end.append(at)
        ended = list(zip(self.different, last, strict=True))
        return Ends(
            max((at for i, at in ended if i.op in STEPS), default=0.0),
            max((at for i, at in ended if i.lane == COMPUTE), default=0.0),
            max((at + around.after[i.stage] for i, at in ended if i.op in BACKWARDS), default=0.0),
            max(end, default=0.0),
        )

    @cached_property
    def moments(self) -> Moments:
        """The buffers that live within the step. One that is not written here is there from its first reader on: its
        receive is posted before that. One that nothing here frees is sent, and gone with that."""
        named = dict.fromkeys(chain.from_iterable((*i.reads, *i.writes) for i in self.listing))
        kinds = {name: kind_of(name) for name in named if not lasts(name)}
        index = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))}
        freed = set(chain.from_iterable(i.frees for i in self.listing))
        missing = {name: index[kind] for name, kind in kinds.items()}  # what is not alive
        counts, known, at = [0] * len(index), dict[Row, int](), list[int]()
        alive: dict[str, int] = {}
        for number, instruction in zip(self._alike[1], self.listing, strict=True):
            reads, writes, frees = instruction[5:8]
            for name in (*reads, *writes):
                if name in missing:
                    alive[name] = kind = missing.pop(name)
                    counts[kind] += 1
            at.append(known.setdefault((tuple(counts), number), len(known)))
            for name in (*frees, *(name for name in writes if name not in freed)):
                if name in alive:
                    missing[name] = kind = alive.pop(name)
                    counts[kind] -= 1
        return Moments(tuple(index), list(known), at)

    def wholes(self, visits: Visits | None) -> Moments:
        """The whole weights and gradients of what data ranks share, which a list before that pass does not name."""
        spans: list[tuple[str, int, int]] = []  # from one position to before another
        if visits:
            over = [len(self.listing) if done is None else done for done in visits.released]
            spans += [(f"fw.{stay.thing}", stay.begin, stay.last + 1) for stay in visits.gathers]
            spans += [(f"fg.{stay.thing}", stay.begin, end) for stay, end in zip(visits.sums, over, strict=True)]
        index = {kind: number for number, kind in enumerate(dict.fromkeys(kind for kind, _, _ in spans))}
        changes: list[list[tuple[int, int]]] = [[] for _ in range(len(self.listing) + 1)]
        for kind, begin, end in spans:
            changes[begin].append((index[kind], 1))
            changes[end].append((index[kind], -1))
        counts, known, at = [0] * len(index), dict[Row, int](), list[int]()
        for change in changes[:-1]:
            for number, by in change:
                counts[number] += by
            at.append(known.setdefault((tuple(counts), 0), len(known)))
        return Moments(tuple(index), list(known), at)
