"""Probe: causal attention, forward and backward, by each backend that the device offers.

Backends are asked for by name, so that what is timed is what a plan will run. "sdpa" is the fastest of torch's kernels
for the device: cuDNN's first on Hopper (torch's own order has it last), FlashAttention-2 first elsewhere. Queries that
are fewer than the keys are decoding: whatever the backend, one call over the cache, query heads folded onto their keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault, nearest_name
from autotune.spec.work import Attention

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
KERNELS: dict[str, tuple[SDPBackend, ...]] = {"flash": (FLASH,), "efficient": (EFFICIENT,), "cudnn": (CUDNN,)}
ON_DEVICE = {"cpu": ("sdpa", "math"), "cuda": ("sdpa", "cudnn", "flash", "efficient", "math")}
HOPPER = (9, 0)
MATH_MOST_KEYS = 2048  # it writes the whole score matrix: longer is neither sensible nor small
aten = torch.ops.aten

# q, k, v -> o; and gradient of o, q, k, v, what the forward kept -> gradients of q, k and v.
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def works(setting: Setting) -> list[Attention]:
    """Training squares and one-query decode, the telling lengths first, over a few head counts and widths."""
    if setting.device == "cuda":
        squares = [(2, 4096), (4, 1024), (1, 16384), (8, 512), (4, 2048), (2, 8192), (1, 1024), (1, 32768)]
        decode = [(b, s) for s in (2048, 32768, 512, 8192) for b in (1, 16, 64) if b * s <= 64 * 8192]
        heads, dtype = [(32, 8, 128), (32, 8, 64), (32, 32, 128)], "bf16"
        squares, decode, heads = (squares[:3], decode[:4], heads[:1]) if setting.quick else (squares, decode, heads)
    else:
        squares = [(4, 256), (1, 64), (2, 512), (4, 64), (1, 1024), (8, 128), (1, 256)]
        decode = [(1, 128), (4, 512), (1, 1024), (8, 128), (4, 64)]
        heads, dtype = [(8, 4, 32), (8, 8, 64), (4, 2, 16)], "fp32"
        squares, decode, heads = (squares[:4], decode[:2], heads[:1]) if setting.quick else (squares, decode, heads)
    backends = ON_DEVICE[setting.device]
    training = [
        Attention(batch, length, length, *sizes, dtype, backend, form)
        for batch, length in squares
        for sizes in heads
        for backend in backends
        if backend != "math" or length <= MATH_MOST_KEYS
        for form in ("fwd", "bwd")
    ]
    single = [Attention(b, 1, keys, *sizes, dtype, name) for b, keys in decode for sizes in heads for name in backends]
    return [*training, *single]


def _order(work: Attention, crew: Crew) -> tuple[SDPBackend, ...]:
    if work.backend in KERNELS:
        return KERNELS[work.backend]
    on_hopper = crew.device == "cuda" and torch.cuda.get_device_capability() == HOPPER
    return (CUDNN, FLASH, EFFICIENT, MATH) if on_hopper else (FLASH, CUDNN, EFFICIENT, MATH)


def _library(work: Attention, crew: Crew, grouped: bool) -> Callable[..., torch.Tensor]:
    """torch's kernel for a square of queries and keys; heads grouped as they are, or expanded where it cannot."""
    order, repeat = list(_order(work, crew)), work.heads // work.kv_heads

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        context: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
        with context:
            if not grouped:
                k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped and repeat > 1)

    return forward


def _runnable(work: Attention, crew: Crew, operands: Operands) -> Callable[..., torch.Tensor]:
    """The forward that this backend takes; torch says why when it takes neither form."""
    with warnings.catch_warnings():  # torch warns why a kernel is not used, then raises or takes the next
        warnings.simplefilter("ignore")
        try:
            forward = _library(work, crew, grouped=True)
            forward(*operands)
        except RuntimeError:
            forward = _library(work, crew, grouped=False)
            forward(*operands)
    return forward


