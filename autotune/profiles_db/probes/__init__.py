"""Probes: each measures one kind of work on the machine at hand. The table below is all there is to register.

An entry says which shapes make its grid, most telling first, how one piece of work is made ready, and what part of the
time it gets. A new probe is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.profiles_db.probes import (
    attention,
    collectives,
    copies,
    disk,
    launch,
    matmul,
    memory,
    optimizer,
)
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault
from autotune.spec.work import Work


@dataclass(frozen=True)
class Probe:
    """`works(setting)`: the grid. `prepare(work, crew)`: ready to run, or an error that says why not.

    `share`: part of a session's time, relative to the other probes of that session. `worlds`: whether it is also
    measured by several workers at once on a processor, which share its cores, caches and memory.
    """

    works: Callable[[Setting], Sequence[Work]]
    prepare: Callable[[Any, Crew], Trial]
    share: float
    worlds: bool = True


# In the order in which they run: what everything else rests on comes first.
PROBES: dict[str, Probe] = {
    "launch": Probe(launch.works, launch.prepare, 0.2),
    "collective": Probe(collectives.works, collectives.prepare, 6.0),
    "matmul": Probe(matmul.works, matmul.prepare, 5.0),
    "memory": Probe(memory.works, memory.prepare, 3.0),
    "attention": Probe(attention.works, attention.prepare, 3.0),
    "optimizer": Probe(optimizer.works, optimizer.prepare, 0.8),
    "copy": Probe(copies.works, copies.prepare, 1.0),
    "disk": Probe(disk.works, disk.prepare, 1.0, worlds=False),
}


def probe_for(work: Work) -> str:
    """The name of the probe that measures `work`."""
    if work.kind == "copy":
        return "disk" if getattr(work, "direction", "").startswith("disk_") else "copy"
    if work.kind not in PROBES:
        raise EnvironmentFault(f"no probe measures work of kind {work.kind!r}; there are {', '.join(PROBES)}")
    return work.kind


def prepare(work: Work, crew: Crew) -> Trial:
    """`work` made ready to run on `crew`; raises what the probe, torch or the system says when it cannot."""
    return PROBES[probe_for(work)].prepare(work, crew)
