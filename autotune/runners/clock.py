"""When something began and ended, by the clock that fits the device: events on CUDA, so that the host need not wait."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from autotune.profiles_db.probes.timing import DELAY_HZ


@dataclass(frozen=True)
class Clock:
    """Wall time on a CPU, events on a stream on CUDA."""

    device: torch.device

    def mark(self, stream: Any = None) -> Any:
        """This moment: on CUDA when `stream` (without one, the current) has done what it was given so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self.device))
        return event

    def between(self, a: Any, b: Any) -> float:
        """Seconds from one mark to another; on CUDA both must have passed."""
        return float(a.elapsed_time(b)) * 1e-3 if self.device.type == "cuda" else float(b - a)

    def hold(self, seconds: float) -> None:
        """Keeps a CUDA device busy while the host issues: the queue behind it then runs without gaps."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(seconds * DELAY_HZ))

    def settle(self) -> None:
        """Waits until every mark has passed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