def _scores(
    work: Attention, q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    folded = q.to(wide).reshape(work.batch, work.kv_heads, -1, work.head_dim)
    scores = torch.matmul(folded, k.to(wide).transpose(2, 3)).mul_(1 / sqrt(work.head_dim))
    shape = (work.batch, work.kv_heads, -1, work.queries, work.keys)
    scores.view(shape).masked_fill_(hidden, float("-inf"))
    return folded, scores


def _math_forward(work: Attention, hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Operands:
    """(o, lse, folded q): softmax(q k^T / sqrt(width)) v by its formula, the scores kept whole."""
    folded, scores = _scores(work, q, k, hidden)
    lse = scores.logsumexp(-1)
    o = torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_(), v.to(scores.dtype))
    return o.view(q.shape).to(q.dtype), lse, folded


def _math_backward(
    work: Attention, hidden: torch.Tensor, g: torch.Tensor, operands: Operands, o: torch.Tensor, lse: torch.Tensor
) -> Operands:
    """Gradients of q, k and v, the probabilities made again from lse."""
    q, k, v = operands
    folded, p = _scores(work, q, k, hidden)
    p.sub_(lse.unsqueeze(-1)).exp_()
    g_wide = g.to(p.dtype).reshape(folded.shape)
    dv = torch.matmul(p.transpose(2, 3), g_wide)
    delta = (g_wide * o.to(p.dtype).reshape(folded.shape)).sum(-1, keepdim=True)
    ds = torch.matmul(g_wide, v.to(p.dtype).transpose(2, 3)).sub_(delta).mul_(p).mul_(1 / sqrt(work.head_dim))
    dq = torch.matmul(ds, k.to(p.dtype)).view(q.shape)
    return dq.to(q.dtype), torch.matmul(ds.transpose(2, 3), folded).to(k.dtype), dv.to(v.dtype)


def _math(work: Attention, crew: Crew, operands: Operands, g: torch.Tensor) -> Callable[[], Any]:
    hidden = torch.ones(work.queries, work.keys, dtype=torch.bool, device=crew.place).triu_(1)
    if work.form == "fwd":
        return partial(_math_forward, work, hidden, *operands)
    o, lse, _ = _math_forward(work, hidden, *operands)
    return partial(_math_backward, work, hidden, g, operands, o, lse)


def _on_processor(work: Attention, operands: Operands, g: torch.Tensor) -> Callable[[], Any]:
    """torch's blocked CPU kernel, without autograd's share of a small call."""
    forward = partial(aten._scaled_dot_product_flash_attention_for_cpu, *operands, 0.0, True)
    if work.form == "fwd":
        return forward
    o, lse = forward()
    return partial(aten._scaled_dot_product_flash_attention_for_cpu_backward, g, *operands, o, lse, 0.0, True)


def _on_device(work: Attention, crew: Crew, operands: Operands, g: torch.Tensor) -> Callable[[], Any]:
    if work.form == "fwd":
        return partial(_runnable(work, crew, operands), *operands)
    inputs = tuple(x.detach().requires_grad_() for x in operands)
    out = _runnable(work, crew, (inputs[0], inputs[1], inputs[2]))(*inputs)
    return partial(torch.autograd.grad, out, inputs, g, retain_graph=True)


def _decode(work: Attention, crew: Crew) -> Trial:
    """Queries over a cache (batch, kv heads, keys, width) that rotates: it is met once a token, never warm."""
    dtype, pool = DTYPES[work.dtype], crew.pool
    groups = work.heads // work.kv_heads
    q = pool.take((work.batch, work.kv_heads, groups * work.queries, work.head_dim), dtype)
    caches = pool.rotation((2, work.batch, work.kv_heads, work.keys, work.head_dim), dtype)
    mask = None
    if work.queries > 1:
        visible = torch.ones(work.queries, work.keys, dtype=torch.bool, device=crew.place)
        mask = visible.tril_(work.keys - work.queries).repeat(groups, 1)

    def run(i: int) -> torch.Tensor:
        k, v = caches[i % len(caches)]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Trial(run)


def prepare(work: Attention, crew: Crew) -> Trial:
    """Operands are (batch, length, heads, width) seen as (batch, heads, length, width), as a linear layer leaves them.

    "bwd" is the gradients of q, k and v alone, of a forward done once before.
    """
    if work.backend not in ON_DEVICE["cuda"]:
        near = nearest_name(work.backend, ON_DEVICE["cuda"])
        raise EnvironmentFault(f"no attention backend named {work.backend!r} (nearest: {near})")
    if work.queries < work.keys and work.form == "fwd":
        return _decode(work, crew)
    dtype, pool = DTYPES[work.dtype], crew.pool
    shapes = [(work.batch, work.queries, work.heads, work.head_dim)]
    shapes += 2 * [(work.batch, work.keys, work.kv_heads, work.head_dim)]
    q, k, v, g = (pool.take(shape, dtype).transpose(1, 2) for shape in (*shapes, shapes[0]))
    if work.backend == "math":
        call = _math(work, crew, (q, k, v), g)
    elif crew.device == "cpu" and work.backend == "sdpa":
        call = _on_processor(work, (q, k, v), g)
    else:
        call = _on_device(work, crew, (q, k, v), g)
    return Trial(lambda i: call())
