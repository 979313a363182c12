"""What the one-process reference computes for experts and latent attention, in plain torch.

Experts are evaluated densely: every expert sees every token, and a weight of zero masks those that did not choose it.
Nothing is sorted, so that the values between `dispatch` and `combine` have a dimension for the experts here in place of
rows that belong to one: [batch, sequence, experts, width].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autotune.spec.graph import Node

Tensors = Sequence[Tensor]


class Own(NamedTuple):
    """A node's weights and constants, and cos and sin of the positions."""

    weights: Tensors
    constants: Tensors
    tables: Tensors


def _route(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    """Scores -> weights and numbers of the chosen experts [batch, sequence, top_k]."""
    logits = reads[0].to(torch.promote_types(reads[0].dtype, torch.float32))
    sigmoid = node.word("scoring") == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = scores.detach() + own.constants[0] if own.constants else scores.detach()
    groups = node.attr("groups")
    size = node.attr("experts") // groups
    if groups > 1:
        ranked = choice.unflatten(-1, (groups, size)).sort(-1, descending=True).values
        good = ranked[..., :2].sum(-1) if sigmoid else ranked[..., 0]
        limit = good.sort(-1, descending=True).values[..., node.attr("top_groups") - 1, None]
        choice = choice.masked_fill((good < limit).repeat_interleave(size, -1), float("-inf"))
    ids = choice.sort(-1, descending=True).indices[..., : node.attr("top_k")]
    chosen = scores.gather(-1, ids)
    if node.attr("normalise"):
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * node.number("scale"), ids


def _dispatch(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    """Every token for every expert [batch, sequence, experts, width], and its weight there, 0 where not chosen."""
    x, p, ids = reads
    chosen = torch.nn.functional.one_hot(ids, node.attr("experts"))
    dense = (p.unsqueeze(-1) * chosen).sum(-2)
    return x.unsqueeze(-2).expand(*x.shape[:-1], node.attr("experts"), -1), dense.unsqueeze(-1), ids, ids, ids


def _grouped(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    x = reads[0]
    stacked = own.weights[0].view(node.attr("experts"), node.attr("outputs"), node.attr("inputs"))
    return (torch.einsum("bsei,eoi->bseo", x, stacked),)


def _weighted(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    gate, up = reads[0].chunk(2, dim=-1)
    return ((torch.nn.functional.silu(gate) * up * reads[1]).to(gate.dtype),)


def _combine(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    return (reads[0].sum(-2),)


def _latent_norm(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    latent, key = reads[0].split([node.attr("width"), node.attr("rope_dim")], -1)
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + node.number("eps"))
    return normal.to(latent.dtype) * own.weights[0], key


def _turn(x: Tensor, tables: Tensors) -> Tensor:
    """Pairs side by side, as complex numbers, turned; left as real parts, then imaginary parts."""
    cos, sin = (table[..., : x.shape[-1] // 2].to(x.dtype) for table in tables)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _latent_key(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    return (_turn(reads[0].unsqueeze(-2), own.tables).squeeze(-2),)


def _latent_rotary(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    nope, heads = node.attr("nope_dim"), node.attr("heads")
    queries, kv = (x.unflatten(-1, (heads, -1)) for x in (reads[0], reads[2]))
    key = reads[1].unsqueeze(-2).expand(*reads[1].shape[:-1], heads, -1)
    q = torch.cat((queries[..., :nope], _turn(queries[..., nope:], own.tables)), -1) * node.number("scale")
    k = torch.cat((kv[..., :nope], key), -1)
    return q.flatten(-2), k.flatten(-2), kv[..., nope:].flatten(-2)


def _activate(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    return ({"silu": torch.nn.functional.silu, "relu": torch.relu}[node.word("function")](reads[0]),)


def _ahead_entropy(node: Node, reads: Tensors, own: Own) -> tuple[Tensor, ...]:
    """The share of this head in the loss: each row of a sequence against the token `ahead` places after its target,
    summed where there is one, over all rows."""
    logits, targets, *before = reads
    ahead = node.attr("ahead")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows, wanted = wide[:, :-ahead].flatten(0, 1), targets[:, ahead:].flatten()
    loss = torch.nn.functional.cross_entropy(rows, wanted, reduction="sum") / targets.numel() * node.number("share")
    return (loss + before[0] if before else loss,)


OPERATIONS: dict[str, Callable[[Node, Tensors, Own], tuple[Tensor, ...]]] = {
    "route": _route,
    "dispatch": _dispatch,
    "grouped": _grouped,
    "weighted_swiglu": _weighted,
    "combine": _combine,
    "latent_norm": _latent_norm,
    "latent_key": _latent_key,
    "latent_rotary": _latent_rotary,
    "activate": _activate,
    "ahead_entropy": _ahead_entropy,
}
