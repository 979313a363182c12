"""How many rounds a generation takes: rounds are independent and the last one's surplus tokens are cut.

The mean of tokens a round says how long an endless generation takes. A finite one needs whole rounds, and a static
batch waits for its slowest sequence; both come from the distribution of the number of rounds, by dynamic programming
over the tokens made so far (a renewal process stopped at its first passage of a level).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.planners.decoding.chances import at_least, whole

Floats = NDArray[np.float64]

NOTHING = 1e-40  # probabilities below it are left out: far below rounding, and slow arithmetic follows them


def rounds(tokens: Sequence[float], length: int) -> Floats:
    """[r] -> the probability that one sequence needs r rounds for `length` tokens, r from 0 to `length`.

    `tokens[k - 1]`: the probability that a round commits k tokens, as `chains.distribution` and `growth.distribution`
    give it. ValueError unless they are a distribution and `length` is not negative.
    """
    share = np.trim_zeros(np.array(whole("probabilities of tokens a round", tokens)), "b")
    found = np.zeros(at_least("length", length, 0) + 1)
    if length == 0:
        found[0] = 1.0
        return found
    made, low = np.ones(1), 0  # made[i]: the probability of low + i tokens so far, fewer than `length`
    for r in range(1, length + 1):
        low += 1  # a round makes one token at least
        after = np.convolve(made, share)
        found[r] = after[max(0, length - low) :].sum()
        made = after[: length - low]
        some = np.flatnonzero(made > NOTHING)
        if not some.size:
            break
        low, made = low + int(some[0]), made[some[0] : some[-1] + 1]
    return found


def mean(distribution: Floats) -> float:
    """The rounds that one sequence is expected to need."""
    return float(distribution @ np.arange(len(distribution)))


def slowest(distribution: Floats, batch: int) -> float:
    """The rounds that the slowest of `batch` independent sequences is expected to need: those of a static batch.

    The sum over r of P(some sequence needs more than r) = 1 - (1 - P(one needs more than r))^batch. ValueError where
    `batch` is below 1.
    """
    at_least("batch", batch, 1)
    more = np.minimum(1.0, np.cumsum(distribution[::-1])[::-1])[1:]  # [r] -> P(one needs more than r)
    with np.errstate(divide="ignore"):  # where all need more: the logarithm of 0, and 1 after all
        return float(-np.expm1(batch * np.log1p(-more)).sum())


def largest(values: Sequence[float], batch: int) -> float:
    """The expected largest of `batch` values drawn, each by itself, from `values`, which are all as likely: their order
    statistics weighted by how likely each is the largest."""
    many = len(values)
    return sum(
        value * ((place / many) ** batch - ((place - 1) / many) ** batch)
        for place, value in enumerate(sorted(values), 1)
    )


def replayed(trace: Sequence[int], longest: int, most: int) -> tuple[int, ...]:
    """Tokens that each round would have committed with fewer proposals, at most `most` tokens a round, of a text whose
    rounds committed `trace` with at most `longest`.

    A token that was kept is proposed right by a shorter round too, for what comes before it is the same; the one that
    ended a round was proposed wrong, unless all were kept: then nobody had proposed it, and it counts as right.
    """
    if most >= longest:
        return tuple(trace)
    right = [place + 1 < count or count == longest for count in trace for place in range(count)]
    found, at = list[int](), 0
    while at < len(right):
        count = 1
        while count < most and at + count < len(right) and right[at + count - 1]:
            count += 1
        found.append(count)
        at += count
    return tuple(found)
