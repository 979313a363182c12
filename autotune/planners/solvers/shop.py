"""The problem that pipeline scheduling is: letters that each rank repeats once a micro-batch, in an order to be found.

A *letter* is one kind of work of one stage: its F, its B or its W. Its k-th execution is that of micro-batch k. An
order is a *word* for each rank: its letters, each `items` times.

That every letter takes the micro-batches in order loses nothing. In any schedule, give micro-batch k the k-th earliest
slot of each letter. Every constraint between micro-batches has the form start(y, k) >= start(x, k) + c with a c that
does not depend on k; if it holds item by item it holds for the sorted lists too. Slots, hence each rank's times and
what it holds at any moment, do not change. So words are all that has to be searched. The formulation is that of Zero
Bubble (2401.10241, appendix G) without its binary variables: dependencies, one thing at a time on a rank, memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Word = tuple[int, ...]
Words = tuple[Word, ...]  # [rank] -> letters

KINDS = "FBW"


@dataclass(frozen=True)
class Shop:
    """Letters with durations, what precedes what, and who takes and frees the rank's slots.

    A letter is kind x stages + stage, kind 0, 1, 2 for F, B, W. `before[l]` are pairs of a letter and the delay after
    its end. `limit` slots a rank (0: no limit): F takes one when it starts, of which `kept` stays from the end of B
    to the end of W. `offset[r]` is
    taken off a rank's last end before the maximum over ranks is taken: all zero for the makespan, each rank's first
    start for the longest rank (Zero Bubble's metric), since every rank's first start is the same in all orders.
    """

    rank: tuple[int, ...]  # [letter]
    seconds: tuple[float, ...]  # [letter]
    before: tuple[tuple[tuple[int, float], ...], ...]  # [letter]
    items: int
    limit: int
    offset: tuple[float, ...]  # [rank]
    kept: float = 1.0  # the part of a slot that W still needs when B is over

    @property
    def letters(self) -> int:
        return len(self.rank)

    @property
    def stages(self) -> int:
        return len(self.rank) // 3

    @property
    def ranks(self) -> int:
        return len(self.offset)

    @property
    def steps(self) -> int:
        """Executions in all."""
        return self.letters * self.items

    @cached_property
    def after(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """[letter] -> the letters that wait for it, with the delay."""
        found: list[list[tuple[int, float]]] = [[] for _ in self.rank]
        for letter, needs in enumerate(self.before):
            for need, delay in needs:
                found[need].append((letter, delay))
        return tuple(map(tuple, found))

    @cached_property
    def topological(self) -> tuple[int, ...]:
        """Letters, each after what it needs: forwards down the stages, backwards up, weight gradients."""
        s = self.stages
        return (*range(s), *reversed(range(s, 2 * s)), *range(2 * s, 3 * s))

    @cached_property
    def of_rank(self) -> tuple[tuple[int, ...], ...]:
        """[rank] -> its letters."""
        return tuple(tuple(l for l, r in enumerate(self.rank) if r == rank) for rank in range(self.ranks))

    @cached_property
    def head(self) -> tuple[float, ...]:
        """[letter] -> the earliest start of its first execution: the longest path to it, of one micro-batch."""
        heads = [0.0] * self.letters
        for letter in self.topological:
            for need, delay in self.before[letter]:
                heads[letter] = max(heads[letter], heads[need] + self.seconds[need] + delay)
        return tuple(heads)

    @cached_property
    def tail(self) -> tuple[float, ...]:
        """[letter] -> the least from its end to the objective: the longest path from it, less the rank's offset."""
        tails = [-self.offset[rank] for rank in self.rank]
        for letter in reversed(self.topological):
            for follower, delay in self.after[letter]:
                tails[letter] = max(tails[letter], delay + self.seconds[follower] + tails[follower])
        return tuple(tails)

    @cached_property
    def work(self) -> tuple[float, ...]:
        """[rank] -> the time of all that it has to do."""
        return tuple(self.items * sum(self.seconds[l] for l in letters) for letters in self.of_rank)

    @cached_property
    def frees(self) -> tuple[float, ...]:
        """[letter] -> the slots that its end frees."""
        return (0.0,) * self.stages + (1.0 - self.kept,) * self.stages + (self.kept,) * self.stages

    @cached_property
    def stay(self) -> tuple[float, ...]:
        """[rank] -> slots times how long one micro-batch holds them at least, summed over the rank's stages."""
        w, kept = 2 * self.stages, self.kept
        held = [self.head[w + s] + kept * self.seconds[w + s] - self.head[s] for s in range(self.stages)]
        return tuple(sum(held[l] for l in letters if l < self.stages) for letters in self.of_rank)

    @cached_property
    def cycle(self) -> float:
        """The least time between two micro-batches: a rank's work, or its slots' occupation divided by the limit."""
        return max(max(self.work) / self.items, max(self.stay) / self.limit if self.limit else 0.0)

    @cached_property
    def scale(self) -> float:
        """A length that times are compared with: differences below 1e-9 of it are rounding."""
        return max(self.work)


def pipeline(
    ranks: Sequence[int],
    forward: Sequence[float],
    input_gradient: Sequence[float],
    weight_gradient: Sequence[float],
    hop: float,
    items: int,
    limit: int = 0,
    longest_rank: bool = False,
    kept: float = 1.0,
) -> Shop:
    """The shop of a pipeline whose stage s is on rank ranks[s]; durations of each stage, `hop` between two ranks.

    ValueError for a limit below the least peak, and where the first stages of two ranks are not before all others
    (then a rank's first start would depend on the order, and the longest rank is no regular objective).
    """
    stages, count = len(ranks), max(ranks) + 1
    if longest_rank and len(set(ranks[:count])) != count:
        raise ValueError(f"the first {count} stages on different ranks (found {tuple(ranks[:count])})")
    least = least_peak(ranks)
    if 0 < limit < least:
        raise ValueError(f"a limit of at least {least} chunk activations a rank (found {limit}; nearest {least})")

    def away(a: int, b: int) -> float:
        return 0.0 if ranks[a] == ranks[b] else hop

    before: list[tuple[tuple[int, float], ...]] = [((s - 1, away(s - 1, s)),) if s else () for s in range(stages)]
    for s in range(stages):
        own = ((s, 0.0),)
        before.append(own if s == stages - 1 else (*own, (stages + s + 1, away(s + 1, s))))
    before += [((stages + s, 0.0),) for s in range(stages)]
    shop = Shop(
        rank=tuple(ranks) * 3,
        seconds=(*forward, *input_gradient, *weight_gradient),
        before=tuple(before),
        items=items,
        limit=limit,
        offset=(0.0,) * count,
        kept=kept,
    )
    if not longest_rank:
        return shop
    offset = tuple(min(shop.head[l] for l in letters) for letters in shop.of_rank)
    return Shop(shop.rank, shop.seconds, shop.before, items, limit, offset, kept)


def least_peak(ranks: Sequence[int]) -> int:
    """The smallest peak that an order can have: the most stages on one rank.

    Not less: the last stage's backward of a micro-batch needs its forward on every stage, and no stage of it has ended
    W by then, so its rank holds one activation for each of its stages. Not more: one micro-batch after the other.
    """
    return max(list(ranks).count(rank) for rank in set(ranks))


def may_take(own: int, counts: Sequence[int], freed: float, limit: int) -> bool:
    """Whether a rank may start one more F of a stage without a deadlock to come.

    `counts` forwards were started of the rank's stages, `own` of them of the stage in question, and `freed` slots have
    been freed again in all. Exact, given micro-batches in order: let j be the oldest micro-batch that lacks a
    forward on this rank. What j and younger ones hold can be freed only after j's backward, so j's missing forwards
    must fit beside it; and while they do on every rank, the oldest can always be finished, which frees what it held.
    """
    total, oldest = sum(counts), min(counts)
    if total - freed > limit - 1 + 1e-6:
        return False
    return own == oldest or total - oldest * len(counts) + 1 + list(counts).count(oldest) <= limit
