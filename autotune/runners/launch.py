"""Launches a job's workers and gathers what they report. No torch here: the workers import it.

Workers start through torch's elastic launcher; in a world that torchrun or Slurm already started, this process is one
of them and runs its part itself.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autotune.planners.costs.works import model_flops
from autotune.planners.lower.expand import expand
from autotune.planners.lower.train import lower_training
from autotune.planners.parent import follower
from autotune.profiles_db.cores import all_cores
from autotune.runners.job import Job, RankReport, Rounds, RunResult
from autotune.runners.stream import NAME, Reader, Tell
from autotune.runners.world import world_here
from autotune.spec.errors import RunError, UsageError
from autotune.spec.program import Program
from autotune.spec.timeline import Span, Timeline

WORKER = "autotune.runners.worker"
JOBS = "jobs.jsonl"  # of several jobs: one a line
LOOK_S = 0.05  # between two looks at what workers stream
GRACE = 20.0  # seconds that workers get to end after a signal


class Looking(Protocol):
    """Who reads along while workers run."""

    def look(self) -> None: ...


def launch(
    job: Job,
    *,
    nproc: int,
    log_dir: Path,
    timeout_s: float = 3600.0,
    tell: Tell | None = None,
    worker: Sequence[str] = (WORKER,),
) -> RunResult:
    """Runs a job over `nproc` local workers (or the world that already exists). Raises RunError when one dies.
    `tell`: gets what workers stream, where they are our own. `worker`: the module that they run, and arguments after
    the job's."""
    here = world_here()
    world = here[1] if here else nproc
    if world != job.plan.world:
        plan = job.plan
        context = f"context {plan.context} x " if plan.context > 1 else ""
        mesh = f"data {plan.data} x {context}tensor {plan.tensor} x pipeline {plan.pipeline}"
        raise UsageError(
            f"the plan needs {plan.world} workers ({mesh}), found {world}",
            hint=f"run with --nproc {plan.world}",
        )
    log_dir.mkdir(parents=True, exist_ok=True)
    if here is None:
        for stale in (
            *log_dir.glob("rank-*"),
            *log_dir.glob("gradients-*"),
            *log_dir.glob("weights-*"),
            *log_dir.glob(NAME),
        ):
            stale.unlink()
        (log_dir / "job.json").write_text(job.to_json())
        module, *more = worker
        command = (module, str(log_dir / "job.json"), str(log_dir), *more)
        _elastic(nproc, log_dir, timeout_s, Reader(log_dir, tell) if tell else None, command)
    else:
        _take_part(job, log_dir, *here)
    return gather(job, log_dir)


def launch_several(
    jobs: Sequence[Job], log_dir: Path, timeout_s: float, tell: Callable[[int, RunResult], None]
) -> list[RunResult]:
    """Runs jobs of one world's size one after another, all in the workers that are started once. `tell`: gets each
    number and result as it is there. Raises RunError where one fails, after those before it were told."""
    log_dir.mkdir(parents=True, exist_ok=True)
    for stale in log_dir.glob("*/rank-*"):
        stale.unlink()
    (log_dir / JOBS).write_text("".join(f"{job.to_json()}\n" for job in jobs))
    results = _Results(jobs, log_dir, tell)
    try:
        _elastic(jobs[0].plan.world, log_dir, timeout_s, results, ("autotune.runners.several", str(log_dir)))
    except RunError as error:
        results.look()
        failed = log_dir / str(len(results.found))
        errors = sorted(failed.glob("rank-*.error"), key=lambda file: file.stat().st_mtime)
        if not errors:
            raise
        said = errors[0].read_text().strip().splitlines()[-1]
        raise RunError(f"{said} (traceback in {errors[0]})", hint=error.hint) from None
    results.look()
    return results.found


@dataclass
class _Results:
    """The results of several jobs as they come."""

    jobs: Sequence[Job]
    folder: Path
    tell: Callable[[int, RunResult], None]
    found: list[RunResult] = field(default_factory=list)

    def look(self) -> None:
        while (number := len(self.found)) < len(self.jobs):
            job, folder = self.jobs[number], self.folder / str(number)
            if not all((folder / f"rank-{rank}.json").exists() for rank in range(job.plan.world)):
                return
            self.found.append(gather(job, folder))
            self.tell(number, self.found[-1])


def _take_part(job: Job, log_dir: Path, rank: int, world: int) -> None:
    """This process's part in the world that it was started in. RunError names its rank and where the traceback is."""
    from autotune.runners.worker import attempt

    try:
        attempt(job, log_dir)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        trace = log_dir / f"rank-{rank}.error"
        raise RunError(f"worker {rank} of {world} failed: {said} (traceback in {trace})") from error


def _elastic(nproc: int, log_dir: Path, timeout_s: float, reader: Looking | None, module: Sequence[str]) -> None:
    """One elastic launch of `nproc` workers, read along with; ends with all of them gone, whatever happened. `module`:
    what they run, and its arguments."""
    cores = len(all_cores())
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // nproc)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    roots = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={nproc}", "--max-restarts=0", "--monitor-interval=0.2"]
    command += ["-m", *module]
    with open(log_dir / "workers.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            preexec_fn=follower(signal.SIGTERM),
        )
        try:
            code = _wait(process, timeout_s, reader)
        except subprocess.TimeoutExpired:
            _end(process)
            raise RunError(
                f"the run did not end within {timeout_s:.0f} s; its log is {log_dir / 'workers.log'}"
            ) from None
        except BaseException:
            _end(process)
            raise
    if code:
        raise RunError(failure(log_dir, nproc), hint=f"the whole log is {log_dir / 'workers.log'}")


