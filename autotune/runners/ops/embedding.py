"""Token embedding, sharded by vocabulary: rows that another rank holds are zero here, the ranks' sum is the whole."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops.env import Env
from autotune.spec.graph import Node


def _local(env: Env, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each token in this shard (0 where elsewhere), and a mask of those that are elsewhere."""
    local = tokens - env.tensor_rank * rows
    outside = (local < 0) | (local >= rows)
    return local.masked_fill_(outside, 0), outside


def forward(env: Env, node: Node, tokens: Tensor) -> tuple[Tensor, ...]:
    """tokens int64 [tokens] -> [tokens, hidden]; with several tensor ranks a partial sum."""
    weight = env.weights[node.weights[0].name]
    if env.tensor_size == 1:
        return (F.embedding(tokens, weight),)
    local, outside = _local(env, tokens, weight.shape[0])
    return (F.embedding(local, weight).masked_fill_(outside.unsqueeze(1), 0),)


def wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds each token's gradient row to its row of the accumulator."""
    (g,), (tokens,) = grads, saved
    total = env.grads[node.weights[0].name]
    g = g.to(total.dtype)
    if env.tensor_size > 1:
        tokens, outside = _local(env, tokens, total.shape[0])
        g = g.masked_fill(outside.unsqueeze(1), 0)
    total.index_add_(0, tokens, g)
