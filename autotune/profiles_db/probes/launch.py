"""Probe: what it costs the host to issue one operation that has next to nothing to do, or one collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels.exchange import GATHER, SCATTER, shift
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault, nearest_name
from autotune.spec.work import Launch

FEW = 20  # collectives issued likewise
BURST = 200  # operations issued before the device is waited for: fewer than any device's queue holds


def works(setting: Setting) -> list[Launch]:
    """One launch: the cost of several is their number times it. In a world of accelerators one of each collective."""
    return [Launch(1, what) for what in HANDED] if setting.device == "cuda" and setting.world > 1 else [Launch(1)]


def prepare(work: Launch, crew: Crew) -> Trial:
    """In-place additions of one element, issued back to back without waiting; on a processor they also run. Or small
    collectives, each waited for as the executor does: by the stream."""
    if work.what:
        return _collective(work, crew)
    x = crew.pool.fresh((1,), DTYPES["fp32"])

    def run(i: int) -> None:
        for _ in range(BURST):
            x.add_(1.0)

    return Trial(run, clock="issue", each=BURST / work.count, once=True)


def _collective(work: Launch, crew: Crew) -> Trial:
    if work.what not in HANDED:
        near = nearest_name(work.what, HANDED)
        raise EnvironmentFault(f"no collective named {work.what!r} to hand over (nearest: {near})")
    if crew.world < 2:
        raise EnvironmentFault(f"handing over {work.what}: found a world of {crew.world}; expected at least 2")
    whole, start = torch.zeros(64 * crew.world, device=crew.place), HANDED[work.what]
    part = whole[:64].clone()

    def run(i: int) -> None:
        for _ in range(FEW):
            start(whole, part).wait()

    return Trial(run, clock="issue", each=FEW / work.count, once=True)


# Collectives of bodies, as the executor starts them, over the world: of a whole tensor and one rank's part.
HANDED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all_reduce": lambda whole, part: dist.all_reduce(whole, async_op=True),
    "all_gather": lambda whole, part: GATHER(torch.empty_like(whole), part, async_op=True),
    "reduce_scatter": lambda whole, part: SCATTER(torch.empty_like(part), whole, async_op=True),
    "all_to_all": lambda whole, part: dist.all_to_all_single(torch.empty_like(whole), whole, async_op=True),
    "shift": lambda whole, part: shift((whole, whole), None, 1)[1],  # keys and values
}
