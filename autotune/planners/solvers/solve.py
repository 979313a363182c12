"""The order of a shop: fixed orders and list scheduling, local search, and branch and bound where the shop is small.

Deterministic: budgets count steps, never seconds, so equal shops give equal words in every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from autotune.planners.solvers.bound import bound
from autotune.planners.solvers.dispatch import Rule, dispatch
from autotune.planners.solvers.exact import branch_and_bound
from autotune.planners.solvers.improve import improve
from autotune.planners.solvers.ramp import ramp
from autotune.planners.solvers.rules import rules
from autotune.planners.solvers.shop import Shop, Words
from autotune.planners.solvers.sweep import Sweep, fits, sweep


@dataclass(frozen=True)
class Budget:
    """How much is tried: steps placed by list scheduling and by local search, and nodes of branch and bound."""

    dispatched: int = 180_000
    swept: int = 120_000
    sweeps: int = 200  # of one shop
    exact_steps: int = 40  # shops with more steps in all are left to the heuristic
    nodes: int = 6_000


@dataclass(frozen=True)
class Solution:
    """Words, their objective, what no order can be better than, and whether they are proved to be the best."""

    words: Words
    value: float
    bound: float
    optimal: bool
    nodes: int

    @property
    def gap(self) -> float:
        """How far the objective may be from the best, as a part of the bound; 0 where it is proved."""
        return 0.0 if self.optimal else max(0.0, self.value / self.bound - 1.0)


def solve(shop: Shop, seeds: Iterable[Words] = (), budget: Budget | None = None) -> Solution:
    """The best order found. `seeds`: orders of the caller's that it must not be worse than, where they fit."""
    given, floor, near = budget or Budget(), bound(shop), 1e-9 * shop.scale
    best = heuristic(shop, seeds, given, floor)
    proved, nodes = best.value <= floor + near, 0
    if not proved and shop.steps <= given.exact_steps:
        found = branch_and_bound(shop, best.value, floor, given.nodes)
        proved, nodes = found.complete, found.nodes
        better = sweep(shop, found.words) if found.words else None
        best = better or best
    return Solution(best.words, best.value, best.value if proved else floor, proved, nodes)


def heuristic(shop: Shop, seeds: Iterable[Words], budget: Budget, floor: float) -> Sweep:
    """The best of the seeds, the ramps and the rules, then of local search from the best three of them."""
    near = 1e-9 * shop.scale
    found: list[Sweep] = []
    for words in (*seeds, *_ramps(shop)):
        swept = sweep(shop, words) if fits(shop, words) else None
        if swept is not None:
            found.append(swept)
    for rule in screened(shop, budget.dispatched):
        words, _ = dispatch(shop, rule)
        swept = sweep(shop, words)
        assert swept is not None  # list scheduling follows time
        found.append(swept)
        if swept.value <= floor + near:
            return swept
    found.sort(key=lambda one: one.value)  # stable: among equals the first
    best, sweeps = found[0], min(budget.sweeps, budget.swept // shop.steps)
    for start in found[:3]:
        better, spent = improve(shop, start, sweeps, floor)
        sweeps -= spent
        best = min(best, better, key=lambda one: one.value)
    return best


def _ramps(shop: Shop) -> Iterator[Words]:
    if shop.stages == shop.ranks:
        yield ramp(shop, 1.0, backlog=False)
        back = shop.head[shop.stages] - shop.head[0]  # from the first rank's first forward to its first backward
        natural = (back / max(shop.seconds[: shop.stages]) - 1.0) / max(1, shop.ranks - 1)
        for slope in (1.0, 1.25, 1.5, 1.75, 2.0, natural, 1.1 * natural, 1.2 * natural):
            yield ramp(shop, slope, backlog=True)


def screened(shop: Shop, dispatched: int) -> list[Rule]:
    """The rules to try. Where the budget does not allow all, half of it finds the best with fewer micro-batches."""
    every = rules(shop)
    if len(every) * shop.steps <= dispatched:
        return every
    affordable = max(1, dispatched // 2 // shop.steps)
    items = dispatched // 2 // (len(every) * shop.letters)
    if not 1 <= items < shop.items:
        return every[:affordable]
    short = replace(shop, items=items)
    values = [dispatch(short, rule)[1] for rule in every]
    return [every[n] for n in sorted(range(len(every)), key=lambda n: (values[n], n))[:affordable]]
