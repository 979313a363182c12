"""Chains of drafted tokens: what a round commits, and how long a chain pays (Leviathan et al. 2211.17192, section 3).

A round drafts gamma tokens one after the other and scores them in one pass; the longest accepted prefix is committed
and one token of the verifying model's own after it. With the same acceptance alpha everywhere there are closed forms.
What is measured rises with the position (easy spans survive), so the vector of acceptances by position, each given that
all before it were accepted, is the better input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from autotune.planners.decoding.chances import at_least, chances

LONGEST = 300  # the longest chain that the search for the best one looks at


def same(alpha: float, gamma: int) -> tuple[float, ...]:
    """The vector of acceptances that are the same at each of `gamma` positions."""
    return chances("acceptance", (alpha,)) * at_least("gamma", gamma, 0)


def prefixes(acceptances: Sequence[float]) -> Iterator[float]:
    """The probabilities that 1, 2, ... drafted tokens are all accepted."""
    return accumulate(acceptances, lambda reached, acceptance: reached * acceptance)


def expected_same(alpha: float, gamma: int) -> float:
    """Tokens a round with the same acceptance everywhere: (1 - alpha^(gamma+1)) / (1 - alpha), equation 1 there.

    ValueError unless 0 <= alpha <= 1 and gamma >= 0.
    """
    return expected(same(alpha, gamma))  # the sum of powers: exact at alpha = 1 too


def expected(acceptances: Sequence[float]) -> float:
    """Tokens a round of a chain with these acceptances by position: 1 + the sum of their prefix products.

    ValueError unless each is from 0 to 1.
    """
    return 1.0 + sum(prefixes(chances("acceptances", acceptances)))


def distribution(acceptances: Sequence[float]) -> tuple[float, ...]:
    """[k - 1] -> the probability that a round commits k tokens, for k from 1 to the chain's length and one more.

    ValueError unless each acceptance is from 0 to 1.
    """
    found, reached = [], 1.0
    for acceptance in chances("acceptances", acceptances):
        found.append(reached * (1.0 - acceptance))
        reached *= acceptance
    return (*found, reached)


def expected_of_several(alpha: float, gamma: int, speculations: int) -> float:
    """Tokens a round of several independent chains of which the best is kept (Lookahead 2402.02057, section 4).

    (gamma + 1) - sum over i = 1..gamma of (1 - alpha^i)^speculations. ValueError unless 0 <= alpha <= 1, gamma >= 0 and
    speculations >= 1.
    """
    at_least("speculations", speculations, 1)
    return gamma + 1 - sum(float((1.0 - chance) ** speculations) for chance in prefixes(same(alpha, gamma)))


def speedup(alpha: float, gamma: int, cost: float) -> float:
    """How many times faster than no speculation, if a pass takes as long as one over a single token (theorem 3.8).

    `cost`: seconds of one drafting step over seconds of one pass. ValueError unless 0 <= alpha <= 1, gamma >= 0 and
    cost >= 0.
    """
    _check_cost(cost)
    return expected_same(alpha, gamma) / (gamma * cost + 1.0)


def best_gamma(alpha: float, cost: float, longest: int = LONGEST) -> tuple[int, float]:
    """The chain's length with the largest speedup, and that speedup; of equals the shortest.

    Some chain wins exactly if alpha > cost (corollary 3.9); else it is (0, 1.0). `cost` as in `speedup`. ValueError
    unless 0 <= alpha <= 1, cost >= 0 and longest >= 0.
    """
    _check_cost(cost)
    tokens = 1.0
    best, most = 0, 1.0
    for gamma, reached in enumerate(prefixes(same(alpha, longest)), start=1):
        tokens += reached
        value = tokens / (gamma * cost + 1.0)
        if value > most:
            best, most = gamma, value
    return best, most


def _check_cost(cost: float) -> None:
    if not cost >= 0.0:
        raise ValueError(f"a drafting step's cost that is not negative (found {cost:g})")
