"""Which of a round's proposed tokens are committed, a rule a function.

`match`: what the target itself chooses after each token, greedily or by a drawn number, must be what was proposed. So
answers are those of decoding a token at a time, token for token; a proposal is kept as often as the target chooses it.

`rejection`: speculative sampling (Leviathan et al., 2211.17192, 2.3; Chen et al., 2302.01318, algorithm 2): a token x
that a draft drew with probability q(x) is kept with probability min(1, p(x) / q(x)), and the first that is not is drawn
anew from what p has more than q. Tokens come with the target's probabilities p, but are other tokens than `match`
gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autotune.planners.decoding.trees import Tree
from autotune.runners.sampling import draw


class Levels(NamedTuple):
    """The nodes of a tree that may be kept, by depth from 1: of each depth the nodes and their parents, int64."""

    nodes: tuple[Tensor, ...]
    parents: tuple[Tensor, ...]

    @classmethod
    def of(cls, tree: Tree, device: torch.device, most: int | None = None) -> Levels:
        """`most`: nodes that may be, the first ones; all without it."""
        found: dict[int, list[int]] = {}
        for node, depth in enumerate(tree.depths[1 : None if most is None else most + 1], 1):
            found.setdefault(depth, []).append(node)
        levels = [found[depth] for depth in sorted(found)]
        parents = [[tree.parents[node - 1] for node in level] for level in levels]
        return cls(*(tuple(torch.tensor(row, device=device) for row in rows) for rows in (levels, parents)))


def match(levels: Levels, slate: Tensor, choices: Tensor) -> Tensor:
    """int64 [batch, 1 + (1 + depth) + depth]: how many tokens are committed, the tokens, and the nodes that were kept,
    by depth. `slate`, `choices` int64 [batch, nodes]: what was scored, and what the target chooses after each."""
    kept = torch.ones_like(slate, dtype=torch.bool)
    path, alive = [torch.zeros_like(slate[:, 0])], [kept[:, 0]]
    for nodes, parents in zip(*levels, strict=True):
        agree = kept[:, parents] & (slate[:, nodes] == choices[:, parents])
        kept[:, nodes] = agree
        alive.append(agree.any(dim=1))
        path.append(nodes[agree.long().argmax(dim=1)])  # of several alike the first: their texts are the same
    nodes = torch.stack(path, dim=1)
    count = torch.stack(alive, dim=1).sum(dim=1, keepdim=True)
    return torch.cat((count, choices.gather(1, nodes), nodes[:, 1:]), dim=1)


def match_row(slate: Tensor, choices: Tensor) -> Tensor:
    """The same of tokens in a row, int64 [batch, 1 + nodes]; what is kept stands where it is."""
    agree = (slate[:, 1:] == choices[:, :-1]).long()
    count = 1 + agree.cumprod(dim=1).sum(dim=1, keepdim=True)
    return torch.cat((count, choices), dim=1)


def rejection(slate: Tensor, p: Tensor, q: Tensor, accept: Tensor, numbers: Tensor) -> Tensor:
    """int64 [batch, 1 + nodes] as `match_row` gives it, by speculative sampling.

    `p` [batch, nodes, vocabulary] and `q` [batch, nodes - 1, vocabulary]: the target's and the draft's probabilities,
    in one precision. `accept` [batch, nodes - 1] and `numbers` [batch, nodes], uniform in [0, 1): what decides about
    each proposal, and what draws a token in the place of the first that is not kept, or after the last."""
    proposed = slate[:, 1:, None]
    ours, theirs = p[:, :-1].gather(2, proposed).squeeze(2), q.gather(2, proposed).squeeze(2)
    kept = (accept * theirs < ours).long().cumprod(dim=1)
    count = kept.sum(dim=1, keepdim=True)
    # After the last proposal nothing is taken away from p.
    more = (p - torch.cat((q, torch.zeros_like(p[:, :1])), dim=1)).clamp_min_(0)
    rest = more.gather(1, count[:, :, None].expand(-1, -1, p.shape[2])).squeeze(1)
    at = p.gather(1, count[:, :, None].expand(-1, -1, p.shape[2])).squeeze(1)
    whole = rest.sum(dim=1, keepdim=True)
    rest = torch.where(whole > 0, rest / whole, at)  # p = q but for roundings: nothing is left to tell them apart
    token = draw(rest, numbers.gather(1, count))
    tokens = torch.cat((slate[:, 1:], slate[:, :1]), dim=1).scatter(1, count, token)
    return torch.cat((count + 1, tokens), dim=1)
