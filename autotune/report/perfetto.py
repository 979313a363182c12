"""Timelines as Chrome trace events, which Perfetto and chrome://tracing open.

The format: `ph` X is a span with `ts` and `dur` in microseconds, C a counter, M a name; `pid` is a process, `tid` one
of its threads (the Trace Event Format document of the Chromium project).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotune.report.picture import Mark, RankPicture, pictures
from autotune.spec.timeline import Timeline


def perfetto(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """A trace object: a process for each rank, a thread for each lane, a counter for each tier.

    Rank r of timeline k is process k x stride + r, the stride a power of ten that no world exceeds, so that predicted
    and measured never share one.
    """
    most = max((t.program.world for t in timelines), default=1)
    stride = 10 ** max(2, len(str(max(most - 1, 0))))
    events: list[dict[str, Any]] = []
    for index, timeline in enumerate(timelines):
        for picture in pictures(timeline):
            events += _rank_events(timeline.kind, picture, index * stride + picture.rank)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _rank_events(kind: str, picture: RankPicture, pid: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": f"{kind} rank {picture.rank}"}},
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}},
    ]
    for tid, (lane, marks) in enumerate(zip(picture.lanes, picture.rows, strict=True)):
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": lane}})
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        events += [_span_event(kind, mark, pid, tid) for mark in marks]
    for tier, points in picture.memory.items():
        events += [
            {"ph": "C", "pid": pid, "tid": 0, "ts": time / 1000, "name": f"{tier} bytes", "args": {"bytes": size}}
            for time, size in points
        ]
    return events


def _span_event(kind: str, mark: Mark, pid: int, tid: int) -> dict[str, Any]:
    instruction = mark.instruction
    args: dict[str, Any] = {
        "op": instruction.op,
        "stage": instruction.stage,
        "item": instruction.item,
        "position": mark.position,
        "bytes_written": mark.written,
        "critical": mark.critical,
    }
    if instruction.peers:
        args["peers"] = list(instruction.peers)
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": mark.start_ns / 1000,
        "dur": mark.length_ns / 1000,
        "name": instruction.label,
        "cat": kind,
        "args": args,
    }
