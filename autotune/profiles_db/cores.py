"""A process's share of the machine's cores: workers and probes both take it, so that what is measured is what runs.

The ranks of a CPU run are bound to cores of their own, as `torch.backends.xeon.run_cpu` and `torchrun --numa-binding`
bind them. Left to the scheduler, a rank that a message wakes may be put on the core of whoever sent it, and waits there
until that rank's operation or its time slice ends: several milliseconds, at random, between two operations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from autotune.profiles_db.heap import keep_heap


@cache
def all_cores() -> tuple[int, ...]:
    """The cores that this process might run on before it was bound to a share of them."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def share_of(rank: int, ranks: int, cores: Sequence[int]) -> tuple[int, ...]:
    """The cores of one of `ranks` processes on a host: equally many neighbours each; all of them where there are more
    processes than cores."""
    each = len(cores) // ranks
    return tuple(cores[rank * each : (rank + 1) * each]) if each else tuple(cores)


def use_threads(ranks: int) -> None:
    """Sets torch's threads to those of one of `ranks` processes: the cores shared out evenly, at least one each."""
    import torch

    torch.set_num_threads(max(1, len(all_cores()) // ranks))


def own_cores(rank: int, ranks: int, cores: Sequence[int]) -> None:
    """Makes this process one of `ranks` that compute on `cores` of this host: bound to its share, with as many threads,
    and keeping the memory that it frees. Threads that it starts from here on are bound as it is."""
    keep_heap()
    all_cores()  # as they are before
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # a host that does not allow it runs as it likes
            os.sched_setaffinity(0, share_of(rank, ranks, cores))
    import torch

    torch.set_num_threads(max(1, len(cores) // ranks))
