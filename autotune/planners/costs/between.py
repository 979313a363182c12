"""The work between two passes of a round that no model does: named and sized here, so that what is priced
(costs/propose.py) and what is timed (runners/bench_parts.py) are the same pieces."""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.decoding.strategies import LONGEST, scored, tree_of
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.work import Memory

ID = 8  # bytes of a token


def commit_work(plan: Plan, batch: int, dtype: str) -> Memory:
    """Which proposals are kept: a few operations on whole numbers, of a tree a few for each depth."""
    tree = tree_of(plan)
    return Memory("commit" if tree.chain else "commit_tree", batch * scored(plan) * ID * (1 + tree.depth), dtype)


def settle_work(batch: int, dtype: str) -> Memory:
    """Where one token of each sequence goes, and what follows from it: a few operations on whole numbers."""
    return Memory("settle", batch * ID, dtype)


def lookup_work(plan: Plan, batch: int, columns: int, dtype: str) -> Memory:
    """The newest tokens compared with every place of texts of so many `columns`."""
    return Memory("lookup", batch * columns * LONGEST * ID, dtype)


def pool_work(plan: Plan, batch: int, columns: int, dtype: str) -> Memory:
    """A window's n-grams put away, all pairs of its places compared, and the next lines."""
    return Memory("pool", batch * plan.window * (plan.window + plan.speculate) * ID, dtype)


# What a strategy's proposals are made of beside passes of a model: the piece, by the name that it is timed under.
PIECES: dict[str, tuple[str, Callable[[Plan, int, int, str], Memory]]] = {
    "ngram": ("lookup", lookup_work),
    "lookahead": ("pool", pool_work),
}


def between(plan: Plan, batch: int, columns: int, dtype: str) -> dict[str, Memory]:
    """The pieces of a plan's round, by what does them."""
    if plan.decoding == PLAIN:
        return {"settle": settle_work(batch, dtype)}
    found = {"commit": commit_work(plan, batch, dtype)}
    if plan.decoding in PIECES:
        name, work = PIECES[plan.decoding]
        found[name] = work(plan, batch, columns, dtype)
    return found
