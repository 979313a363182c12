"""Cross-entropy over logits that are sharded by vocabulary (Megatron-LM, 1909.08053, section 3).

Rows go through in chunks so that the wide temporaries stay small beside the logits. Over the tensor group two small
all-reduces are enough: the maximum of the ranks' log-sum-exps, then, together, their rescaled sums and the targets'
logits. The gradient needs none. On CUDA both are kernels of ours, without chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autotune.kernels import usable
from autotune.runners.ops.env import Env, wide
from autotune.spec.graph import Node

CHUNK_BYTES = 64 * 2**20  # of one wide temporary [rows, vocabulary of the shard]: the operation's transient memory


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, and a wide buffer for each: always the same memory."""
    tokens, columns = logits.shape
    dtype = wide(logits.dtype)
    rows = min(tokens, max(1, CHUNK_BYTES // (columns * dtype.itemsize)))
    buffer = torch.empty((rows, columns), dtype=dtype, device=logits.device)
    for begin in range(0, tokens, rows):
        end = min(begin + rows, tokens)
        yield slice(begin, end), buffer[: end - begin]


def _local(env: Env, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this shard (0 where elsewhere) [tokens, 1], and a mask of those that are here."""
    local = (targets - env.tensor_rank * columns).unsqueeze(1)
    here = (local >= 0) & (local < columns)
    return local.masked_fill_(~here, 0), here


def log_sum_exp(logits: Tensor) -> Tensor:
    """Of each row of this shard, wide [tokens]."""
    if usable(logits):
        from autotune.kernels import softmax as kernel

        return kernel.log_sum_exp(logits)
    lse = torch.empty(len(logits), dtype=wide(logits.dtype), device=logits.device)
    for rows, buffer in _chunks(logits):
        top = logits[rows].amax(1, keepdim=True).to(lse.dtype)
        torch.sub(logits[rows], top, out=buffer).exp_()
        torch.add(buffer.sum(1).log_(), top.squeeze(1), out=lse[rows])
    return lse


def forward(env: Env, node: Node, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """logits [tokens, vocabulary of the shard], targets int64 [tokens] in 0..vocabulary-1.

    Returns the loss, a scalar: sum over tokens of the negative log-likelihood, times env.loss_scale, the same on
    every tensor rank; and lse [tokens], the logarithm of each row's sum of exponentials over the whole vocabulary.
    """
    lse = log_sum_exp(logits)
    local, here = _local(env, targets, logits.shape[1])
    target = logits.gather(1, local).to(lse.dtype).masked_fill_(~here, 0).squeeze(1)
    if env.tensor_size > 1:
        top = env.combine(lse.clone(), "max")
        total, target = env.combine(torch.stack((lse.sub_(top).exp_(), target)), "sum").unbind()
        lse = top.add_(total.log())
    return (lse - target).sum().mul_(env.loss_scale), lse


def dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of the logits, in the logits' own memory: (softmax - one-hot) * loss_scale.

    `grads` is the gradient of the loss (a scalar), or empty for 1. The saved logits are gone afterwards.
    """
    logits, targets, lse = saved
    if usable(logits) and not grads:
        from autotune.kernels import softmax as kernel

        first = env.tensor_rank * logits.shape[1]
        return (kernel.cross_entropy_gradient(logits, lse, targets, env.loss_scale, first),)
    scale = grads[0] * env.loss_scale if grads else env.loss_scale
    local, here = _local(env, targets, logits.shape[1])
    minus = here.to(lse.dtype).mul_(-scale)
    in_place = logits.dtype == lse.dtype
    for rows, buffer in [(slice(None), logits)] if in_place else _chunks(logits):
        torch.sub(logits[rows], lse[rows].unsqueeze(1), out=buffer).exp_().mul_(scale)
        buffer.scatter_add_(1, local[rows], minus[rows])
        if not in_place:
            logits[rows].copy_(buffer)
    return (logits,)
