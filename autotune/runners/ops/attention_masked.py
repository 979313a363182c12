"""Attention of training rows of which a mask says who sees whom: one for all sequences and heads, whole.

All pairs are computed, those that nobody sees too: -inf is added to their scores. The backends that take such a mask
are `planners.feasible.TAKES_MASK`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops.attention_aten import LSE_ALIGN, PLAIN

aten = torch.ops.aten


class MaskedCpu:
    """torch's blocked CPU kernel, any floating type; grouped heads natively."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sight: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=sight)
        return o, lse

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, lse, 0.0, False, attn_mask=sight
        )
        return dq, dk, dv


class MaskedEfficient:
    """The memory-efficient kernel (Rabe and Staats, 2112.05682) of xFormers in torch, fp32 or half precision on CUDA;
    key heads are copied out."""

    @staticmethod
    def _operands(q: Tensor, k: Tensor, v: Tensor, sight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        return k, v, sight.expand(q.shape[0], q.shape[1], *sight.shape)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sight: Tensor) -> tuple[Tensor, Tensor]:
        o, lse, *_ = aten._scaled_dot_product_efficient_attention(q, *self._operands(q, k, v, sight), True, 0.0, False)
        return o, lse[..., : q.shape[2]]

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, state = q.shape[1] // k.shape[1], torch.empty(0, dtype=torch.int64, device=q.device)
        wide_k, wide_v, bias = self._operands(q, k, v, sight)
        padded = F.pad(lse, (0, -lse.shape[2] % LSE_ALIGN), value=float("inf")).contiguous()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            g, q, wide_k, wide_v, bias, o, padded, state, state, 0.0, [True, True, True, False], False
        )
        if groups > 1:
            dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
        return dq, dk, dv


CPU, EFFICIENT = MaskedCpu(), MaskedEfficient()


class MaskedMath:
    """The formulas, any device and floating type."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sight: Tensor) -> tuple[Tensor, Tensor]:
        return PLAIN.forward(q, k, v, 0, sight=sight)

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return PLAIN.backward(g, q, k, v, o, lse, 0, sight=sight)


FORMULAS = MaskedMath()


def chosen(name: str, q: Tensor) -> MaskedCpu | MaskedEfficient | MaskedMath:
    """What a plan's attention is for these queries [batch, heads, sequence, width] under a mask."""
    if name == "math" or (q.is_cuda and q.dtype == torch.float64):
        return FORMULAS
    return EFFICIENT if q.is_cuda else CPU
