"""How values are laid out for an exchange between ranks that share sequences, and back (planners.lower.context).

Activations are [tokens, features], sequence by sequence. What is exchanged is [ranks, tokens of one rank, features of
one rank]; where several values go together their features lie side by side. `shares`: bytes of the results, by which
features of several values are told apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.runners.ops import Env

Shares = tuple[int, ...]


def _columns(shares: Shares, width: int) -> list[int]:
    """Features of each value among `width` that lie side by side."""
    return [width * share // sum(shares) for share in shares]


def heads_apart(
    shares: Shares, env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Values [tokens here, features] -> [ranks, tokens here, features of one rank]: to each rank its heads."""
    ranks, tokens = env.context_size, len(reads[0])
    parts = [read.view(tokens, ranks, -1).transpose(0, 1) for read in reads]
    return (torch.cat(parts, dim=2),)


def heads_together(
    shares: Shares, env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """[ranks, tokens here, features of one rank] -> values [tokens here, features]."""
    tokens = reads[0].shape[1]
    parts = reads[0].split(_columns(shares, reads[0].shape[2]), dim=2)
    return tuple(part.transpose(0, 1).reshape(tokens, -1) for part in parts)


def tokens_together(
    shares: Shares, env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """[ranks, tokens of one rank, features here] -> values [all tokens, features here], sequence by sequence."""
    ranks, tokens, width = reads[0].shape
    parts = reads[0].view(ranks, env.batch, -1, width).transpose(0, 1).split(_columns(shares, width), dim=3)
    # A sequence alone is in order already, but for one value by itself the result must not be the operand's memory.
    return tuple(part.clone(memory_format=torch.contiguous_format).view(ranks * tokens, -1) for part in parts)


def tokens_apart(
    shares: Shares, env: Env, group: dist.ProcessGroup | None, reads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Values [all tokens, features here] -> [ranks, tokens of one rank, features here]: to each rank its tokens."""
    ranks = env.context_size
    parts = [read.view(env.batch, ranks, -1, read.shape[1]).transpose(0, 1) for read in reads]
    return (torch.cat(parts, dim=3).view(ranks, len(reads[0]) // ranks, -1),)


LAYOUTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "heads_apart": heads_apart,
    "heads_together": heads_together,
    "tokens_together": tokens_together,
    "tokens_apart": tokens_apart,
}
