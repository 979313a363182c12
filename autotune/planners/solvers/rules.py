"""The rules of list scheduling that are tried, the likeliest first.

Most were chosen by greedy cover: of 450 combinations (900 with several stages a rank) those whose best is nearest to
the best of all, over pipelines of 4 and 8 ranks, limits from half of 1F1B's memory to twice and none, and unit,
profiled and random times. Small patience (0.15, 0.25) is what Zero Bubble's profiles gain from; slower paces are what
tight limits do.
"""

from __future__ import annotations

from autotune.planners.solvers.dispatch import FAR, Rule
from autotune.planners.solvers.shop import Shop

ONE_STAGE = (
    Rule(0.0, FAR),
    Rule(0.0, FAR, 0.25, drain=True),
    Rule(1.0, FAR),
    Rule(0.0, FAR, 0.15),
    Rule(0.0, FAR, 0.5, drain=True),
    Rule(-1.0, FAR, drain=True),
    Rule(-1.0, FAR, 0.25),
    Rule(0.0, FAR, 0.5, early=0.5),
    Rule(-1.0, FAR, 0.5, drain=True),
    Rule(0.0, 2.0, 0.5, early=1.0),
    Rule(1.0, FAR, 0.5, drain=True),
    Rule(0.0, 0.0, 0.5, early=1.0),
    Rule(0.0, 0.0),
)
SEVERAL_STAGES = (
    Rule(-FAR, FAR, early=0.0, drain=True),
    Rule(-1.0, FAR),
    Rule(-FAR, FAR, 0.5, early=0.0, drain=True),
    Rule(-1.0, FAR, 0.5, early=2.0),
    Rule(0.0, 2.0, 0.5, early=0.0),
    Rule(-1.0, 2.0, early=0.0, drain=True),
    Rule(-1.0, 2.0, 0.5, early=1.0, stretch=2.0, drain=True),
    Rule(-1.0, FAR, 0.5, early=2.0, stretch=2.0, drain=True),
    Rule(2.0, 2.0, early=0.0, drain=True),
    Rule(-1.0, 2.0, 0.5, early=0.5, stretch=1.5, drain=True),
    Rule(0.0, 2.0, early=1.0, drain=True),
)
PACED = (  # under a limit: slower than the least cycle
    Rule(-1.0, 2.0, 0.5, early=0.5, drain=True),
    Rule(0.0, 2.0, 0.5, early=0.0),
    Rule(-1.0, 2.0, 0.5, early=1.0),
    Rule(0.0, 0.0, early=0.5),
)
PACES = (1.1, 1.2, 1.35)


def rules(shop: Shop) -> list[Rule]:
    several = shop.stages > shop.ranks
    paced = [Rule(r.forward, r.weight, r.patience, r.early, r.stretch, pace, r.drain) for pace in PACES for r in PACED]
    return [*(SEVERAL_STAGES if several else ONE_STAGE), *(paced if shop.limit else ())]
