"""Probe: the processor beside an accelerator: its matrix products, how fast its memory copies, and its AdamW, by all
cores."""

from __future__ import annotations

from autotune.profiles_db.probes import copies, optimizer
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.session import Progress, attempt
from autotune.spec.machine import Sample
from autotune.spec.work import Matmul, Work

PEAKS = tuple(Matmul(side, side, side, dtype) for dtype in ("fp32", "bf16") for side in (1024, 2048))


def measure_host(quick: bool, seconds: float, say: Progress) -> tuple[dict[str, float], float, list[Sample]]:
    """(FLOP/s by dtype, bytes/s of a copy counting read plus write, copies and updates as samples), by every core."""
    crew = Crew("cpu")
    peaks: dict[str, float] = {}
    pieces: list[Work] = [*PEAKS, *copies.works(Setting("cpu", quick)), *optimizer.on_host(quick)]
    samples: list[Sample] = []
    for work in pieces:
        answer = attempt(work, crew, seconds / len(pieces))
        if isinstance(answer, str):
            say(f"host: skipped {work}: {answer}")
        elif isinstance(work, Matmul):
            peaks[work.dtype] = max(peaks.get(work.dtype, 0.0), work.flops / answer.seconds)
        else:
            samples.append(answer)
    copied = [s for s in samples if s.work.kind == "copy"]
    largest = max((s.work.bytes for s in copied), default=0)  # the quick grid's may all fit a large cache
    beyond = min(crew.pool.cache, largest)
    bandwidth = max((2 * s.work.bytes / s.seconds for s in copied if s.work.bytes >= beyond), default=0.0)
    found = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in peaks.items())
    say(f"host: {found}; {bandwidth / 1e9:.0f} GB/s copied")
    return peaks, bandwidth, samples
