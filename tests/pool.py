"""One pool of worker processes for the whole test session, forked from one process that has imported torch.

A task is the name of a function in `tests.tasks`; workers 0..n-1 form a gloo world of n for it and send back what it
returns. A worker drops what a task has left before it answers: the process groups of a task and their threads are part
of cycles, and would otherwise be there, by the hundred, until Python happened to look for them.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import tests.tasks as tasks

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=TIMEOUT)
    gc.collect()
    gc.freeze()  # what is imported stays: a collection looks at what a task has made alone
    pipe.send(rank)  # here: who waits for others in a world waits for a shorter time than a busy machine starts them in
    while (order := pipe.recv()) is not None:
        number, name, world, arguments = order
        try:
            meeting = dist.PrefixStore(str(number), store)
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=TIMEOUT)
            try:
                answer = getattr(tasks, name)(rank, world, **arguments)
                dist.barrier()  # who leaves early closes connections that a late rank is still making
            finally:
                dist.destroy_process_group()
            answered = (True, answer)
        except BaseException:
            answered = (False, traceback.format_exc())
        gc.collect()
        pipe.send(answered)


class Pool:
    """Starts its workers when they are first needed.

    All tasks meet in one store, each under its number: a store of a task's own, at which ranks come before it listens,
    has them wait for half a second.
    """

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.tasks = 0

    def run(self, name: str, world: int, **arguments: Any) -> list[Any]:
        """What every rank's task returned, in rank order; a failing rank's traceback is raised."""
        return self.start(name, world, **arguments)()

    def start(self, name: str, world: int, **arguments: Any) -> Callable[[], list[Any]]:
        """Begins a task; what it returns waits for it and gives what `run` does. Meanwhile this process may compute."""
        self._grow(world)
        self.tasks += 1
        for _, pipe in self.workers[:world]:
            pipe.send((self.tasks, name, world, arguments))
        return lambda: self._answers(name, world)

    def _grow(self, world: int) -> None:
        """Starts the workers that are missing. Their server imports what they need, once, and computes nothing itself:
        it has no threads that a fork would lose."""
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.tasks"])
        new = range(len(self.workers), world)
        for rank in new:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.store.port, there), daemon=True)
            process.start()
            self.workers.append((process, here))
        for rank in new:
            assert self.workers[rank][1].poll(120) and self.workers[rank][1].recv() == rank, f"worker {rank} is not here"

    def _answers(self, name: str, world: int) -> list[Any]:
        answers = []
        for _, pipe in self.workers[:world]:
            if not pipe.poll(120):
                raise TimeoutError(f"{name}: a worker did not answer in 120 s")
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.send(None)
            process.join(5)
