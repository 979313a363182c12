"""Peak memory of one step as the allocator saw it: CUDA's own statistics, or on a CPU every allocation recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return int(peak)
