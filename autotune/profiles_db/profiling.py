"""Profiling: measures this machine and returns a Profile, or measures just the pieces of work that are asked for.

A processor is measured twice over: by one worker that has all cores, and by several at once that share them, with the
threads that the executor gives each (cores // workers, at least one), because that is how its workers will meet.
Accelerators are measured by one process, and in worlds of several for what passes between them. Torch is imported only
when something is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from autotune.profiles_db.facts import Facts, machine_facts
from autotune.profiles_db.heap import keep_heap
from autotune.spec.errors import EnvironmentFault, UsageError, nearest_name
from autotune.spec.machine import COPIES_AT_ONCE, Device, Interference, Link, Profile, Sample
from autotune.spec.work import Collective, Copy, Launch, Matmul, Memory, Work

Progress = Callable[[str], None]
PEAKS = 2  # pieces at the head of the product and memory grids that show the best rates
SHARED = ("launch", "collective", "copy")  # probes of several accelerators: handing collectives over, links, the host
CLEAR = 4.0  # latencies that a message must take before its bandwidth is read off
# What `only` may name: the table of probes.PROBES (a test holds them equal) and two that are no piece of work.
NAMES = ("launch", "collective", "matmul", "memory", "attention", "optimizer", "copy", "disk", "host", "interference")


@dataclass(frozen=True)
class Budget:
    """Seconds that are spent measuring; starting processes and importing torch come on top.

    alone: by one process; worlds: by all worlds together; interference: in each world; host: beside an accelerator.
    """

    alone: float
    worlds: float
    interference: float
    host: float = 0.0


BUDGETS: dict[tuple[str, bool], Budget] = {  # by device and quick
    ("cpu", True): Budget(12.0, 11.0, 1.0),
    ("cpu", False): Budget(105.0, 110.0, 5.0),
    ("cuda", True): Budget(20.0, 9.0, 1.0, 2.0),
    ("cuda", False): Budget(115.0, 75.0, 4.0, 6.0),
}


def worlds_of(facts: Facts, quick: bool) -> tuple[int, ...]:
    """World sizes to measure: on a processor 2 (and 4 in full), on accelerators the powers of two and all of them."""
    if facts.kind == "cpu":
        return (2,) if quick else (2, 4)
    powers = [1 << p for p in range(1, 8) if 1 << p <= facts.count]
    sizes = sorted({*powers, facts.count} - {1})
    return tuple(sorted({sizes[0], sizes[-1]}) if quick and sizes else sizes)


def _wanted(only: Sequence[str]) -> frozenset[str]:
    for name in only:
        if name not in NAMES:
            near = nearest_name(name, NAMES)
            hint = f"did you mean {near}?" if near else f"choose from {', '.join(NAMES)}"
            raise UsageError(f"only: found {name!r}; expected a probe's name", hint=hint)
    return frozenset(only or NAMES)


@contextmanager
def _all_cores(cores: int) -> Iterator[None]:
    """Torch uses every core inside, and what it used before outside."""
    import torch

    before = torch.get_num_threads()
    keep_heap()
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(samples: Iterable[Sample]) -> dict[str, float]:
    """The best FLOP/s of a matrix product by dtype, among those that one process measured."""
    peaks: dict[str, float] = {}
    for s in samples:
        if isinstance(s.work, Matmul) and s.ranks == 1:
            peaks[s.work.dtype] = max(peaks.get(s.work.dtype, 0.0), s.work.flops / s.seconds)
    return peaks


def _bandwidth(samples: Iterable[Sample]) -> float:
    """The best bytes/s, read plus write, of copies and reads at the largest sizes (small ones measure the cache)."""
    moved = [
        (float(s.work.bytes) * (2 if isinstance(s.work, Copy) else 1), s.seconds)
        for s in samples
        if s.ranks == 1
        and (
            (isinstance(s.work, Memory) and s.work.op in ("copy", "read", "add"))
            or (isinstance(s.work, Copy) and s.work.direction == "d2d")
        )
    ]
    largest = max((size for size, _ in moved), default=0.0)
    return max((size / seconds for size, seconds in moved if size >= largest / 2), default=0.0)


def fit_link(samples: Iterable[Sample], name: str, size: int) -> Link | None:
    """A link from messages between two workers: latency of the smallest, bandwidth of the best beyond that latency.

    None without messages of at least two sizes. `size`: devices joined (0: no limit).
    """
    messages = [s for s in samples if isinstance(s.work, Collective) and s.work.op == "send_recv"]
    fewest = min((s.ranks for s in messages), default=0)
    times = sorted((s.work.bytes, s.seconds) for s in messages if s.ranks == fewest)
    if len(times) < 2:
        return None
    latency = times[0][1]
    # Only where the message takes several latencies does what is left over say something about bandwidth.
    rates = [moved / (seconds - latency) for moved, seconds in times[1:] if seconds > CLEAR * latency]
    return Link(name, size, max(rates, default=times[-1][0] / times[-1][1]), latency)


def _slug(facts: Facts) -> str:
    words = re.sub(r"\((?:R|TM|tm|r)\)", "", facts.name)
    plain = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"{plain}-{facts.cores}-cores" if facts.kind == "cpu" else f"{plain}-x{facts.count}"


def _plan(names: Iterable[str], device: str, quick: bool, world: int, cores: int) -> dict[str, Sequence[Work]]:
    """Works by probe for one session; in a world of accelerators only what they share: links and the host's memory."""
    from autotune.profiles_db.probes import PROBES
    from autotune.profiles_db.probes.grid import Setting

    chosen = set(names)
    # Workers that must take turns on a core spend their time waiting for one another: the coarse grid is what fits.
    setting = Setting(device, quick or (device == "cpu" and world > cores), world)
    plan = {
        name: probe.works(setting)
        for name, probe in PROBES.items()
        if name in chosen and (world == 1 or (probe.worlds if device == "cpu" else name in SHARED))
    }
    if world == 1:  # whatever is asked, a profile says what its device can do at best
        plan = {name: PROBES[name].works(setting)[:PEAKS] for name in ("matmul", "memory") if name not in plan} | plan
    return {name: works for name, works in plan.items() if works}


