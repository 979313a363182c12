"""The memory-bound operations that a block is made of, as they are computed here: what the memory probe times.

Each entry of OPS says how many bytes of activations one element stands for, read plus written (`e`: bytes of the work's
dtype), and makes the operation for a Shape. Weights, statistics and indices are small beside them and not counted; the
comment on each line says what is. An element is one of the operation's own output, or of its input where that is all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from autotune.kernels import usable
from autotune.profiles_db.probes.crew import Crew

WIDTH = 1024  # features of a row; a vocabulary's rows are longer
VOCABULARY = 16384
HEAD = 64  # features of one attention head
EPS = 1e-5
CHUNK_BYTES = 64 << 20  # rows of logits whose wide temporaries are made at once

Run = Callable[[int], Any]
aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """Rows and width of an operation's elements, their dtype, and whose device and data they are."""

    rows: int
    width: int
    dtype: torch.dtype
    crew: Crew

    @property
    def wide(self) -> torch.dtype:
        """What statistics and sums are kept in: at least fp32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def data(self, parts: int = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random rows, `parts` times the width; to be read only."""
        return self.crew.pool.take((self.rows, parts * self.width), dtype or self.dtype)

    def row(self, width: int = 0) -> torch.Tensor:
        """A weight of one row."""
        return self.crew.pool.take((width or self.width,), self.dtype)

    def empty(self, parts: int = 1) -> torch.Tensor:
        return torch.empty(self.rows, parts * self.width, dtype=self.dtype, device=self.crew.place)

    def indices(self, limit: int) -> torch.Tensor:
        return torch.randint(0, limit, (self.rows,), device=self.crew.place)


@dataclass(frozen=True)
class Op:
    """`moved(e)`: bytes of one element; `make`: the operation; `width`: elements of a row."""

    moved: Callable[[int], int]
    make: Callable[[Shape], Run]
    width: int = WIDTH


def _copy(s: Shape) -> Run:
    source, target = s.data(), s.empty()
    return lambda i: target.copy_(source)


def _read(s: Shape) -> Run:
    x = s.data()
    return lambda i: x.sum()


def _fill(s: Shape) -> Run:
    x = s.empty()
    return lambda i: x.zero_()


def _add(s: Shape) -> Run:
    x, y = s.data(), s.data()
    return lambda i: x + y


def _accumulate(s: Shape) -> Run:
    total, part = s.data(dtype=s.wide).clone(), s.data()
    return lambda i: total.add_(part)


def _cast(s: Shape) -> Run:
    x = s.data(dtype=torch.bfloat16 if s.dtype == torch.float32 else torch.float32)
    return lambda i: x.to(s.dtype)


