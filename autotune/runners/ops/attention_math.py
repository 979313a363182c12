"""Attention by its formulas, any device and floating type: what every other backend is compared with.

Scores are kept whole, so memory grows with the square of the sequence. Query heads that share a key head are further
rows of its queries; the sum over them in the gradients of k and v is then part of the matrix product.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from autotune.runners.ops.env import wide


def hidden(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """bool [rows, columns]: what the last `rows` of `columns` positions may not see. Window 0: all before."""
    row = torch.arange(columns - rows, columns, device=device).unsqueeze(1)
    column = torch.arange(columns, device=device)
    mask = column > row
    return mask | (column <= row - window) if window else mask


class Math:
    """softmax(q k^T / sqrt(width)) v and its derivatives (Dao, 2307.08691, 2.2 has them by rows)."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """Everything with a floating type."""
        return None if dtype.is_floating_point else f"needs a floating type, not {dtype}"

    def _scores(
        self, q: Tensor, k: Tensor, window: int, causal: bool, sight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q folded to [batch, kv_heads, groups * sequence, width] and its masked scores over the keys. `sight`
        [sequence, keys] is added to those of every head."""
        batch, heads, sequence, width = q.shape
        kv_heads = k.shape[1]
        folded = q.to(wide(q.dtype)).reshape(batch, kv_heads, -1, width)
        scores = torch.matmul(folded, k.to(folded.dtype).transpose(2, 3)).mul_(1 / sqrt(width))
        if sight is not None:
            scores.view(batch, kv_heads, heads // kv_heads, sequence, -1).add_(sight)
        elif causal:
            mask = hidden(sequence, sequence, window, q.device)
            scores.view(batch, kv_heads, heads // kv_heads, sequence, sequence).masked_fill_(mask, float("-inf"))
        return folded, scores

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True, sight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _, scores = self._scores(q, k, window, causal, sight)
        lse = scores.logsumexp(-1)
        o = torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), v.to(scores.dtype))
        return o.view(q.shape).to(q.dtype), lse.view(q.shape[:3])

    def backward(
        self,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        window: int,
        causal: bool = True,
        sight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With p the probabilities: dv = p^T g; ds = p * (g v^T - rowsum(g * o)); dq = ds k, dk = ds^T q, scaled."""
        folded, p = self._scores(q, k, window, causal, sight)
        p.sub_(lse.reshape(*p.shape[:3], 1)).exp_()
        g_wide = g.to(p.dtype).reshape(folded.shape)
        dv = torch.matmul(p.transpose(2, 3), g_wide)
        delta = (g_wide * o.to(p.dtype).reshape(folded.shape)).sum(-1, keepdim=True)
        ds = torch.matmul(g_wide, v.to(p.dtype).transpose(2, 3)).sub_(delta).mul_(p).mul_(1 / sqrt(q.shape[-1]))
        dq = torch.matmul(ds, k.to(p.dtype)).view(q.shape)
        dk = torch.matmul(ds.transpose(2, 3), folded)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
