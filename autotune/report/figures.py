"""Headline figures of a timeline, from one pass over its spans, and where each rank's time goes."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autotune.spec.program import COMPUTE
from autotune.spec.timeline import Span, Timeline, covered, overlap, union

IDLE = "idle"  # the class of the seconds in which a rank runs nothing


@dataclass(frozen=True)
class Figures:
    """Seconds, bytes and shares of one timeline; a tuple has one entry a rank."""

    kind: str
    makespan_s: float
    idle_share: float  # 1 - busy compute seconds / (ranks x makespan)
    busy_s: tuple[float, ...]  # of the compute lane
    exposed_s: tuple[float, ...]  # communication works and compute does not
    peak_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    spans: int

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def by_rank(timeline: Timeline) -> list[list[Span]]:
    """The spans of each rank, by start."""
    ranks: list[list[Span]] = [[] for _ in range(timeline.program.world)]
    for span in timeline.spans:
        ranks[span.rank].append(span)
    for spans in ranks:
        spans.sort(key=lambda s: (s.start, s.position))
    return ranks


def figures(timeline: Timeline) -> Figures:
    """The figures of Timeline's own methods for all ranks at once, but a meeting counts from its last arrival.

    Measured spans hold the wait for a late neighbour, predicted ones do not; waiting is idle time, not communication.
    """
    begins = working(timeline)
    busy, exposed = [], []
    for rank, spans in enumerate(by_rank(timeline)):
        listing = timeline.program.ranks[rank]
        compute = [(s.start, s.end) for s in spans if listing[s.position].lane == COMPUTE]
        meeting = union(sorted((begins[s], s.end) for s in spans if listing[s.position].peers))
        busy.append(sum(end - start for start, end in compute))
        exposed.append(covered(meeting) - overlap(meeting, union(compute)))
    makespan = timeline.makespan
    whole = makespan * timeline.program.world
    return Figures(
        kind=timeline.kind,
        makespan_s=makespan,
        idle_share=1 - sum(busy) / whole if whole else 0.0,
        busy_s=tuple(busy),
        exposed_s=tuple(exposed),
        peak_bytes=timeline.peaks,
        sent_bytes=timeline.sent,
        spans=len(timeline.spans),
    )


def turns(timeline: Timeline) -> list[int]:
    """For each span, of which step it is: a timeline of several steps holds every instruction as often."""
    nth: dict[tuple[int, int], int] = defaultdict(int)
    result = [0] * len(timeline.spans)
    for index in sorted(range(len(result)), key=lambda k: timeline.spans[k].start):
        span = timeline.spans[index]
        result[index] = nth[span.rank, span.position]
        nth[span.rank, span.position] += 1
    return result


def working(timeline: Timeline) -> dict[Span, float]:
    """When each span began to work: its start, or in a meeting that of the last to arrive (never past its end)."""
    latest: dict[tuple[str, int], float] = {}
    turn = turns(timeline)
    for span, step in zip(timeline.spans, turn, strict=True):
        meet = timeline.instruction(span).meet
        if meet is not None:
            latest[meet, step] = max(latest.get((meet, step), span.start), span.start)
    begins = {}
    for span, step in zip(timeline.spans, turn, strict=True):
        meet = timeline.instruction(span).meet
        begins[span] = span.start if meet is None else min(latest[meet, step], span.end)
    return begins


def visible(timeline: Timeline) -> Mapping[tuple[str, int], float]:
    """Seconds of the step that each class (op, stage) accounts for, a mean over the ranks; they sum to the makespan.

    At any moment a rank's time belongs to what its compute lane runs; else to what runs on another lane (the one that
    began first); else to `("idle", -1)`. Waiting inside a meeting for the last to arrive is idle too, so that
    a late neighbour is not taken for a slow link.
    """
    if not timeline.spans:
        return {}
    begins = working(timeline)
    first, last = min(s.start for s in timeline.spans), max(s.end for s in timeline.spans)
    world = timeline.program.world
    totals: dict[tuple[str, int], float] = defaultdict(float)
    for rank, spans in enumerate(by_rank(timeline)):
        listing = timeline.program.ranks[rank]
        pieces = sorted(
            ((begins[s], s.end, listing[s.position]) for s in spans if s.end > begins[s]), key=lambda p: (p[0], p[1])
        )
        compute = [p for p in pieces if p[2].lane == COMPUTE]
        taken: list[tuple[float, float]] = []
        for start, end, instruction in [*compute, *(p for p in pieces if p[2].lane != COMPUTE)]:
            totals[(instruction.op, instruction.stage)] += _claim(taken, start, end) / world
        totals[(IDLE, -1)] += (last - first - covered(taken)) / world
    return dict(totals)


def _claim(taken: list[tuple[float, float]], start: float, end: float) -> float:
    """Adds an interval to disjoint, sorted ones; returns the seconds of it that were not covered yet."""
    first = after = bisect_right(taken, start, key=lambda interval: interval[1])
    fresh = end - start
    while after < len(taken) and taken[after][0] < end:
        fresh -= min(end, taken[after][1]) - max(start, taken[after][0])
        after += 1
    if after > first:
        start, end = min(start, taken[first][0]), max(end, taken[after - 1][1])
    taken[first:after] = [(start, end)]
    return fresh
