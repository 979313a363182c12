"""The model itself proposes, by mask tokens of its own that one pass scores beside what the last one proposed (PaSS,
2311.13581; PPD, 2405.18628).

It is not known beforehand which proposals are kept. So masks stand after each that may be the last one, and of their
choices those count that stand after the one that was: they were made without the token that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.runners.decoding.seen import Proposer, Seen
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan


@dataclass(frozen=True)
class Masks(Proposer):
    """`tokens`, int64 [1, groups * length]: the masks of all groups (planners.decoding.strategies)."""

    length: int
    tokens: Tensor

    @classmethod
    def build(cls, plan: Plan, model: ModelSpec, batch: int, device: torch.device) -> Masks:
        group = [model.mask_token(place) for place in range(plan.speculate)]
        return cls(plan.speculate, torch.tensor(group * (1 + plan.speculate), device=device)[None])

    def propose(self, seen: Seen) -> Tensor:
        if seen.first:  # a prompt's pass has no masks: any token will do
            found = seen.news[:, 1:2].expand(-1, self.length)
        else:
            group = (seen.news[:, :1] - 1).clamp_min(0)  # the node that was kept last; of an ended answer any
            place = (1 + group) * self.length + 1 + torch.arange(self.length, device=group.device)
            found = seen.choices.gather(1, place)
        return torch.cat((found, self.tokens.expand(len(found), -1)), dim=1)