def _reciprocal_rms(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    return x.to(wide).square().mean(-1, keepdim=True).add_(EPS).rsqrt_()


def _norm_gradient(g: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normal, weighted = x * rstd, g.to(rstd.dtype) * weight
    return normal.mul_((weighted * normal).mean(-1, keepdim=True)).neg_().add_(weighted).mul_(rstd)


def _rmsnorm(s: Shape) -> Run:
    """Fused where there is a kernel for it, by the formula elsewhere, as are its gradients."""
    x, weight = s.data(), s.row()
    if x.is_cuda:
        return lambda i: aten._fused_rms_norm(x, [s.width], weight, EPS)
    return lambda i: (x * _reciprocal_rms(x, s.wide)).mul_(weight).to(s.dtype)


def _rmsnorm_bwd(s: Shape) -> Run:
    x, g, weight = s.data(), s.data(), s.row()
    rstd = _reciprocal_rms(x, s.wide)
    if x.is_cuda:
        return lambda i: aten._fused_rms_norm_backward(g, x, [s.width], rstd, weight, [True, False])
    return lambda i: _norm_gradient(g, x, rstd, weight).to(s.dtype)


def _column_sum(s: Shape) -> Run:
    g, total = s.data(), torch.zeros(s.width, dtype=s.wide, device=s.crew.place)
    return lambda i: total.add_(g.sum(0, dtype=s.wide))


def _rmsnorm_wgrad(s: Shape) -> Run:
    x, g, weight = s.data(), s.data(), s.row()
    rstd, total = _reciprocal_rms(x, s.wide), torch.zeros(s.width, dtype=s.wide, device=s.crew.place)
    if x.is_cuda:
        return lambda i: total.add_(aten._fused_rms_norm_backward(g, x, [s.width], rstd, weight, [False, True])[1])
    return lambda i: total.add_((x * rstd).mul_(g).sum(0))


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    if out.dtype == cos.dtype:
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=1)
    else:
        out_a.copy_((a * cos).addcmul_(b, sin, value=-1))
        out_b.copy_((b * cos).addcmul_(a, sin, value=1))


class _Heads:
    """A fused q, k, v of one row in half query heads and a quarter each of keys and values, and its angles."""

    def __init__(self, s: Shape) -> None:
        heads = s.width // HEAD
        self.query, self.key = max(1, heads // 2), heads // 4
        self.s, self.qkv = s, s.data()
        angle = s.crew.pool.take((s.rows, 1, HEAD // 2), s.wide)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.weight = s.row(HEAD)

    def split(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        end_q, end_k = self.query * HEAD, (self.query + self.key) * HEAD
        shape = (self.s.rows, -1, HEAD)
        turned = (x[:, :end_q].view(shape), x[:, end_q:end_k].view(shape)) if self.key else (x[:, :end_q].view(shape),)
        return turned, x[:, end_k:]

    def on_gpu(self, norm: bool, gradient: torch.Tensor | None = None) -> Run:
        """Our kernel over the same; back from a gradient of q, k and v where there is one."""
        from autotune.kernels import rotary as kernels

        heads = kernels.Heads(self.query, self.key, HEAD, self.s.rows)
        rope = self.cos.view(self.s.rows, -1).repeat(1, 2), self.sin.view(self.s.rows, -1).repeat(1, 2)
        positions = torch.arange(self.s.rows, device=self.qkv.device)
        norms = kernels.Norms(self.weight, self.weight, EPS) if norm else None
        if gradient is None:
            return lambda i: kernels.split_and_turn(self.qkv, heads, rope, positions, norms)
        parts = gradient.split([self.query * HEAD, self.key * HEAD, self.key * HEAD], dim=1)
        grads = parts[0].contiguous(), parts[1].contiguous(), parts[2].contiguous()
        return lambda i: kernels.turn_back(grads, heads, rope, positions, norms, self.qkv)


def _rotary(s: Shape, norm: bool) -> Run:
    heads = _Heads(s)
    if usable(heads.qkv) and heads.key:
        return heads.on_gpu(norm)

    def run(i: int) -> list[torch.Tensor]:
        parts, v = heads.split(heads.qkv)
        results = []
        for x in parts:
            normal = (x * _reciprocal_rms(x, s.wide)).mul_(heads.weight) if norm else x
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            _turn(normal, heads.cos, heads.sin, out)
            results.append(out)
        return [*results, v.contiguous()]

    return run


def _rotary_norm_back(s: Shape, weights: bool) -> Run:
    heads, gradient = _Heads(s), s.data()
    if usable(heads.qkv) and heads.key and not weights:
        return heads.on_gpu(norm=True, gradient=gradient)
    total = torch.zeros(HEAD, dtype=s.wide, device=s.crew.place)

    def run(i: int) -> torch.Tensor:
        result = s.empty()
        for g, x, out in zip(*(heads.split(t)[0] for t in (gradient, heads.qkv, result)), strict=True):
            back = torch.empty(x.shape, dtype=s.wide, device=x.device)
            _turn(g, heads.cos, heads.sin, back)
            rstd = _reciprocal_rms(x, s.wide)
            if weights:
                total.add_(back.mul_(x).mul_(rstd).sum((0, 1)))
            else:
                out.copy_(_norm_gradient(back, x, rstd, heads.weight))
        if not weights:
            heads.split(result)[1].copy_(heads.split(gradient)[1])
        return result

    return run


def _swiglu(s: Shape) -> Run:
    both = s.data(2)
    if usable(both):
        from autotune.kernels import swiglu as kernel

        return lambda i: kernel.swiglu(both)
    gate, up = both.chunk(2, dim=1)
    return lambda i: F.silu(gate).mul_(up)


def _swiglu_bwd(s: Shape) -> Run:
    both, g = s.data(2), s.data()
    if usable(both):
        from autotune.kernels import swiglu as kernel

        return lambda i: kernel.swiglu_gradient(g, both)
    gate, up = both.chunk(2, dim=1)

    def run(i: int) -> torch.Tensor:
        result = s.empty(2)
        of_gate, of_up = result.chunk(2, dim=1)
        torch.mul(F.silu(gate), g, out=of_up)
        aten.silu_backward.grad_input(g * up, gate, grad_input=of_gate)
        return result

    return run


def _embedding(s: Shape) -> Run:
    table, tokens = s.crew.pool.take((VOCABULARY, s.width), s.dtype), s.indices(VOCABULARY)
    return lambda i: F.embedding(tokens, table)


def _embedding_wgrad(s: Shape) -> Run:
    total = torch.zeros(VOCABULARY, s.width, dtype=s.wide, device=s.crew.place)
    tokens, g = s.indices(VOCABULARY), s.data()
    return lambda i: total.index_add_(0, tokens, g.to(s.wide))


def _chunks(s: Shape) -> Iterator[tuple[slice, torch.Tensor]]:
    rows = min(s.rows, max(1, CHUNK_BYTES // (s.width * s.wide.itemsize)))
    buffer = torch.empty(rows, s.width, dtype=s.wide, device=s.crew.place)
    for begin in range(0, s.rows, rows):
        end = min(begin + rows, s.rows)
        yield slice(begin, end), buffer[: end - begin]


def _cross_entropy(s: Shape) -> Run:
    logits, targets = s.data(), s.indices(s.width).unsqueeze(1)

    def log_sum_exp() -> torch.Tensor:
        if usable(logits):
            from autotune.kernels import softmax as kernel

            return kernel.log_sum_exp(logits)
        lse = torch.empty(s.rows, dtype=s.wide, device=s.crew.place)
        for rows, buffer in _chunks(s):
            top = logits[rows].amax(1, keepdim=True).to(s.wide)
            torch.sub(logits[rows], top, out=buffer).exp_()
            torch.add(buffer.sum(1).log_(), top.squeeze(1), out=lse[rows])
        return lse

    def run(i: int) -> torch.Tensor:
        return (log_sum_exp() - logits.gather(1, targets).to(s.wide).squeeze(1)).sum()

    return run


def _cross_entropy_bwd(s: Shape) -> Run:
    logits, targets = s.data().clone(), s.indices(s.width).unsqueeze(1)
    lse = logits.to(s.wide).logsumexp(-1)
    if usable(logits):
        from autotune.kernels import softmax as kernel

        return lambda i: kernel.cross_entropy_gradient(logits, lse, targets, 1.0)
    minus = torch.full((s.rows, 1), -1.0, dtype=s.wide, device=s.crew.place)
    in_place = s.dtype == s.wide

    def run(i: int) -> torch.Tensor:
        for rows, buffer in [(slice(None), logits)] if in_place else _chunks(s):
            torch.sub(logits[rows], lse[rows].unsqueeze(1), out=buffer).exp_().mul_(1.0)
            buffer.scatter_add_(1, targets[rows], minus[rows])
            if not in_place:
                logits[rows].copy_(buffer)
        return logits

    return run


OPS: dict[str, Op] = {
    "copy": Op(lambda e: 2 * e, _copy),  # reads one, writes one
    "add": Op(lambda e: 3 * e, _add),  # reads two, writes one
    "rmsnorm": Op(lambda e: 2 * e, _rmsnorm),  # reads x, writes y
    "rmsnorm_bwd": Op(lambda e: 3 * e, _rmsnorm_bwd),  # reads x and dy, writes dx
    "swiglu": Op(lambda e: 3 * e, _swiglu),  # an element of the product: reads gate and up, writes it
    "swiglu_bwd": Op(lambda e: 5 * e, _swiglu_bwd),  # reads gate, up and the gradient, writes two gradients
    "rotary": Op(lambda e: 2 * e, partial(_rotary, norm=False)),  # reads q, k, v, writes them; its backward likewise
    "cross_entropy": Op(lambda e: e, _cross_entropy, VOCABULARY),  # reads the logits
    "cross_entropy_bwd": Op(lambda e: 2 * e, _cross_entropy_bwd, VOCABULARY),  # reads logits, writes their gradient
    "rmsnorm_wgrad": Op(lambda e: 2 * e, _rmsnorm_wgrad),  # reads x and dy
    "column_sum": Op(lambda e: e, _column_sum),  # reads dy: a bias's gradient
    "embedding": Op(lambda e: e, _embedding),  # writes the rows; the table is a weight
    "embedding_wgrad": Op(lambda e: e, _embedding_wgrad),  # reads dy; the table's gradient is a weight's
    "accumulate": Op(lambda e: e + 2 * max(4, e), _accumulate),  # reads the part, reads and writes the total
    "cast": Op(lambda e: e + (2 if e == 4 else 4), _cast),  # reads fp32 (bf16, when the result is fp32), writes dtype
    "rotary_norm": Op(lambda e: 2 * e, partial(_rotary, norm=True)),  # as rotary, each head normalised first
    "rotary_norm_bwd": Op(lambda e: 3 * e, partial(_rotary_norm_back, weights=False)),  # reads qkv and d, writes dqkv
    "rotary_norm_wgrad": Op(lambda e: 2 * e, partial(_rotary_norm_back, weights=True)),  # reads qkv and d
    "read": Op(lambda e: e, _read),  # a sum over all
    "fill": Op(lambda e: e, _fill),  # writes one
}
