"""Peak memory of one step as the allocator saw it: CUDA's own statistics, or on a CPU every allocation recorded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from autotune.runners.body import unhurried
from autotune.runners.interpreter import counted


def peak_during(step: Callable[[], Any], values: Mapping[str, Any], device: torch.device) -> int:
    """Bytes at the peak of `step()`, those already held by `values` included; the runtime's own context is not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    from torch.profiler import ProfilerActivity, profile

    held = counted(values)
    with unhurried(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    return held + most_alive(allocations(recorded.profiler.kineto_results.experimental_event_tree()))


def allocations(roots: Iterable[Any]) -> list[tuple[int, int]]:
    """(address, bytes; negative where it is given back) of every allocation in a profiler's event tree, in time."""
    found: list[tuple[int, int, int]] = []
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda e: e[0])]


def most_alive(events: Iterable[tuple[int, int]]) -> int:
    """The most bytes alive at once, counted from the first event.

    A communication backend's thread may be the last to let go of a buffer, and the profiler does not see what such a
    thread gives back: a block whose memory is handed out again had been given back by then.
    """
    alive: list[tuple[int, int]] = []  # (address, bytes), by address; no two overlap
    now = peak = 0
    for address, size in events:
        at = bisect_left(alive, (address, 0))
        if size <= 0:
            now += size
            if at < len(alive) and alive[at][0] == address:
                del alive[at]
            continue
        first = at - (at > 0 and sum(alive[at - 1]) > address)
        last = bisect_left(alive, (address + size, 0))
        now += size - sum(taken for _, taken in alive[first:last])
        alive[first:last] = [(address, size)]
        peak = max(peak, now)
    return peak
