"""Child processes that end with their parent even where that is killed and can tell nobody. Linux alone can do so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent is gone


def follower(number: int = signal.SIGKILL) -> Callable[[], None] | None:
    """What a child calls first, made by its parent: signal `number` ends it with us. None where there is no such call.

    Everything that could wait for a lock is done here, so that the call is safe just after a fork.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def follow() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it was killed just before
            os.kill(os.getpid(), number)

    return follow


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits. A process that is forked here never hears of it: its parent says when it ends, and an
    interrupt in the middle of a fork would be told in tracebacks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
