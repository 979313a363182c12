"""Whether an accelerator runs at its working pace: a fixed matrix product, timed until its rate settles, then again.

A device that has idled starts at a fraction of its clock, and one that others or its own power limit hold back falls
behind. Either shows in a product of known size, so the product is timed before anything else and beside every piece.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

SIDE, BUNDLE = 4096, 8  # one stretch: this many products of this side, some milliseconds on a fast device
STEADY, TOLERANCE = 12, 0.03  # settled: this many stretches in a row within this of one another
FEWEST_S, MOST_S = 0.5, 6.0
BEHIND = 1.08  # a stretch that takes this many times the settled one says that the device has slowed


@dataclass
class Pace:
    """The pace of one device. `seconds`: of a settled stretch; 0 until `settle` was called, and always on a CPU.

    `stretch` times the fixed product once, in seconds: by default on the current CUDA device.
    """

    device: str
    stretch: Callable[[], float] | None = None
    seconds: float = 0.0
    first: float = 0.0  # the first stretch ever timed
    again: int = 0  # how often the device was found behind
    _made: Callable[[], float] | None = field(default=None, repr=False)

    def look(self) -> float:
        """Seconds of one stretch now."""
        if self._made is None:
            self._made = self.stretch or _products()
        return self._made()

    def settle(self, clock: Callable[[], float] = time.perf_counter) -> str:
        """Works the device until stretches take the same time; what happened, in words ("" on a CPU)."""
        if self.device != "cuda":
            return ""
        begun, seen, recent = clock(), 0, deque[float](maxlen=STEADY)
        while True:
            recent.append(self.look())
            self.first = self.first or recent[0]
            seen += 1
            spent = clock() - begun
            steady = len(recent) == STEADY and max(recent) <= min(recent) * (1 + TOLERANCE)
            if (steady and spent >= FEWEST_S) or spent >= MOST_S:
                break
        self.seconds = statistics.median(recent)
        how = "settled" if steady else "did not settle"
        return (
            f"pace: {how} after {spent:.1f} s at {self.rate(self.seconds):.0f} TFLOP/s "
            f"(first {self.rate(self.first):.0f})"
        )

    def behind(self) -> bool:
        """Whether the device is slower now than when it had settled. False on a CPU and before `settle`."""
        if not self.seconds or self.look() <= BEHIND * self.seconds:
            return False
        slow = min(self.look(), self.look()) > BEHIND * self.seconds  # one late stretch may be anything
        self.again += slow
        return slow

    def release(self) -> None:
        """Gives the operands' memory back."""
        self._made = None

    @staticmethod
    def rate(seconds: float) -> float:
        """TFLOP/s of a stretch of `seconds`."""
        return BUNDLE * 2 * SIDE**3 / seconds / 1e12


def _products() -> Callable[[], float]:
    """Times bf16 products of random operands by events; allocates once."""
    cuda: Any = torch.cuda  # untyped in torch
    a, b = (torch.randn(SIDE, SIDE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def stretch() -> float:
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(BUNDLE):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return stretch