@dataclass
class _Found:
    """What the sessions of one profile add up to."""

    samples: list[Sample]
    interference: list[Interference]
    coefficients: dict[str, float]
    context_bytes: int = 0
    host_peaks: Mapping[str, float] | None = None
    host_bandwidth: float = 0.0


def _alone(found: _Found, device: str, wanted: frozenset[str], quick: bool, budget: Budget, progress: Progress) -> None:
    """One process with the whole machine: compute, memory, launches, copies, disk; then the host of an accelerator."""
    import torch

    from autotune.profiles_db.probes.crew import Crew
    from autotune.profiles_db.probes.host import measure_host
    from autotune.profiles_db.probes.session import merged, run_session
    from autotune.profiles_db.probes.ways import copies_at_once

    if device == "cuda":
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        found.context_bytes = int(total - free - torch.cuda.memory_reserved())
    crew = Crew(device)
    found.samples += merged(run_session(crew, _plan(wanted, device, quick, 1, 1), budget.alone, progress))
    crew.pool.release()
    if device == "cuda" and "copy" in wanted:
        found.coefficients[f"{COPIES_AT_ONCE}.1"] = copies_at_once(crew)
    if "host" not in wanted:
        return
    if device == "cpu":
        progress("host: nothing of its own to measure: the processor is the device")
        return
    found.host_peaks, found.host_bandwidth, copies = measure_host(quick, budget.host, progress)
    found.samples += copies


def _worlds(
    found: _Found, facts: Facts, device: str, wanted: frozenset[str], quick: bool, budget: Budget, progress: Progress
) -> int:
    """Several processes at once, one world size after another; the largest that was measured."""
    from autotune.profiles_db.probes.world import Task, run_world

    sizes = worlds_of(facts, quick)
    if not sizes and wanted & {"collective", "interference"}:
        progress("collective, interference: skipped: one accelerator has nobody to talk to")
    largest = 1
    for world in sizes:
        plan = _plan(wanted, device, quick, world, facts.host.cores)
        overlap = budget.interference if "interference" in wanted else 0.0
        if not plan and not overlap:
            continue
        task = Task(device, world, plan, budget.worlds / len(sizes), overlap)
        try:
            answer = run_world(task, progress)
        except EnvironmentFault as error:
            progress(f"{world} workers: skipped: {error.message}")
            continue
        largest = max(largest, world)
        found.samples += answer.samples
        found.interference += answer.interference
        for i in answer.interference:
            progress(
                f"interference: with {world} workers compute is {i.compute:.2f} x, all_reduce {i.communication:.2f} x "
                "slower while they overlap"
            )
        if device == "cuda":
            key = "communicator_bytes"
            found.coefficients[key] = max(found.coefficients.get(key, 0.0), float(answer.communicator_bytes))
            if answer.at_once:
                found.coefficients[f"{COPIES_AT_ONCE}.{world}"] = answer.at_once
        else:
            found.context_bytes = max(found.context_bytes, answer.context_bytes)
    return largest


def profile_machine(quick: bool, progress: Progress, only: Sequence[str] = ()) -> Profile:
    """Measures this machine: its accelerators where it has any, else its processor. Grade "measured".

    `progress` is told in words what each probe found, and what was skipped and why. `only` names the probes to run (see
    NAMES): of the others the profile holds nothing but the device's best rates.
    Raises UsageError for an unknown name in `only`.
    """
    wanted = _wanted(only)
    facts = machine_facts()
    device = "cpu" if facts.kind == "cpu" else "cuda"
    budget = BUDGETS[device, quick]
    where = "cores" if device == "cpu" else "multiprocessors each"
    progress(
        f"{facts.count} x {facts.name}, {facts.cores} {where}, {facts.memory_bytes / 2**30:.1f} GiB "
        f"(host: {facts.host.cores} cores, {facts.host.memory_bytes / 2**30:.1f} GiB); fingerprint {facts.fingerprint}"
    )
    found = _Found([], [], {})
    with _all_cores(facts.host.cores):
        _alone(found, device, wanted, quick, budget, progress)
    largest = _worlds(found, facts, device, wanted, quick, budget, progress)
    return _profile(facts, found, largest)


