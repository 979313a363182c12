"""What a mixture of experts does beside its products: choosing, sorting rows by expert, weighting, adding up by token.

Nothing is dropped and nothing padded: every token has as many rows as experts are chosen for it, and rows of one expert
are neighbours, in the order of their tokens. A slot is a token's j-th choice: number token * top_k + j.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops.elementwise import swiglu, swiglu_dgrad
from autotune.runners.ops.env import Env, wide
from autotune.spec.graph import Node

TINY = 1e-20  # keeps the sum of chosen scores from 0 (DeepSeek-V3's own code adds as much)


def _scored(node: Node, logits: Tensor) -> Tensor:
    """Every expert's score of each token, wide [tokens, experts]."""
    logits = logits.to(wide(logits.dtype))
    return logits.sigmoid() if node.word("scoring") == "sigmoid" else logits.softmax(-1)


def _allowed(node: Node, choice: Tensor) -> Tensor:
    """`choice` [tokens, experts] with minus infinity outside the best groups; a group is as good as its best experts
    together (DeepSeek-V2, 2405.04434, section 2.2.2: its best one; V3, 2412.19437, section 2.1.2: its best two)."""
    groups, most = node.attr("groups"), node.attr("top_groups")
    if most >= groups:
        return choice
    parts = choice.unflatten(-1, (groups, -1))
    best = parts.topk(min(node.attr("group_best"), parts.shape[-1]), -1).values.sum(-1)
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(most, -1).indices, True)
    masked: Tensor = parts.masked_fill(~allowed.unsqueeze(-1), float("-inf"))
    return masked.flatten(1)


def route(env: Env, node: Node, logits: Tensor) -> tuple[Tensor, ...]:
    """[tokens, experts] -> weights, wide [tokens, top_k], and experts, int64 [tokens, top_k]."""
    scores = _scored(node, logits)
    choice = scores + env.weights[node.constants[0].name].to(scores.dtype) if node.constants else scores
    ids = _allowed(node, choice).topk(node.attr("top_k"), -1).indices
    chosen = scores.gather(1, ids)
    if node.attr("normalise"):
        chosen.div_(chosen.sum(-1, keepdim=True).add_(TINY))
    return chosen.mul_(node.number("scale")), ids


def route_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient of the weights -> gradient of the logits, through the chosen scores alone: the choice has none.

    With p = s / sum(s): ds = (g - sum(g * p)) / sum(s).
    """
    logits, ids = saved
    scores = _scored(node, logits)
    chosen, g = scores.gather(1, ids), grads[0] * node.number("scale")
    if node.attr("normalise"):
        total = chosen.sum(-1, keepdim=True).add_(TINY)
        g = g.sub_((g * chosen).sum(-1, keepdim=True).div_(total)).div_(total)
    if node.word("scoring") == "sigmoid":
        scores.zero_().scatter_(1, ids, g.mul_(chosen).mul_(1 - chosen))
    else:  # of a softmax s: s * (g - sum(g * s)), g being 0 where nothing was chosen
        inner = g.mul_(chosen).sum(-1, keepdim=True).neg_()
        scores.mul_(inner).scatter_add_(1, ids, g)
    return (scores.to(logits.dtype),)


def _added(rows: Tensor, place: Tensor, each: int) -> Tensor:
    """The sum of every token's rows [tokens, width], gathered and added in one pass."""
    return F.embedding_bag(place.view(-1, each), rows, mode="sum")


def dispatch(env: Env, node: Node, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """x [tokens, width], weights and ids [tokens, top_k] -> rows [tokens * top_k, width] sorted by expert and their
    weights [tokens * top_k]; each row's slot and each slot's row, int64 [tokens * top_k]; where the rows of each
    expert end, int32 [experts]."""
    slots = ids.view(-1)
    experts, order = slots.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    numbers = torch.arange(node.attr("experts"), device=slots.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    rows = x.index_select(0, order // node.attr("top_k"))
    return rows, weights.view(-1).index_select(0, order), order, place, ends


def dispatch_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the rows and of their weights -> those of x and of the weights by slot."""
    (of_rows, of_weights), (place,) = grads, saved
    each = node.attr("top_k")
    return _added(of_rows, place, each), of_weights.index_select(0, place).view(-1, each)


def weighted_swiglu(env: Env, node: Node, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """[rows, 2 * width], gate first, and wide [rows] -> silu(gate) * up * weight [rows, width]."""
    (product,) = swiglu(env, node, gate_up)
    return (product.mul_(weights.unsqueeze(1)),)


def weighted_swiglu_dgrad(
    env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradient [rows, width] -> those of gate and up [rows, 2 * width] and of the weights [rows]: of these, each tensor
    rank has the part of its columns."""
    (g,), (gate_up, weights) = grads, saved
    (product,) = swiglu(env, node, gate_up)
    of_weights = (product * g).sum(-1, dtype=weights.dtype)
    product.copy_(g).mul_(weights.unsqueeze(1))
    return (*swiglu_dgrad(env, node, (product,), (gate_up,)), of_weights)


def combine(env: Env, node: Node, rows: Tensor, order: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    """Weighted rows [tokens * top_k, width] -> their sums by token [tokens, width]."""
    return (_added(rows, place, node.attr("top_k")),)


def combine_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Every row's gradient is that of its token."""
    (g,), (order,) = grads, saved
    return (g.index_select(0, order // node.attr("top_k")),)