def _wait(process: subprocess.Popen[bytes], timeout_s: float, reader: Looking | None) -> int:
    """The exit code. Raises subprocess.TimeoutExpired."""
    if reader is None:
        return process.wait(timeout_s)
    until = time.monotonic() + timeout_s
    while True:
        try:
            code = process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise
            reader.look()
            continue
        reader.look()
        return code


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the launcher and its workers: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + (GRACE if number == signal.SIGTERM else 5.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)


def failure(log_dir: Path, nproc: int) -> str:
    """Which worker failed first and why, from what it left behind.

    One that a signal ended left nothing, and its peers' errors are about its silence: it comes first, unless the
    launcher itself had to end it.
    """
    text = (log_dir / "workers.log").read_text(errors="replace")
    ended = re.findall(r"rank\s*:\s*(\d+) \(local_rank.*?exitcode\s*:\s*(-?\d+)", text, re.S)
    killed = [(rank, -int(code)) for rank, code in ended if int(code) < 0 and -int(code) != signal.SIGTERM]
    if killed and "forcefully exiting" not in text:
        rank, number = killed[-1]
        why = " (often the system's, out of memory)" if number == signal.SIGKILL else ""
        return f"worker {rank} of {nproc} was ended by signal {number}{why}, without a traceback"
    errors = sorted(log_dir.glob("rank-*.error"), key=lambda file: file.stat().st_mtime)
    if errors:
        rank = errors[0].stem.split("-")[1]
        last = errors[0].read_text().strip().splitlines()[-1]
        return f"worker {rank} of {nproc} failed: {last} (traceback in {errors[0]})"
    dead = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", text, re.S)
    if dead:
        code = int(dead[2])
        how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
        return f"worker {dead[1]} of {nproc} {how} without a traceback"
    return f"the workers could not be started: {text.strip().splitlines()[-1] if text.strip() else 'no output'}"


def gather(job: Job, log_dir: Path) -> RunResult:
    """The ranks' reports as one result. A step takes as long as its slowest rank."""
    reports = [RankReport.read(log_dir, rank) for rank in range(job.plan.world)]
    first = reports[0]
    steps = tuple(max(r.step_s[i] for r in reports) for i in range(len(first.step_s)))
    median = statistics.median(steps) if steps else 0.0
    losses = tuple(sum(r.losses[i] for r in reports) / job.plan.tensor for i in range(len(first.losses)))
    mfu = 0.0
    if job.workload.kind == "train" and job.peak_flops and median:
        workload = job.workload
        flops = model_flops(job.model, workload.global_batch, workload.rows, workload.seen if workload.masks else 0.0)
        mfu = flops / (median * job.peak_flops * job.plan.world)
    return RunResult(
        steps,
        (sum(map(len, first.tokens)) or job.workload.tokens) / median if median else 0.0,
        tuple(r.peak_bytes for r in reports),
        losses,
        mfu,
        tuple(tuple(t) for r in reports for t in r.tokens),
        tuple(text for r in reports for text in r.texts),
        tuple(end for r in reports for end in r.ends),
        measured_timeline(job, reports) if first.spans else None,
        first.equal,
        first.max_difference,
        max(r.prefill_s for r in reports),
        max(r.decode_s for r in reports),
        _rounds(job, reports),
        first.drift,
        first.host,
        str(log_dir),
    )


def _rounds(job: Job, reports: list[RankReport]) -> Rounds | None:
    """What became of proposed tokens; None where nobody proposed any."""
    if not reports[0].taken:
        return None
    taken = tuple(map(tuple, reports[0].taken))
    return Rounds(taken, max(r.round_s for r in reports), 1 + job.plan.speculate, tuple(reports[0].ranks))


def measured_timeline(job: Job, reports: list[RankReport]) -> Timeline:
    """The traced step of all ranks. A meeting starts when its last member comes and ends for all at once."""
    program = traced_program(job)
    spans: dict[tuple[int, int], tuple[float, float]] = {}
    meetings: dict[str, list[tuple[int, int]]] = {}
    for report in reports:
        for position, start, end in report.spans:
            spans[report.rank, position] = (start, end)
            meet = program.ranks[report.rank][position].meet
            if meet is not None:
                meetings.setdefault(meet, []).append((report.rank, position))
    for members in meetings.values():
        start = max(spans[m][0] for m in members)
        end = max(start, min(spans[m][1] for m in members))
        spans |= dict.fromkeys(members, (start, end))
    memory = [{"device": report.memory} for report in reports]
    ordered = tuple(Span(rank, position, *times) for (rank, position), times in sorted(spans.items()))
    return Timeline("measured", program, ordered, memory, (0,) * len(reports))


def traced_program(job: Job) -> Program:
    """The program that the traced step interpreted, over all ranks."""
    if job.workload.kind == "train":
        return expand(lower_training(job.plan, job.model, job.workload), job.plan)
    from autotune.planners.decoding.strategies import scored
    from autotune.planners.lower.generate import lower_generation

    round_ = job.round
    new = scored(job.plan)
    keys = round_.prompt_length + round_.new_tokens - 1 + new
    return expand(lower_generation(job.plan, job.model, round_, new, keys), job.plan)
