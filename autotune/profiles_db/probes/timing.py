"""How one piece of work is timed: warmed up, repeated, by the clock that fits the device; median and spread.

On an accelerator the queue is filled behind a delay kernel first, so that what is timed is the device's work and not
the host's issuing of it; what the host itself costs is the launch probe's to say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autotune.profiles_db.probes.crew import Crew

WINDOW_S = 300e-6  # one timed stretch is at least this long: a clock read then costs less than a thousandth
MOST_RUNS = 9  # of one look at a piece; a session that has time looks again
MOST_BUNDLED = 200
DELAY_HZ = 2e9  # the delay kernel counts device cycles; accelerators clock below this, so delays come out long enough


@dataclass(frozen=True)
class Trial:
    """Work made ready: `run(i)` does it for the i-th time (i picks among operands that must come cold).

    clock: "device" (events where there are any), "host" (the host waits for the end, copies of pageable memory),
    "issue" (the host does not wait). `each`: works done by one run. `once`: a run is long and never bundled.
    """

    run: Callable[[int], Any]
    clock: str = "device"
    each: float = 1.0
    once: bool = False
    align: Callable[[], Any] | None = None
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class Timing:
    """Median seconds of one work, interquartile range over median, and how many stretches were timed."""

    seconds: float
    spread: float
    runs: int


def summary(times: list[float]) -> Timing:
    """Median and relative interquartile range of `times` (seconds, not empty)."""
    median = statistics.median(times)
    if len(times) < 3 or median <= 0:
        return Timing(median, 0.0, len(times))
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, (high - low) / median, len(times))


def _host_stretch(trial: Trial, crew: Crew, first: int, count: int) -> float:
    crew.synchronize()
    start = time.perf_counter()
    for i in range(first, first + count):
        trial.run(i)
    if trial.clock != "issue":
        crew.synchronize()
    seconds = time.perf_counter() - start
    crew.synchronize()
    return seconds


def _device_stretch(trial: Trial, first: int, count: int, issue_s: float) -> float:
    cuda: Any = torch.cuda  # untyped in torch
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda._sleep(int(issue_s * DELAY_HZ))
    if trial.align:
        trial.align()
    start.record()
    for i in range(first, first + count):
        trial.run(i)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def time_trial(trial: Trial, crew: Crew, seconds: float) -> Timing:
    """Times `trial` for about `seconds`; every rank of `crew` does the same number of runs, as rank 0 decides.

    Three runs always happen (a warm-up, an estimate and one that is timed), however little time is left.
    """
    crew.barrier()
    trial.run(0)
    crew.synchronize()
    (estimate,) = crew.agree([_host_stretch(trial, crew, 1, 1)])
    if estimate < 0.1 * seconds:  # the first estimate may hold a lazy initialisation
        (estimate,) = crew.agree([min(estimate, _host_stretch(trial, crew, 2, 1))])
    bundle = 1 if trial.once else max(1, min(MOST_BUNDLED, int(WINDOW_S / max(estimate, 1e-7))))
    fewest = 1 if estimate > seconds else 2
    runs = int(max(fewest, min(MOST_RUNS, seconds / max(estimate * bundle, 1e-7))))
    by_events = trial.clock == "device" and crew.device == "cuda"
    begun = time.perf_counter()
    if by_events:
        for i in range(bundle):
            trial.run(3 + i)
    issue = 1.5 * (time.perf_counter() - begun) + 20e-6
    crew.synchronize()
    crew.barrier()
    times = []
    for r in range(runs):
        first = 3 + r * bundle
        stretch = (
            _device_stretch(trial, first, bundle, issue) if by_events else _host_stretch(trial, crew, first, bundle)
        )
        times.append(stretch / bundle / trial.each)
    return summary(times)
