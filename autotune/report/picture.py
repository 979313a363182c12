"""What a drawing of a timeline needs, in nanoseconds from its first start: rows, spans, memory over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autotune.report.compare import critical_path
from autotune.report.figures import by_rank, working
from autotune.spec.program import COMPUTE, Instruction
from autotune.spec.timeline import Span, Timeline


class Mark(NamedTuple):
    """One span of a row."""

    position: int
    instruction: Instruction
    start_ns: int
    wait_ns: int  # of the length: until the last of its meeting had arrived
    length_ns: int
    written: int  # bytes of the buffers that it writes
    critical: bool  # on the critical path


@dataclass(frozen=True)
class RankPicture:
    """One rank: a row for each lane, compute first, and for each tier (time, bytes) as steps."""

    rank: int
    lanes: tuple[str, ...]
    rows: tuple[tuple[Mark, ...], ...]  # by lane, by start
    memory: dict[
        str, tuple[tuple[int, int], ...]
    ]  # tier to (ns, bytes from then on); tiers that stay empty are left out


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def pictures(timeline: Timeline) -> list[RankPicture]:
    """Every rank of a timeline, time counted from the first start of any."""
    origin = min((s.start for s in timeline.spans), default=0.0)
    critical = set(critical_path(timeline))
    begins = working(timeline)
    result = []
    for rank, spans in enumerate(by_rank(timeline)):
        listing, buffers = timeline.program.ranks[rank], timeline.program.buffers[rank]
        lanes = tuple(sorted(timeline.program.lanes(rank), key=lambda lane: lane != COMPUTE))
        rows: dict[str, list[Mark]] = {lane: [] for lane in lanes}
        for span in spans:
            instruction = listing[span.position]
            start = nanoseconds(span.start - origin)
            written = sum(buffers[name].size for name in instruction.writes if name in buffers)
            length = nanoseconds(span.end - origin) - start
            wait = nanoseconds(begins[span] - span.start)
            mark = Mark(span.position, instruction, start, wait, length, written, span in critical)
            rows[instruction.lane].append(mark)
        taken = [nanoseconds(t - origin) for t in memory_times(timeline, rank, begins)]
        repeats = len(taken) // max(len(listing), 1)
        memory = {
            tier: steps(taken, list(sizes) * repeats)
            for tier, sizes in timeline.memory[rank].items()
            if any(sizes) and taken
        }
        result.append(RankPicture(rank, lanes, tuple(tuple(rows[lane]) for lane in lanes), memory))
    return result


def memory_times(timeline: Timeline, rank: int, begins: Mapping[Span, float]) -> list[float]:
    """When each instruction of a rank took its memory, in issue order: seconds that never go back.

    Memory is accounted in issue order, while lanes run ahead of one another. The compute lane is the clock: its
    instructions take theirs when they start, those between two of them when they begin to work, but within the two.
    A timeline of several steps gives one step after the other. What was never run takes its memory with what is next.
    """
    listing = timeline.program.ranks[rank]
    begun: dict[int, list[float]] = defaultdict(list)
    for span in timeline.spans:
        if span.rank == rank:
            begun[span.position].append(begins[span])
    count = max(map(len, begun.values()), default=0)
    for each in begun.values():
        each.sort()
    order = [(step, position) for step in range(count) for position in range(len(listing))]
    limit = max((s.end for s in timeline.spans if s.rank == rank), default=0.0)
    limits = [limit] * len(order)
    for index in range(len(order) - 1, -1, -1):
        step, position = order[index]
        if listing[position].lane == COMPUTE and step < len(begun[position]):
            limit = min(limit, begun[position][step])
        limits[index] = limit
    times: list[float] = []
    now = min((s.start for s in timeline.spans), default=0.0)
    for index, (step, position) in enumerate(order):
        at = begun[position][step] if index and step < len(begun[position]) else now
        now = max(now, min(at, limits[index]))
        times.append(now)
    return times


def steps(times: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(time, bytes) where bytes change; several changes at one time are all kept, so that no peak is lost."""
    kept: list[tuple[int, int]] = []
    for time, size in zip(times, sizes, strict=False):
        if not kept or kept[-1][1] != size:
            kept.append((time, size))
    return tuple(kept)
