"""Split-conformal intervals and what their coverage may be. Pure arithmetic on order statistics.

Of n residuals and a new one that is exchangeable with them, each of the n + 1 ranks is as likely for the new one (Vovk,
Gammerman, Shafer, Algorithmic Learning in a Random World, 2005; Lei et al., Distribution-Free Predictive Inference for
Regression, JASA 2018). So the interval from the k-th smallest to the k-th largest holds it with probability
(n + 1 - 2 k) / (n + 1), or more where residuals tie: with k = floor((n + 1) a / 2), the upper end being the rank
ceil((n + 1) (1 - a / 2)), at least 1 - a. Both tails have a / 2 each, so that a bias moves the interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import exp, floor, lgamma, log


def tail_rank(n: int, level: float) -> int:
    """k: how many of n residuals, counted from either end, the ends are at. 0: too few for this level.

    `level` is the decimal fraction that it is written as: 0.9 leaves a tenth, not a little less.
    """
    return floor((n + 1) * (1 - Fraction(str(level))) / 2)


def enough(level: float) -> int:
    """The fewest residuals that make an interval of this level: 19 for 0.9."""
    alpha = 1 - Fraction(str(level))
    return -floor(-2 / alpha) - 1


def interval(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """(least, most) that a further residual is expected to be at `level`; None where there are too few."""
    k = tail_rank(len(values), level)
    if k < 1:
        return None
    ordered = sorted(values)
    return ordered[k - 1], ordered[len(ordered) - k]


def binomial_bounds(inside: int, judged: int, confidence: float = 0.95) -> tuple[float, float]:
    """Between which shares the true one is, where `inside` of `judged` independent rows were (Clopper and Pearson,
    Biometrika 1934)."""
    if not 0 <= inside <= judged or judged < 1:
        raise ValueError(f"found {inside} of {judged}; expected a part of at least one row")
    tail = (1 - confidence) / 2
    # P(X >= inside) rises with the share, P(X <= inside) falls: the ends are where each is as small as a tail.
    low = _share(lambda share: _at_least(inside, judged, share) > tail) if inside else 0.0
    high = _share(lambda share: 1 - _at_least(inside + 1, judged, share) < tail) if inside < judged else 1.0
    return low, high


def _share(beyond: Callable[[float], bool]) -> float:
    """The share from which on `beyond` holds, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return (low + high) / 2


def _at_least(count: int, of: int, share: float) -> float:
    """P(X >= count) of a binomial X, 0 < share < 1."""
    if count <= 0:
        return 1.0
    ways = (lgamma(of + 1) - lgamma(k + 1) - lgamma(of - k + 1) for k in range(count, of + 1))
    return sum(exp(w + k * log(share) + (of - k) * log(1 - share)) for k, w in enumerate(ways, count))
