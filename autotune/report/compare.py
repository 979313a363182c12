"""Predicted against measured: which instructions were mispriced, and what bounds a timeline's length."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from autotune.report.figures import turns, visible, working
from autotune.report.units import seconds, signed
from autotune.spec.errors import UsageError
from autotune.spec.program import COMPUTE, Program
from autotune.spec.timeline import Span, Timeline


@dataclass(frozen=True)
class Difference:
    """One class of instructions (operation and stage; `idle` is -1) in two timelines of one program.

    `predicted_s` and `measured_s` are mean seconds of one instruction, without waiting for the others of its meeting.
    `contribution_s` is what the class adds to predicted minus measured step time: over all classes they sum to exactly
    that. `share` is the contribution over the sum of their magnitudes, so that errors that cancel are still seen.
    """

    op: str
    stage: int
    count: int
    predicted_s: float
    measured_s: float
    ratio: float | None  # predicted / measured; None where nothing was measured
    contribution_s: float
    share: float

    @property
    def label(self) -> str:
        return self.op if self.stage < 0 else f"{self.stage}{self.op}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def differences(predicted: Timeline, measured: Timeline) -> list[Difference]:
    """Every class of instructions, the largest contribution to the step error first.

    The timelines are of one program (the same instructions for each rank); UsageError says where they part.
    """
    _same_program(predicted.program, measured.program)
    means = [_means(timeline) for timeline in (predicted, measured)]
    shown = [visible(timeline) for timeline in (predicted, measured)]
    classes = dict.fromkeys([*shown[0], *shown[1]])
    contributions = {c: shown[0].get(c, 0.0) - shown[1].get(c, 0.0) for c in classes}
    magnitude = sum(map(abs, contributions.values()))
    rows = []
    for op, stage in classes:
        count, of_predicted = means[0].get((op, stage), (0, shown[0].get((op, stage), 0.0)))
        _, of_measured = means[1].get((op, stage), (0, shown[1].get((op, stage), 0.0)))
        contribution = contributions[op, stage]
        rows.append(
            Difference(
                op=op,
                stage=stage,
                count=count,
                predicted_s=of_predicted,
                measured_s=of_measured,
                ratio=of_predicted / of_measured if of_measured else None,
                contribution_s=contribution,
                share=contribution / magnitude if magnitude else 0.0,
            )
        )
    return sorted(rows, key=lambda d: (-abs(d.contribution_s), d.op, d.stage))


def lines(rows: list[Difference], most: int = 12) -> list[str]:
    """The first rows as a table of plain text."""
    table = [f"{'class':<16}{'count':>7}{'predicted':>12}{'measured':>12}{'ratio':>8}{'of the step':>14}{'share':>9}"]
    for row in rows[:most]:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        contribution = ("+" if row.contribution_s > 0 else "") + seconds(row.contribution_s)
        table.append(
            f"{row.label:<16}{row.count:>7}{seconds(row.predicted_s):>12}{seconds(row.measured_s):>12}{ratio:>8}"
            f"{contribution:>14}{signed(row.share):>9}"
        )
    return table


def critical_path(timeline: Timeline) -> list[Span]:
    """The chain of instructions that the end of the step waited for, in order of time.

    Backwards from the span that ends last. A span waited for whichever ended last of: the instruction before it on its
    lane, the writers of what it reads, the readers of what it overwrites, on its own rank and on every rank that it
    meets. Where a rank issued it only after computing something (a host that also computes does), that counts too.
    Gaps between two spans of the path are delays that no instruction explains (launches, a busy host).
    """
    turn, begins = turns(timeline), working(timeline)
    steps = max(turn, default=0) + 1
    span_of: dict[tuple[int, int], Span] = {}  # by rank, and by step x length + position
    together: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    name_of: dict[Span, tuple[int, int]] = {}
    for span, step in zip(timeline.spans, turn, strict=True):
        key = (span.rank, step * len(timeline.program.ranks[span.rank]) + span.position)
        span_of[key], name_of[span] = span, key
        meet = timeline.instruction(span).meet
        if meet is not None:
            together[meet, step].append(key)
    waits = [_waits_for(timeline.program, rank, steps) for rank in range(timeline.program.world)]
    step_of = dict(zip(timeline.spans, turn, strict=True))

    path: list[Span] = []
    seen: set[tuple[int, int]] = set()
    current = max(timeline.spans, key=lambda s: (s.end, -s.rank, -s.position), default=None)
    while current is not None and name_of[current] not in seen:  # measured clocks may make two wait for each other
        path.append(current)
        meet = timeline.instruction(current).meet
        met = [name_of[current]] if meet is None else together[meet, step_of[current]]
        seen.update(met)
        before = []
        for rank, index in met:
            must, issued = waits[rank][index]
            before += [(span_of[rank, i], True) for i in must if (rank, i) in span_of]
            computed = span_of.get((rank, issued))
            if computed is not None and computed.end <= begins[current]:
                before.append((computed, False))
        found = max(before, key=lambda b: (b[0].end, b[1], -b[0].rank, -b[0].position), default=None)
        current = found[0] if found else None
    return path[::-1]


def _waits_for(program: Program, rank: int, steps: int) -> list[tuple[frozenset[int], int]]:
    """For each instruction of a rank, step after step: those that it must wait for, and the last compute before it."""
    given = program.given(rank)
    on_lane: dict[str, int] = {}
    writers: dict[str, list[int]] = defaultdict(list)
    readers: dict[str, list[int]] = {}
    result: list[tuple[frozenset[int], int]] = []
    for step in range(steps):
        for position, instruction in enumerate(program.ranks[rank]):
            index = step * len(program.ranks[rank]) + position
            found = {on_lane[instruction.lane]} if instruction.lane in on_lane else set()
            for name in instruction.reads:
                if len(writers[name]) > instruction.lag:
                    found.add(writers[name][-1 - instruction.lag])
                readers.setdefault(name, []).append(index)
            for name in instruction.writes:
                if name in given:
                    found.update(readers.pop(name, ()))
                writers[name].append(index)
            found.discard(index)
            result.append((frozenset(found), on_lane.get(COMPUTE, -1)))
            on_lane[instruction.lane] = index
    return result


def _means(timeline: Timeline) -> dict[tuple[str, int], tuple[int, float]]:
    """Of each class: how many spans, and their mean seconds of work."""
    begins = working(timeline)
    totals: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in timeline.spans:
        instruction = timeline.instruction(span)
        totals[instruction.op, instruction.stage].append(span.end - begins[span])
    return {key: (len(values), sum(values) / len(values)) for key, values in totals.items()}


def _same_program(a: Program, b: Program) -> None:
    if a.world != b.world:
        raise UsageError(f"timelines of different programs: {a.world} ranks and {b.world} ranks")
    for rank, (mine, other) in enumerate(zip(a.ranks, b.ranks, strict=True)):
        if mine == other:
            continue
        place = next(
            (i for i, (x, y) in enumerate(zip(mine, other, strict=False)) if x != y), min(len(mine), len(other))
        )
        found = [listing[place].label if place < len(listing) else "the end" for listing in (mine, other)]
        raise UsageError(f"timelines of different programs: rank {rank} position {place}: {found[0]} and {found[1]}")
