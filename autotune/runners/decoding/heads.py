"""Heads propose: networks that read the target's hidden row of the newest kept token and say what comes 1, 2, ...
places after the token that the target itself chose next (Stern et al., 1811.03115; Cai et al., 2401.10774).

The row is the one that the target's output projection reads, after its final norm. It was made by the pass that scored
the token, so that proposing takes no pass of its own: a head is a few products over one row a sequence. Heads do not
see one another's guesses: the tree's node of depth k and rank r is head k's (r + 1)-th likeliest token, whatever its
parent. They are whole on every rank of the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotune.planners.decoding.passes import heads_shape
from autotune.planners.decoding.strategies import LATTICE, tree_of
from autotune.planners.lower.generate import drafted, inference_body
from autotune.runners.body import ALONE, Call, compile_body, run_body
from autotune.runners.decoding.refine import best_path
from autotune.runners.decoding.seen import Drafter, Ranker, Seen
from autotune.runners.ops import Env
from autotune.runners.ops.env import wide
from autotune.runners.rope import tables
from autotune.runners.sampling import likeliest
from autotune.runners.state import Loader, StageState
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload


@dataclass
class Heads(Drafter):
    """`bodies`: of each head its calls and what they see. `ranks`: how many tokens of a head the tree has, at most.
    `places`, int64 [nodes]: of each node but the root where its token is among those of all heads."""

    state: StageState
    bodies: tuple[tuple[tuple[Call, ...], Env], ...]
    ranks: int
    places: Tensor
    refines: bool = False  # whether the text so far has a say

    @classmethod
    def build(cls, plan: Plan, workload: Workload, load: Loader, device: torch.device, numbers: Tensor) -> Heads:
        model = workload.draft
        assert model is not None  # planners.decoding.strategies refuses a plan that drafts without one
        blocks, shape, tree = drafted(plan, model), heads_shape(plan, workload), tree_of(plan)
        state = StageState.untrained(blocks, load, workload.precision, device)
        nowhere = torch.zeros(1, dtype=torch.int64, device=device)
        bodies = tuple(
            (
                compile_body(block, inference_body(block, shape).forward),
                Env(model, shape.batch, 1, nowhere, tables(model, 1, device), state.of(block)[0]),
            )
            for block in blocks
        )
        ranks = 1 + max(tree.ranks)
        places = [(depth - 1) * ranks + rank for depth, rank in zip(tree.depths[1:], tree.ranks, strict=True)]
        return cls(state, bodies, ranks, torch.tensor(places, device=device), plan.refine == "ngram")

    def held(self) -> dict[str, Any]:
        return {"dw": self.state.weight}

    def rankers(self) -> Sequence[Ranker]:
        return tuple(partial(self.logits, head) for head in range(len(self.bodies)))

    def propose(self, seen: Seen) -> Tensor:
        row = self.row(seen)
        return self.refined(row, seen) if self.refines else self.likeliest(row).index_select(1, self.places)

    def refined(self, row: Tensor, seen: Seen) -> Tensor:
        """int64 [batch, heads]: of the likeliest tokens of each head those that go together best."""
        texts, logits = seen.sequences, self.every(row)
        p = logits.to(wide(logits.dtype)).softmax(dim=2)
        best = p.topk(min(LATTICE, p.shape[2]), dim=2)
        return best_path(texts.text, texts.filled, texts.newest(), best.indices, best.values)

    def row(self, seen: Seen) -> Tensor:
        """[batch, hidden]: of each text the hidden row that the target chose its newest token by."""
        assert seen.rows is not None
        batch = len(seen.news)
        rows = seen.rows.view(batch, -1, seen.rows.shape[1])
        last = (seen.news[:, :1] - 1).clamp_min(0)  # a text that is whole commits nothing: any row is as good
        if not seen.first:
            nodes = seen.news[:, 1 + seen.depth :]
            if nodes.shape[1]:  # kept branches; those in a row stand where they were
                last = torch.cat((torch.zeros_like(last), nodes), dim=1).gather(1, last)
        else:
            last = torch.zeros_like(last)
        return rows.gather(1, last[:, :, None].expand(-1, -1, rows.shape[2])).squeeze(1)

    def likeliest(self, row: Tensor) -> Tensor:
        """int64 [batch, heads * ranks]: each head's likeliest tokens, the first head's first. All heads' are ranked at
        once: one of them alone would keep a device as long."""
        logits = self.every(row)
        if self.ranks > 1:
            return logits.topk(self.ranks, dim=2).indices.flatten(1)
        return likeliest(logits.flatten(0, 1))[1].view(len(row), -1)

    def every(self, row: Tensor) -> Tensor:
        """[batch, heads, vocabulary] of rows [batch, hidden]."""
        return torch.stack([self.logits(head, row) for head in range(len(self.bodies))], dim=1)

    def logits(self, head: int, row: Tensor) -> Tensor:
        """[batch, vocabulary] of rows [batch, hidden]."""
        calls, env = self.bodies[head]
        return run_body(calls, env, {"x": row}, ALONE)["logits"]
