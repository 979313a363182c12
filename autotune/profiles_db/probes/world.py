"""A world of workers on this host: started once, they measure everything asked of that many ranks, then end.

The parent never waits for longer than its deadline: workers that are stuck are ended, what they had sent is kept, and
the reason is told.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from autotune.profiles_db.cores import all_cores, own_cores, use_threads
from autotune.profiles_db.facts import private_bytes
from autotune.profiles_db.probes.crew import join
from autotune.profiles_db.probes.interference import measure_interference
from autotune.profiles_db.probes.session import merged, run_session
from autotune.profiles_db.probes.ways import copies_at_once
from autotune.spec.errors import EnvironmentFault
from autotune.spec.machine import Interference, Sample
from autotune.spec.work import Work

START_S = 60.0  # for starting processes, importing torch and joining: slow disks and first CUDA contexts included
GRACE_S = 20.0  # beyond the asked time, for the piece in hand
COLLECTIVE_S = 40.0  # a single collective that takes longer than this is stuck


@dataclass(frozen=True)
class Task:
    """What a world is asked: works by probe, seconds for them and for interference (0: not measured)."""

    device: str
    world: int
    works: Mapping[str, Sequence[Work]]
    seconds: float
    interference_s: float = 0.0
    patient: bool = False


@dataclass
class Answer:
    """What came back. `context_bytes`: of a worker before its first tensor; `communicator_bytes`: of its group.
    `at_once`: copies to and from the host that run at full speed together."""

    samples: list[Sample]
    interference: list[Interference]
    context_bytes: int = 0
    communicator_bytes: int = 0
    at_once: float = 0.0


def _device_bytes(device: str) -> int:
    if device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def _worker(rank: int, task: Task, rendezvous: str, results: Any) -> None:
    """One rank: measures what `task` says, and if it is rank 0 sends (what, value) pairs to `results`."""
    send: Callable[[str, Any], None] = (
        (lambda what, value: results.put((what, value))) if rank == 0 else (lambda *_: None)
    )
    if task.device == "cpu":
        own_cores(rank, task.world, all_cores())
    else:
        use_threads(task.world)
        torch.cuda.set_device(rank)
        torch.cuda.synchronize()
    before = _device_bytes(task.device)
    crew = join(task.device, rank, task.world, rendezvous, COLLECTIVE_S)
    if task.device == "cuda":
        dist.all_reduce(torch.ones(1, device=crew.place))
        crew.synchronize()
    crew.barrier()
    send("communicator_bytes", max(0, _device_bytes(task.device) - before))
    send("context_bytes", private_bytes())
    for sample in run_session(crew, task.works, task.seconds, lambda text: send("say", text), task.patient):
        send("sample", sample)
    if task.device == "cuda" and "copy" in task.works:
        send("at_once", copies_at_once(crew))
    if task.interference_s > 0:
        send("interference", measure_interference(crew, task.interference_s))
    crew.barrier()
    send("done", None)
    dist.destroy_process_group()


def run_world(task: Task, progress: Callable[[str], None]) -> Answer:
    """Starts `task.world` workers and collects what they measure; never takes longer than the task's time plus a grace.

    Raises EnvironmentFault when no worker could start at all; a world that breaks on the way keeps what it had.
    """
    answer = Answer([], [])
    deadline = time.perf_counter() + START_S + task.seconds + task.interference_s + GRACE_S
    mp: Any = torch.multiprocessing  # untyped in torch
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="autotune-world-") as folder:
        rendezvous = (Path(folder) / "store").as_uri()
        workers = mp.spawn(_worker, (task, rendezvous, results), nprocs=task.world, join=False, daemon=True)
        trouble = "interrupted"
        try:
            trouble = _collect(answer, workers, results, deadline, progress)
        finally:
            _end(workers, 0.2 if trouble else 5.0)
            results.close()
            answer.samples = merged(answer.samples)
    if trouble and not answer.context_bytes:
        raise EnvironmentFault(f"{task.world} workers did not start: {trouble}")
    if trouble:
        progress(f"{task.world} workers: stopped early, {len(answer.samples)} samples kept: {trouble}")
    return answer


def _collect(answer: Answer, workers: Any, results: Any, deadline: float, progress: Callable[[str], None]) -> str:
    """Reads messages until "done"; the reason if that never came."""
    while time.perf_counter() < deadline:
        try:
            what, value = results.get(timeout=0.2)
        except queue.Empty:
            try:
                if workers.join(timeout=0.01):
                    return "the workers ended without a word"
            except Exception as error:  # torch raises the worker's own traceback as text
                return _last_line(str(error))
            continue
        if what == "done":
            return ""
        if what == "say":
            progress(value)
        elif what == "sample":
            answer.samples.append(value)
        elif what == "interference":
            answer.interference.append(value)
        else:
            setattr(answer, what, value)
    return "no answer in time; a collective is stuck"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def _end(workers: Any, patience_s: float) -> None:
    """Ends the workers that this world started: a moment to leave by themselves, then by force."""
    for process in workers.processes:
        process.join(timeout=patience_s)
    for process in workers.processes:
        if process.is_alive():
            process.kill()
            process.join(timeout=5.0)
