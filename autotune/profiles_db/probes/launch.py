"""Probe: what it costs the host to issue one operation that has next to nothing to do."""

from __future__ import annotations

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.work import Launch

BURST = 200  # operations issued before the device is waited for: fewer than any device's queue holds


def works(setting: Setting) -> list[Launch]:
    """One launch is the whole grid: the cost of several is their number times it."""
    return [Launch(1)]


def prepare(work: Launch, crew: Crew) -> Trial:
    """In-place additions of one element, issued back to back without waiting; on a processor they also run."""
    x = crew.pool.fresh((1,), DTYPES["fp32"])

    def run(i: int) -> None:
        for _ in range(BURST):
            x.add_(1.0)

    return Trial(run, clock="issue", each=BURST / work.count, once=True)
