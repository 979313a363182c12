"""Orders of a pipeline with one stage a rank that times play no part in: a warm-up ramp and a backlog of weights.

A rank starts with a number of forwards that falls along the pipeline, then alternates backward and forward and puts
off weight gradients as far as its backlog allows. Slope 1 and no backlog is 1F1B; slope 1 and a backlog up to the
limit is ZB-H1, slope 2 ZB-H2 (Zero Bubble, 2401.10241, section 2).
"""

from __future__ import annotations

from autotune.planners.solvers.shop import Shop, Words


def ramp(shop: Shop, slope: float, backlog: bool) -> Words:
    """The words of a ramp, within the shop's limit. The last rank starts with one forward, each before it with more."""
    p, m = shop.ranks, shop.items
    limit = min(shop.limit or m, m)
    words = []
    for rank in range(p):
        (stage,) = (l for l in shop.of_rank[rank] if l < shop.stages)
        warm = max(1, min(limit, 1 + round(slope * (p - 1 - stage))))
        most = min(limit, max(1, 1 + round(slope * (p - 1)))) - warm
        most = int(most / max(shop.kept, 1e-6) + 1e-6) if backlog else 0
        words.append(_word(stage, shop.stages, m, warm, most))
    return tuple(words)


def _word(stage: int, stages: int, items: int, warm: int, backlog: int) -> tuple[int, ...]:
    f, b, w = stage, stage + stages, stage + 2 * stages
    word, forwards, weights = [f] * warm, warm, 0
    for item in range(items):
        word.append(b)
        if item + 1 - weights > backlog:
            word.append(w)
            weights += 1
        if forwards < items:
            word.append(f)
            forwards += 1
    return tuple(word + [w] * (items - weights))
