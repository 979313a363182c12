"""One worker of a run: `python -m autotune.runners.worker JOB.json LOG_FOLDER`, started by torchrun or Slurm.

It takes its rank from the environment, runs its part of the job and writes `rank-N.json`; a failure leaves its
traceback in `rank-N.error` and a non-zero exit, upon which the launcher ends the others.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from autotune.planners.decoding.strategies import STRATEGIES
from autotune.profiles_db.cores import all_cores, own_cores, use_threads
from autotune.runners.checkpoint import kept, open_checkpoint, shard
from autotune.runners.job import Job
from autotune.runners.reference import begun, init_weight
from autotune.runners.seats import backend_for, exchange, seat_here
from autotune.runners.state import DTYPES, Loader
from autotune.spec.graph import Weight, blocks
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec

TIMEOUT = timedelta(seconds=600)


def _meeting(rank: int, world: int) -> PrefixStore:
    """Where the ranks meet. The store of a world that torchrun started again still has what the dead ones wrote, so
    every attempt has names of its own."""
    store, _, _ = next(rendezvous("env://", rank, world, timeout=TIMEOUT))
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def join(where: str) -> tuple[int, torch.device]:
    """Joins the world that the environment describes on "cpu" or "cuda"; (rank, device). Threads as the probes have."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _meeting(rank, world)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    local = int(os.environ.get("LOCAL_RANK", rank))
    if where == "cuda":
        # A lane that waits for a peer must not hold up another that shares its hardware queue: one each, up to 32.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        use_threads(here)
        backend = backend_for(exchange(store, rank, world, seat_here(device)))
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=None if backend == "gloo" else device,
        )
    else:
        device = torch.device("cpu")
        own_cores(local, here, all_cores())
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.set_grad_enabled(False)
    return rank, device


def loader(job: Job, rank: int, device: torch.device) -> Loader:
    """Where a worker's weights come from: its shards of a checkpoint, or seeded random ones."""
    tensor = job.plan.tensor
    return _weights(job, job.model, job.checkpoint, rank % tensor, tensor, device)


def draft_loader(job: Job, device: torch.device) -> Loader | None:
    """The same of the whole draft model, where the plan has one."""
    draft = job.workload.draft
    if draft is None or not STRATEGIES[job.plan.decoding].draft:
        return None
    load = _weights(job, draft, job.draft_checkpoint, 0, 1, device)
    if isinstance(draft, HeadsSpec) and not job.draft_checkpoint:
        return begun(job.model, load, _weights(job, job.model, job.checkpoint, 0, 1, device))
    return load


def target_loader(job: Job, device: torch.device) -> Loader | None:
    """The same of the whole frozen model that heads are trained for."""
    target = job.model.target if isinstance(job.model, HeadsSpec) else None
    return _weights(job, target, job.target_checkpoint, 0, 1, device) if target else None


def _weights(job: Job, model: ModelSpec, folder: str, tensor: int, tensors: int, device: torch.device) -> Loader:
    dtype = DTYPES[job.workload.precision]
    if not folder:
        # A checked run starts from what the reference draws on a CPU; others draw where it is fast.
        where = torch.device("cpu") if job.check else device
        return lambda index, weight: shard(
            weight, init_weight(weight, job.seed, kept(weight, dtype), where), tensor, tensors
        )
    checkpoint, trains = open_checkpoint(folder), job.workload.kind == "train"
    checkpoint.verify((weight for block in blocks(model) for weight in block.tensors()), trains)

    def load(index: int, weight: Weight) -> torch.Tensor:
        if trains and checkpoint.lacks(weight):  # drawn on a CPU: the same on every rank, whatever it runs on
            return shard(weight, init_weight(weight, job.seed, kept(weight, dtype)), tensor, tensors)
        return checkpoint.load(weight, tensor, tensors, kept(weight, dtype), device)

    return load


def part(job: Job, rank: int, device: torch.device, folder: Path) -> None:
    """This rank's part of a job in the world that it has joined; writes its report."""
    load = loader(job, rank, device)
    if job.workload.kind == "train":
        from autotune.runners.train_run import train_run

        of_target = target_loader(job, device)
        if of_target and not job.checkpoint and isinstance(job.model, HeadsSpec) and job.model.target:
            load = begun(job.model.target, load, of_target)
        report = train_run(job, rank, device, load, folder, of_target)
    else:
        from autotune.runners.generate_run import generate_run

        report = generate_run(job, rank, device, load, folder, draft_loader(job, device))
    report.write(folder)
    dist.barrier()


def work(job: Job, folder: Path) -> None:
    """Joins the world, runs this rank's part and leaves the world."""
    rank, device = join(job.device)
    try:
        part(job, rank, device, folder)
    finally:
        gc.collect()  # CUDA graphs in cycles: NCCL waits for those that hold its collectives before a group may end
        dist.destroy_process_group()


def attempt(job: Job, folder: Path) -> None:
    """`work`, leaving the traceback of whatever it raises in `rank-N.error`."""
    try:
        work(job, folder)
    except BaseException:
        (folder / f"rank-{os.environ.get('RANK', '0')}.error").write_text(traceback.format_exc())
        raise


def leave(code: int) -> NoReturn:
    """Ends the process at once. Python's own way out may abort: gloo's threads may still want the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str]) -> NoReturn:
    try:
        attempt(Job.from_json(Path(arguments[0]).read_text()), Path(arguments[1]))
    except BaseException as error:
        print(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(1)  # a peer may be blocked in a collective with us: not waiting for it
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