def _profile(facts: Facts, found: _Found, largest: int) -> Profile:
    """The Profile of `facts` and everything found; every figure's source is in `sources`."""
    now = datetime.now(UTC)
    measured = f"measured by autotune profile on {now.date().isoformat()}"
    on_cpu = facts.kind == "cpu"
    launch = next((s.seconds for s in found.samples if s.work.kind == "launch" and s.ranks == 1), None)
    coefficients = dict(found.coefficients) | ({"launch_seconds": launch} if launch is not None else {})
    peaks, bandwidth = _best(found.samples), _bandwidth(found.samples)
    link = fit_link(found.samples, "gloo-loopback" if on_cpu else "nccl-node", 0 if on_cpu else facts.count)
    device = Device(
        facts.name,
        facts.kind,
        largest if on_cpu else facts.count,
        facts.memory_bytes,
        bandwidth,
        peaks,
        facts.cores,
        found.context_bytes,
    )
    host = replace(
        facts.host,
        memory_bandwidth=bandwidth if on_cpu else found.host_bandwidth,
        peak_flops=peaks if on_cpu else (found.host_peaks or {}),
    )
    told = "as the operating system and the driver say"
    sources = {
        "device": told,
        "host": told,
        "device.peak_flops": f"best matrix product, {measured}",
        "device.memory_bandwidth": f"best copy or read beyond the cache, {measured}",
        "device.context_bytes": f"a process before its first tensor, {measured}",
        "host.peak_flops": f"best matrix product of all cores, {measured}",
        "host.memory_bandwidth": f"best copy, {measured}",
        "links": f"latency and bandwidth of send_recv, {measured}",
        "samples": measured,
        "interference": measured,
        **{f"coefficients.{name}": measured for name in coefficients},
    }
    return Profile(
        name=_slug(facts),
        grade="measured",
        fingerprint=facts.fingerprint,
        device=device,
        host=host,
        links=(link,) if link else (),
        samples=tuple(found.samples),
        interference=tuple(found.interference),
        coefficients=coefficients,
        software=facts.software,
        sources=sources,
        created=now.isoformat(timespec="seconds"),
    )


def _meets(work: Work) -> bool:
    """Whether accelerators do it together."""
    return isinstance(work, Collective) or (isinstance(work, Launch) and bool(work.what))


def _grouped(works: Iterable[Work]) -> dict[str, list[Work]]:
    from autotune.profiles_db.probes import probe_for

    plan: dict[str, list[Work]] = {}
    for work in works:
        plan.setdefault(probe_for(work), []).append(work)
    return plan


def measure(
    works: Sequence[Work],
    ranks: int,
    device: str,
    *,
    seconds_each: float = 0.2,
    progress: Progress = lambda text: None,
) -> list[Sample]:
    """Measures exactly `works` on this machine, in the order given; equal pieces once. `device`: "cpu" or "cuda".

    ranks 1 measures in this process; more start that many workers, which all do each piece at once. On accelerators
    only collectives need that: the rest is measured by one process and says ranks 1. What cannot run here is left out
    of the result and told to `progress` with the reason.

    Raises UsageError for a collective that `ranks` workers cannot form, EnvironmentFault where there are not that many
    accelerators or no worker starts.
    """
    facts = machine_facts(accelerator=device != "cpu")
    if device != "cpu" and (facts.kind == "cpu" or ranks > facts.count):
        have = 0 if facts.kind == "cpu" else facts.count
        raise EnvironmentFault(
            f"measuring with {ranks} ranks on {device}: found {have} accelerators", "use fewer ranks"
        )
    for work in works:
        if isinstance(work, Collective) and not 2 <= work.group <= ranks:
            raise UsageError(
                f"{work.op}: found a group of {work.group} for {ranks} ranks; expected 2 to {max(2, ranks)}",
                hint=f"measure it with ranks={max(2, work.group)}",
            )
    unique = list(dict.fromkeys(works))
    together = [w for w in unique if ranks > 1 and (device == "cpu" or _meets(w))]
    alone = [w for w in unique if w not in set(together)]
    samples: list[Sample] = []
    if alone:
        from autotune.profiles_db.probes.crew import Crew
        from autotune.profiles_db.probes.session import merged, run_session

        with _all_cores(facts.host.cores):
            crew = Crew("cpu" if device == "cpu" else "cuda")
            samples += merged(run_session(crew, _grouped(alone), seconds_each * len(alone), progress, patient=True))
    if together:
        from autotune.profiles_db.probes.world import Task, run_world

        kind = "cpu" if device == "cpu" else "cuda"
        seconds = seconds_each * len(together)
        task = Task(kind, ranks, _grouped(together), seconds, patient=True)
        samples += run_world(task, progress).samples
    order = {work: i for i, work in enumerate(unique)}
    return sorted(samples, key=lambda s: order[s.work])
