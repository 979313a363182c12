"""What training decoding heads takes: a frozen model's hidden rows, an activation by itself, the loss of tokens further
ahead than the next one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops import cross_entropy
from autotune.runners.ops.env import Env
from autotune.spec.graph import Node

aten = torch.ops.aten


def frozen(env: Env, node: Node, tokens: Tensor) -> tuple[Tensor, ...]:
    """tokens int64 [tokens] -> the frozen model's hidden rows [tokens, hidden], after its final norm."""
    assert env.frozen is not None  # a trainer of heads has one
    return (env.frozen(tokens),)


def activate(env: Env, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    """SiLU or ReLU of [tokens, width]."""
    return (F.silu(x) if node.word("function") == "silu" else F.relu(x),)


def activate_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (g,), (x,) = grads, saved
    if node.word("function") == "silu":
        return (aten.silu_backward(g, x),)
    return (aten.threshold_backward(g, x, 0),)


def _ahead(env: Env, node: Node, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(the token `ahead` places after each row's target, whether there is one), both [tokens]: of each sequence all but
    the last `ahead` rows have one."""
    places = torch.arange(len(targets), device=targets.device) % env.sequence
    here = places < env.sequence - node.attr("ahead")
    return torch.where(here, targets.roll(-node.attr("ahead")), 0), here


def forward(env: Env, node: Node, logits: Tensor, targets: Tensor, before: Tensor | None = None) -> tuple[Tensor, ...]:
    """logits [tokens, vocabulary], targets int64 [tokens], the token after each.

    Returns `before` and the node's share times the sum over rows of the negative log-likelihood of the token `ahead`
    places after a row's target, times env.loss_scale; and lse [tokens]. A sequence's last rows, whose tokens are
    beyond its end, count nothing: the mean is over all of a batch's tokens, as that of any loss is.
    """
    lse = cross_entropy.log_sum_exp(logits)
    wanted, here = _ahead(env, node, targets)
    missed = lse - logits.gather(1, wanted[:, None]).squeeze(1).to(lse.dtype)
    loss = (missed * here).sum() * (env.loss_scale * node.number("share"))
    return loss if before is None else loss + before, lse


def dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of the logits, in the logits' own memory; rows without such a token have none."""
    logits, targets, lse = saved
    wanted, here = _ahead(env, node, targets)
    scaled = replace(env, loss_scale=env.loss_scale * node.number("share"))
    (made,) = cross_entropy.dgrad(scaled, node, (), (logits, wanted, lse))
    return (made.masked_fill_(~here[:, None], 0),)
