"""A Timeline, predicted or measured: spans per rank and lane, and bytes per tier at every instruction.

One type for both, so that they are drawn, summarised and compared by the same code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autotune.spec.program import COMPUTE, DEVICE, Instruction, Program


class Span(NamedTuple):
    """Instruction `position` of `rank` from `start` to `end`, in seconds from the step's start."""

    rank: int
    position: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`kind` is "predicted" or "measured". `memory[rank][tier][position]` is bytes while that instruction runs."""

    kind: str
    program: Program
    spans: tuple[Span, ...]
    memory: Sequence[Mapping[str, Sequence[int]]]
    sent: tuple[int, ...]  # bytes each rank put on a link, by the collective's own formula
    facts: Mapping[str, Any] = field(default_factory=dict)

    def instruction(self, span: Span) -> Instruction:
        return self.program.ranks[span.rank][span.position]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)

    def busy(self, rank: int, lane: str = COMPUTE) -> float:
        """Seconds that a lane of a rank spends in instructions."""
        return sum(s.end - s.start for s in self.spans if s.rank == rank and self.instruction(s).lane == lane)

    @property
    def idle_share(self) -> float:
        """1 - (busy compute seconds of all ranks) / (ranks x makespan): the bubble by makespan."""
        whole = self.makespan * self.program.world
        return 1 - sum(self.busy(r) for r in range(self.program.world)) / whole if whole else 0.0

    @property
    def longest_stage_idle_share(self) -> float:
        """Zero Bubble's metric (2401.10241, section 5): 1 - mean busy / longest span of one rank's compute."""
        by_rank: dict[int, list[Span]] = defaultdict(list)
        for span in self.spans:
            if self.instruction(span).lane == COMPUTE:
                by_rank[span.rank].append(span)
        longest = max((max(s.end for s in g) - min(s.start for s in g) for g in by_rank.values()), default=0.0)
        busy = sum(s.end - s.start for g in by_rank.values() for s in g) / max(len(by_rank), 1)
        return 1 - busy / longest if longest else 0.0

    def peak(self, rank: int, tier: str = DEVICE) -> int:
        """The most bytes that a tier of a rank holds at once."""
        return max(self.memory[rank].get(tier, ()), default=0)

    @property
    def peaks(self) -> tuple[int, ...]:
        """Device peak of every rank, in bytes."""
        return tuple(self.peak(r) for r in range(self.program.world))

    def exposed_communication(self, rank: int) -> float:
        """Seconds in which some communication lane of a rank is busy and its compute lane is not."""
        compute = sorted((s.start, s.end) for s in self.spans if s.rank == rank and self._lane(s) == COMPUTE)
        other = sorted((s.start, s.end) for s in self.spans if s.rank == rank and self.instruction(s).meets)
        return covered(union(other)) - overlap(union(other), union(compute))

    def _lane(self, span: Span) -> str:
        return self.instruction(span).lane


Intervals = list[tuple[float, float]]


def union(intervals: Intervals) -> Intervals:
    """Disjoint intervals covering the same points; the input is sorted by start."""
    merged: Intervals = []
    for start, end in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def covered(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def overlap(a: Intervals, b: Intervals) -> float:
    """Length of the intersection of two sorted, disjoint interval lists."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
