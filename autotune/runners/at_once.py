"""Several processes that do the same at once, as a run's workers do, and what each of them found."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

LOOK_S, JOIN_S = 0.02, 10.0


def at_once(worker: Callable[..., None], ranks: int, *arguments: Any) -> list[Any]:
    """What `ranks` processes put into their queue, one thing each: `worker(rank, *arguments, queue)`. As they come, and
    fewer where one of them died; then the others are ended."""
    context = get_context("spawn")
    queue = context.SimpleQueue()
    given = [(rank, *arguments, queue) for rank in range(ranks)]
    processes = [context.Process(target=worker, args=args, daemon=True) for args in given]
    for process in processes:
        process.start()
    found: list[Any] = []
    while len(found) < ranks:
        if not queue.empty():
            found.append(queue.get())
        elif any(process.exitcode not in (None, 0) for process in processes):
            break
        else:
            time.sleep(LOOK_S)
    for process in processes:
        process.join(JOIN_S) if len(found) == ranks else process.terminate()
    return found
