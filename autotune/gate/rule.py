"""The rule of a gate: what two lists of launches say about one another, as a pure function.

The sample is the process launch and never the step: steps of one launch share its memory layout, its clocks and its
neighbours, so a test over pooled steps finds "differences" between equal programs (a Mann-Whitney test of pooled steps
in a quarter to a half of such pairs). A launch is its median step.

The ratio of the two medians of launches is judged with its bootstrap interval (Efron and Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13: percentiles), all in logarithms, so that a slowdown and its inverse are judged
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log, log1p

import numpy as np
from numpy.typing import NDArray

REGRESSED, IMPROVED, PASS, INCONCLUSIVE = "regressed", "improved", "pass", "inconclusive"
LEAST = 3  # launches a side: fewer have no interval worth the name
RESAMPLES = 2000  # of each of the two pairings
OUTSIDE = 0.025  # of the bootstrap's ratios on each side of the interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A ratio of medians, new to baseline, between its bootstrap bounds (1.05: five per cent slower)."""

    ratio: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width in logarithms: about the fraction of the ratio."""
        return log(self.high / self.low) / 2


@lru_cache(maxsize=64)
def _draws(seed: int, stream: int, count: int, resamples: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of each resample of `count` launches, which two of the sorted launches its median is the mean of."""
    drawn = np.random.default_rng([seed, stream]).integers(0, count, (resamples, count))
    drawn.sort(axis=1)
    return drawn[:, (count - 1) // 2], drawn[:, count // 2]


def _medians(launches: Array, seed: int, stream: int, resamples: int) -> Array:
    """The median of every resample, [trials, resamples], of sorted launches [trials, count]."""
    low, high = _draws(seed, stream, launches.shape[1], resamples)
    return (launches[:, low] + launches[:, high]) / 2


def log_intervals(new: Array, base: Array, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """[3, trials]: the logarithms of ratio, lower and upper bound for many trials at once. `new`: seconds [trials, n],
    `base`: [trials, m].

    Each side is drawn from both streams in turn, so that exchanging the sides exactly inverts the answer.
    """
    new, base = np.sort(new, axis=1), np.sort(base, axis=1)
    ratios = np.concatenate(
        [
            np.log(_medians(new, seed, one, resamples)) - np.log(_medians(base, seed, 1 - one, resamples))
            for one in (0, 1)
        ],
        axis=1,
    )
    low, high = np.quantile(ratios, (OUTSIDE, 1 - OUTSIDE), axis=1)
    return np.stack([np.log(np.median(new, axis=1)) - np.log(np.median(base, axis=1)), low, high])


def interval(new: Sequence[float], base: Sequence[float], seed: int = 0) -> Interval:
    """The interval of two lists of launches' median seconds. Raises ValueError for fewer than LEAST on a side, and for
    what is no time."""
    if min(len(new), len(base)) < LEAST:
        raise ValueError(f"found {len(new)} and {len(base)} launches; expected {LEAST} or more a side")
    ours, theirs = (np.array([side], dtype=np.float64) for side in (new, base))
    if not all(np.isfinite(side).all() and (side > 0).all() for side in (ours, theirs)):
        raise ValueError(f"found launches of {[*new]} and {[*base]} seconds; expected positive ones")
    ratio, low, high = np.exp(log_intervals(ours, theirs, seed))[:, 0]
    return Interval(float(ratio), float(low), float(high))


def verdict(found: Interval, threshold: float) -> str:
    """Regressed: the lower bound is above 1 and the ratio above 1 + threshold; improved: the inverse; else pass.

    An interval wider than the threshold to either side is inconclusive, unless all of it is beyond the threshold: a
    change that large needs no precision.
    """
    return str(verdicts(np.log([[found.ratio], [found.low], [found.high]]), threshold)[0])


def verdicts(found: Array, threshold: float) -> NDArray[np.str_]:
    """`verdict` of many trials, from `log_intervals`."""
    ratio, low, high = found
    counts = log1p(threshold)
    precise = (high - low) / 2 <= counts
    slower = ((low > 0) & (ratio > counts) & precise) | (low > counts)
    faster = ((high < 0) & (ratio < -counts) & precise) | (high < -counts)
    return np.where(slower, REGRESSED, np.where(faster, IMPROVED, np.where(precise, PASS, INCONCLUSIVE)))
