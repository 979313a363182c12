"""A world that stands: the ranks that torchrun started join once and then run one job after another.

Starting workers takes longer than most jobs do. A job that fails, or does not end in time, ends the process with it:
its peers may wait for it on the device, where nothing can call them back. torchrun then starts all of them anew
(`--max-restarts`), and whoever runs the jobs goes on with the next one.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from autotune.runners.job import Job, RunResult
from autotune.runners.launch import gather
from autotune.runners.worker import join, leave, part

T = TypeVar("T")


def attempt_here() -> int:
    """How many times torchrun has started this world anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def folder_here() -> Path:
    """A folder that all ranks and all attempts of this world name alike."""
    name = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("MASTER_PORT", "0")
    return Path(tempfile.gettempdir()) / f"autotune-standing-{os.getuid()}-{name}"


@dataclass(frozen=True)
class Standing:
    """One rank of the world; every method is called by all ranks, in one order."""

    rank: int
    size: int
    device: torch.device
    folder: Path

    @classmethod
    def join(cls, device: str) -> Standing:
        """Joins; `device` is "cpu" (gloo) or "cuda" (NCCL, a device a rank)."""
        folder = folder_here()
        folder.mkdir(parents=True, exist_ok=True)
        rank, place = join(device)
        return cls(rank, dist.get_world_size(), place, folder)

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; the others wait. It must be picklable."""
        box: list[T | None] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def run(self, job: Job, name: str, patience_s: float) -> RunResult:
        """Runs the job on all ranks. A failure here or within `patience_s` no end: this process ends, see above."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{self.rank}.error").unlink(missing_ok=True)
        with self.watched(folder, patience_s):
            part(job, self.rank, self.device, folder)
            result = gather(job, folder)
            dist.barrier()  # whoever comes late still reads the reports
        gc.collect()  # a trainer's cycles must not count in the next one's peak
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    @contextmanager
    def watched(self, folder: Path, patience_s: float) -> Iterator[None]:
        """Ends this process where what is inside fails or does not end, leaving why in the folder's `rank-N.error`."""

        def end(why: str) -> None:
            (folder / f"rank-{self.rank}.error").write_text(why)
            print(f"rank {self.rank}: {why.strip().splitlines()[-1]}", flush=True)
            leave(1)

        late = threading.Timer(patience_s, end, (f"did not end within {patience_s:.0f} s",))
        late.daemon = True
        late.start()
        try:
            yield
        except Exception:
            end(traceback.format_exc())
        finally:
            late.cancel()

    def why(self, name: str) -> str:
        """What the first rank that failed in an earlier attempt at `name` said; "" where none said anything."""
        errors = sorted((self.folder / name).glob("rank-*.error"), key=lambda file: file.stat().st_mtime)
        told = [f"{file.stem}: {file.read_text().strip().splitlines()[-1]}" for file in errors]
        return told[0] if told else ""

    def leave(self) -> NoReturn:
        """Ends this process when all ranks have come here. Always with 0: anything else would start them again."""
        dist.barrier()
        dist.destroy_process_group()
        leave(0)
