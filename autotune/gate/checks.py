"""What is not noisy and is checked exactly: peak memory, losses, answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from autotune.spec.digest import digest
from autotune.spec.lock import Launch

EXACT = 1e-9  # of a fraction's own rounding
MEMORY = 0.01  # of a rank's peak: what an allocator's rounding and a library's workspace may change
# How far a step's loss may be from the baseline's, as a fraction. The same program on the same batches gives the same
# loss but for the order of sums, which a new kernel may change; a step's update carries a difference on. A loss is a
# mean over a batch's tokens, so that these are far below a single operation's rounding times the depth of a model,
# which `autotune run --check` allows (runners.check.BOUNDS).
LOSSES = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 1e-2}

OK, WORSE, BETTER, UNEQUAL, UNKNOWN = "ok", "worse", "better", "unequal", "unknown"


@dataclass(frozen=True)
class Check:
    """One exact comparison; `said` is a sentence with both figures."""

    name: str
    state: str
    said: str


def memory(new: Sequence[Launch], base: Sequence[Launch]) -> Check:
    """Each rank's peak, the median of its launches, against the baseline's: worse where any grew by more than 1 %."""
    sides = [_peaks(side) for side in (new, base)]
    if not sides[1] or len(sides[0]) != len(sides[1]):
        return Check("peak memory", UNKNOWN, "the baseline has no peak of each rank")
    changes = [
        (now / was - 1 if was else math.inf * now, rank) for rank, (now, was) in enumerate(zip(*sides, strict=True))
    ]
    most, rank = max(changes)
    now, was = sides[0][rank], sides[1][rank]
    said = f"rank {rank}: {now / 2**20:.2f} MiB, baseline {was / 2**20:.2f} MiB ({most:+.2%})"
    state = WORSE if most > MEMORY + EXACT else BETTER if most < -MEMORY - EXACT else OK
    return Check("peak memory", state, said)


def _peaks(side: Sequence[Launch]) -> list[float]:
    """Of each rank the median over launches; empty where they are not known of all."""
    ranks = {len(launch.peak_bytes) for launch in side}
    if len(ranks) != 1 or 0 in ranks:
        return []
    return [float(median(of_rank)) for of_rank in zip(*(launch.peak_bytes for launch in side), strict=True)]


def losses(new: Sequence[Launch], base: Sequence[Launch], precision: str) -> Check | None:
    """Every launch's losses against the baseline's, step by step as far as both go; None where there are none."""
    known = [launch.losses for launch in base if launch.losses]
    ours = [launch.losses for launch in new if launch.losses]
    if not ours:
        return None
    if not known:
        return Check("losses", UNKNOWN, "the baseline has no losses")
    bound, worst, at = LOSSES[precision], 0.0, 0
    for mine in ours:
        for step, (now, was) in enumerate(zip(mine, known[0], strict=False)):
            off = _off(now, was)
            if off > worst:
                worst, at = off, step
    steps = min(len(known[0]), *map(len, ours))
    if worst <= bound:
        return Check("losses", OK, f"{steps} steps equal within {bound:g} (largest difference {worst:.2g})")
    return Check(
        "losses", UNEQUAL, f"step {at} differs by {worst:.2g} of the baseline's loss; {precision} allows {bound:g}"
    )


def _off(now: float | None, was: float | None) -> float:
    """The distance as a fraction of the baseline's. What is not a finite number (None, as a lock keeps it) equals only
    its like."""
    here = now is not None and math.isfinite(now)
    there = was is not None and math.isfinite(was)
    if not (here and there):
        return 0.0 if here == there else math.inf
    assert now is not None and was is not None
    return abs(now - was) / max(abs(was), 1e-30)


def tokens(new: Sequence[Launch], base: Sequence[Launch]) -> Check | None:
    """Whether every launch's answers are the baseline's, token for token; None where nothing was generated."""
    ours = {launch.tokens for launch in new if launch.tokens}
    known = {launch.tokens for launch in base if launch.tokens}
    if not ours:
        return None
    if not known:
        return Check("answers", UNKNOWN, "the baseline has no answers")
    if ours <= known:
        return Check("answers", OK, "equal, token for token")
    return Check("answers", UNEQUAL, "other tokens than the baseline's")


def tokens_digest(answers: Sequence[Sequence[int]]) -> str:
    """What a launch keeps of its answers."""
    return digest([list(answer) for answer in answers])[:16] if answers else ""
