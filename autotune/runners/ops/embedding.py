"""Token embedding, sharded by vocabulary: rows that another rank holds are zero here, the ranks' sum is the whole.

Tokens beyond the vocabulary are masks, whose embeddings are a weight of their own: whole on every rank, of which the
first alone looks them up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops.env import Env, wide
from autotune.spec.graph import Node


def _local(env: Env, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each token in this shard (0 where elsewhere), and a mask of those that are elsewhere."""
    local = tokens - env.tensor_rank * rows
    outside = (local < 0) | (local >= rows)
    return local.masked_fill_(outside, 0), outside


def forward(env: Env, node: Node, tokens: Tensor) -> tuple[Tensor, ...]:
    """tokens int64 [tokens] -> [tokens, hidden]; with several tensor ranks a partial sum."""
    weight, *masks = (env.weights[own.name] for own in node.weights)
    if env.tensor_size == 1 and not masks:
        return (F.embedding(tokens, weight),)
    local, outside = _local(env, tokens, weight.shape[0])
    y = F.embedding(local, weight).masked_fill_(outside.unsqueeze(1), 0)
    if masks and env.tensor_rank == 0:
        number = tokens - node.attr("vocab")
        is_mask = (number >= 0).unsqueeze(1)
        torch.where(is_mask, F.embedding(number.clamp_min_(0), masks[0]), y, out=y)
    return (y,)


def wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds each token's gradient row to its row of the accumulator. Few masks stand for many tokens: of them the sums
    are a product, in which no two rows are added to one place at once."""
    (g,), (tokens,) = grads, saved
    total, *masks = (env.grads.get(own.name) for own in node.weights)  # none of what is frozen
    g = g.to(wide(g.dtype))
    if masks and masks[0] is not None:
        each = torch.arange(len(masks[0]), device=tokens.device).unsqueeze(1) + node.attr("vocab")
        masks[0].addmm_((tokens == each).to(g.dtype), g)
    if total is None:
        return
    if env.tensor_size > 1 or masks:
        tokens, outside = _local(env, tokens, total.shape[0])
        g = g.masked_fill(outside.unsqueeze(1), 0)
    total.index_add_(0, tokens, g)
