"""What a drawing of a timeline needs, in nanoseconds from its first start: rows, spans, memory over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autotune.report.compare import critical_path
from autotune.report.figures import by_rank
from autotune.spec.program import Instruction
from autotune.spec.timeline import Span, Timeline


class Mark(NamedTuple):
    """One span of a row."""

    position: int
    instruction: Instruction
    start_ns: int
    length_ns: int
    written: int  # bytes of the buffers that it writes
    critical: bool  # on the critical path


@dataclass(frozen=True)
class RankPicture:
    """One rank: a row for each lane in order of first use, and for each tier (time, bytes) as steps."""

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
    result = []
    for rank, spans in enumerate(by_rank(timeline)):
        listing, buffers = timeline.program.ranks[rank], timeline.program.buffers[rank]
        lanes = timeline.program.lanes(rank)
        rows: dict[str, list[Mark]] = {lane: [] for lane in lanes}
        for span in spans:
            instruction = listing[span.position]
            start = nanoseconds(span.start - origin)
            written = sum(buffers[name].size for name in instruction.writes if name in buffers)
            length = nanoseconds(span.end - origin) - start
            rows[instruction.lane].append(Mark(span.position, instruction, start, length, written, span in critical))
        issued = issue_times(spans, len(listing), origin)
        repeats = len(issued) // max(len(listing), 1)
        memory = {
            tier: steps(issued, list(sizes) * repeats)
            for tier, sizes in timeline.memory[rank].items()
            if any(sizes) and issued
        }
        result.append(RankPicture(rank, lanes, tuple(tuple(rows[lane]) for lane in lanes), memory))
    return result


def issue_times(spans: Sequence[Span], count: int, origin: float) -> list[int]:
    """When each of a rank's `count` positions was issued, at the latest: no later than any after it started.

    Memory is accounted in issue order, while lanes run ahead of one another, so a start alone would not be in order.
    A timeline of several steps gives several times `count`. `spans` are in order of start.
    """
    starts: dict[int, list[int]] = defaultdict(list)
    for span in spans:
        starts[span.position].append(nanoseconds(span.start - origin))
    repeats = max(map(len, starts.values()), default=1)
    end = nanoseconds(max((s.end for s in spans), default=origin) - origin)
    times = [
        starts[position][step] if step < len(starts[position]) else end
        for step in range(repeats)
        for position in range(count)
    ]
    for index in range(len(times) - 2, -1, -1):
        times[index] = min(times[index], times[index + 1])
    return times


def steps(times: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(time, bytes) where bytes change; several changes at one time are all kept, so that no peak is lost."""
    kept: list[tuple[int, int]] = []
    for time, size in zip(times, sizes, strict=False):
        if not kept or kept[-1][1] != size:
            kept.append((time, size))
    return tuple(kept)
