"""Who proposes tokens: a line each, by the name of the strategy (`planners.decoding.strategies`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from autotune.runners.decoding.draft import Draft, at_once, one_by_one
from autotune.runners.decoding.heads import Heads
from autotune.runners.decoding.lookahead import Lookahead
from autotune.runners.decoding.masks import Masks
from autotune.runners.decoding.ngram import lookup
from autotune.runners.decoding.seen import Drafter, Proposer, Seen
from autotune.runners.state import Loader
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload


class Nobody(Proposer):
    """Decoding a token at a time."""

    def propose(self, seen: Seen) -> Tensor:
        return seen.news[:, :0]


@dataclass(frozen=True)
class Ngram(Proposer):
    length: int
    branches: int
    least: int

    def propose(self, seen: Seen) -> Tensor:
        texts = seen.sequences
        return lookup(texts.text, texts.filled, self.length, self.branches, self.least)


@dataclass(frozen=True)
class Jacobi(Proposer):
    """What the target chose after tokens that were not kept: right where it did not depend on them (Santilli et al.,
    2305.10427, 3.1: a sweep of the fixed-point iteration; its right part is what the next sweep begins with)."""

    length: int

    def propose(self, seen: Seen) -> Tensor:
        steps = torch.arange(self.length, device=seen.news.device)
        last = seen.depth  # the column of the last choice: beyond it nothing is known, and it is repeated
        return seen.news.gather(1, (1 + seen.news[:, :1] + steps).clamp_max(last))


# What needs no weights of its own.
PROPOSERS: dict[str, Callable[[Plan, ModelSpec, int, torch.device], Proposer]] = {
    "plain": lambda plan, model, batch, device: Nobody(),
    "ngram": lambda plan, model, batch, device: Ngram(plan.speculate, plan.branches, plan.match),
    "jacobi": lambda plan, model, batch, device: Jacobi(plan.speculate),
    "lookahead": Lookahead.build,
    "masks": Masks.build,
}
# What has weights: given the loader of them and the numbers that tokens are drawn by.
DRAFTERS: dict[str, Callable[[Plan, Workload, Loader, torch.device, Tensor], Drafter]] = {
    "draft": partial(Draft.build, one_by_one),
    "parallel": partial(Draft.build, at_once),
    "heads": Heads.build,
}
