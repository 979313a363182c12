"""Rounds that depend on the one before: the state machine of parallel prompt decoding (PPD 2405.18628, section 4).

The number of prompt tokens that hang on the accepted node is how far the next round can guess, so it is the state of
the next round, which has a tree of its own. Over many rounds the states have shares that no longer change (the steady
state of a Markov chain), and the mean of tokens a round is taken by those shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.planners.decoding.chances import whole


def steady(transitions: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[state] -> its share of the rounds, whatever the first state was.

    `transitions[s][t]`: the probability that a round in state s is followed by one in state t. ValueError unless it is
    square, each row adds up to 1, and some state can be reached from all.
    """
    count = len(transitions)
    if not count or any(len(row) != count for row in transitions):
        raise ValueError(f"a square of transitions (found rows of {[len(row) for row in transitions]})")
    step = np.array([whole(f"transitions from state {s}", row) for s, row in enumerate(transitions)])
    if not _reached(step > 0.0).all(axis=0).any():
        raise ValueError("a state that can be reached from all others (found parts that are never left)")
    # share @ step = share. The equations add up to 0 = 0, so the last may give way to: the shares add up to 1.
    equations = step.T - np.eye(count)
    equations[-1] = 1.0
    share = np.linalg.solve(equations, np.eye(count)[-1])
    return tuple(float(s) for s in np.maximum(share, 0.0))


def mean_tokens(transitions: Sequence[Sequence[float]], tokens: Sequence[float]) -> float:
    """Tokens a round over many rounds; `tokens[s]`: the mean of those in state s. ValueError as in `steady`."""
    if len(tokens) != len(transitions):
        raise ValueError(f"tokens a round of each of {len(transitions)} states (found {len(tokens)})")
    return sum(share * mean for share, mean in zip(steady(transitions), tokens, strict=True))


def _reached(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[s][t] -> whether t can be reached from s in any number of rounds, none included."""
    found = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges)):
        found = found @ found
    return found
