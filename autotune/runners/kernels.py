"""One more run under torch's profiler: which kernel ran when, and which call of the host had launched it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

NAME = "kernels.json"  # in the launch's folder


def record_kernels(run: Callable[[], object], device: torch.device, file: Path | None) -> None:
    """Runs once more, and writes what the profiler saw as a Chrome trace (see spec.kernel_trace). Without a file it
    only runs: ranks that nobody looks at have to take part."""
    from torch.profiler import ProfilerActivity, profile

    if file is None:
        run()
        return
    seen = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=seen) as recorded:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    recorded.export_chrome_trace(str(file))
