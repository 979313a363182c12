"""What no order of a shop can be better than.

Each bound is a longest path or an area argument; the best of them is what a heuristic's gap is told against.
"""

from __future__ import annotations

from autotune.planners.solvers.shop import Shop


def bound(shop: Shop) -> float:
    """The largest of the bounds below, in the shop's time."""
    return max(path(shop), max(busy(shop, rank) for rank in range(shop.ranks)), slots(shop))


def path(shop: Shop) -> float:
    """The critical path: of one letter, all its executions between its head and its tail."""
    return max(shop.head[l] + shop.items * shop.seconds[l] + shop.tail[l] for l in range(shop.letters))


def busy(shop: Shop, rank: int) -> float:
    """One rank alone: it cannot start before its least head, and what comes last is followed by its tail.

    Taken over the letters with the largest tails, two and more at a time. A rank must also wait for its first backward
    with no more forwards to fill the time than its slots or its micro-batches allow.
    """
    letters = sorted(shop.of_rank[rank], key=lambda l: -shop.tail[l])
    forwards = [l for l in letters if l < shop.stages]
    rest = [l for l in letters if l >= shop.stages]
    fill = sorted((shop.seconds[l] for l in forwards for _ in range(shop.items)), reverse=True)
    fill = fill[: shop.limit or None]
    turn = min(shop.head[l] for l in rest) - sum(fill)  # F + B + W work before this cannot be other than `fill`
    found, work, head = 0.0, 0.0, float("inf")
    for letter in letters:
        work += shop.items * shop.seconds[letter]
        head = min(head, shop.head[letter])
        found = max(found, head + work + shop.tail[letter])
    for letter in rest:  # all forwards, and the backwards and weight gradients with tails at least this one's
        kept = [l for l in letters if l in forwards or shop.tail[l] >= shop.tail[letter]]
        inside = shop.items * sum(shop.seconds[l] for l in kept)
        found = max(found, turn + inside + min(shop.tail[l] for l in kept))
    return found


def slots(shop: Shop) -> float:
    """Area of the rank's slots: an activation stays from F to W at least as long as one micro-batch's path takes."""
    if not shop.limit:
        return 0.0
    found = 0.0
    for rank, letters in enumerate(shop.of_rank):
        begin = min(shop.head[l] for l in letters)
        found = max(found, begin + shop.items * shop.stay[rank] / shop.limit - shop.offset[rank])
    return found
