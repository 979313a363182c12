"""Attention through the kernels that torch ships, called without autograd: forward and backward by themselves.

None of them drops out, so that the random state they hand from forward to backward is never read: an empty tensor
goes in its place and nothing but (q, k, v, o, lse) needs to be saved.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops.attention_math import Math, hidden

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)  # compute capability
LSE_ALIGN = 32  # the efficient kernel pads its log-sum-exp to this many rows


def _only_cuda(device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], since: int) -> str | None:
    """Why a CUDA kernel for `dtypes` and compute capability >= `since`.0 cannot run here, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in dtypes:
        return f"needs {' or '.join(map(str, dtypes))}, not {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= since else f"needs compute capability {since}.0 or newer, not {major}.{minor}"


def _width(head_dim: int, limit: int) -> str | None:
    if head_dim % 8 == 0 and head_dim <= limit:
        return None
    return f"needs head_dim a multiple of 8 up to {limit}, not {head_dim}"


def _no_window(sequence: int, window: int) -> str | None:
    return f"has no sliding window ({window})" if window and (not sequence or sequence > window) else None


def _no_state(like: Tensor) -> Tensor:
    """What goes in the place of a random state that is never read."""
    return torch.empty(0, dtype=torch.int64, device=like.device)


class Flash:
    """FlashAttention-2 (Dao, 2307.08691) as built into torch; grouped heads and sliding windows natively."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """Half precision on Ampere or newer, heads up to 256 wide."""
        return _only_cuda(device, dtype, HALVES, 8) or _width(head_dim, 256)

    @staticmethod
    def _limits(window: int) -> dict[str, int]:
        return {"window_size_left": window - 1, "window_size_right": 0} if window else {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lengths = q.shape[1], k.shape[1]
        limits = self._limits(window)
        o, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, *lengths, 0.0, causal, False, **limits)
        return o.transpose(1, 2), lse

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, q, k, v, o = (x.transpose(1, 2) for x in (g, q, k, v, o))
        lengths, state, limits = (q.shape[1], k.shape[1]), _no_state(q), self._limits(window)
        dq, dk, dv = aten._flash_attention_backward(
            g, q, k, v, o, lse.contiguous(), None, None, *lengths, 0.0, causal, state, state, **limits
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@lru_cache(maxsize=8)
def _cudnn_lse_dimensions(device: torch.device) -> int:
    """3 or 4: whether this torch's cuDNN attention keeps a last dimension of 1 in its log-sum-exp.

    It does in 2.11 and not in some later versions, and the backward takes what the forward gave; the smallest call
    tells.
    """
    x = torch.zeros((1, 1, 64, 64), dtype=torch.bfloat16, device=device)
    lse: Tensor = aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True, False)[1]
    return lse.dim()


class Cudnn:
    """cuDNN's fused attention; grouped heads natively. On Hopper about twice as fast as FlashAttention-2 there."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """Half precision on Ampere or newer, heads up to 128 wide, no window, at least two tokens."""
        if sequence == 1:
            return "needs a sequence of at least 2 tokens"
        return _only_cuda(device, dtype, HALVES, 8) or _width(head_dim, 128) or _no_window(sequence, window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
        return o, lse.view(q.shape[:3])

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, state = (q.shape[2], k.shape[2]), _no_state(q)
        lse = lse.contiguous()
        if _cudnn_lse_dimensions(q.device) == 4:
            lse = lse.unsqueeze(-1)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, o, lse, state, state, None, None, None, *lengths, 0.0, causal
        )
        return dq, dk, dv


class Efficient:
    """The memory-efficient kernel (Rabe and Staats, 2112.05682) of xFormers in torch; key heads are copied out."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """fp32 or half precision on any CUDA device since Maxwell, no window."""
        types = (*HALVES, torch.float32)
        return _only_cuda(device, dtype, types, 5) or _width(head_dim, 256) or _no_window(sequence, window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        o, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        return o, lse[..., : q.shape[2]]

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, state = q.shape[1] // k.shape[1], _no_state(q)
        wide_k, wide_v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        padded = F.pad(lse, (0, -lse.shape[2] % LSE_ALIGN), value=float("inf")).contiguous()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            g, q, wide_k, wide_v, None, o, padded, state, state, 0.0, [True, True, True, False], causal
        )
        if groups > 1:
            dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
        return dq, dk, dv


class CpuFlash:
    """torch's blocked CPU kernel; grouped heads natively, a sliding window as an added mask."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """Any floating type on the CPU."""
        if device.type != "cpu":
            return f"needs the CPU, not {device.type}"
        return None if dtype in (*HALVES, torch.float32, torch.float64) else f"has no {dtype}"

    @staticmethod
    def _mask(q: Tensor, window: int) -> Tensor | None:
        if not window:
            return None
        n = q.shape[2]
        return q.new_zeros((n, n)).masked_fill_(hidden(n, n, window, q.device), float("-inf"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        mask = self._mask(q, window)
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal and mask is None, attn_mask=mask)
        return o, lse

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = self._mask(q, window)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, lse, 0.0, causal and mask is None, attn_mask=mask
        )
        return dq, dk, dv


Fused = Flash | Cudnn | Efficient | CpuFlash | Math
FLASH, CUDNN, EFFICIENT, CPU, PLAIN = Flash(), Cudnn(), Efficient(), CpuFlash(), Math()


def best(device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int, window: int) -> Fused:
    """The fastest backend that takes this shape.

    cuDNN is ahead of FlashAttention-2 on Hopper and on Hopper alone; torch's own order puts FlashAttention-2 first
    everywhere.
    """
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    order: tuple[Fused, ...] = (CUDNN, FLASH) if on_hopper else (FLASH, CUDNN)
    order = (*order, EFFICIENT, CPU)
    takes = (b for b in order if b.supported(device, dtype, head_dim, sequence, window) is None)
    return next(takes, PLAIN)


class Sdpa:
    """The best of the others for each shape: `best` says which."""

    def supported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, sequence: int = 0, window: int = 0
    ) -> str | None:
        """Whatever `best` finds."""
        return best(device, dtype, head_dim, sequence, window).supported(device, dtype, head_dim, sequence, window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool = True) -> tuple[Tensor, Tensor]:
        return best(q.device, q.dtype, q.shape[3], q.shape[2], window).forward(q, k, v, window, causal)

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, causal: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        return best(q.device, q.dtype, q.shape[3], q.shape[2], window).backward(g, q, k, v, o, lse, window, causal)
