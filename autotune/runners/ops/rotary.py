"""Rotary positions (Su et al., 2104.09864, 3.4) in the half-rotation layout, splitting the fused q, k, v.

Halves a, b of each head become a*cos - b*sin, b*cos + a*sin; the gradient is the rotation by the opposite angle.
`rotary_norm` is the same with an RMSNorm over each head of q and k first (Qwen3). On CUDA both are one kernel of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotune.kernels import usable
from autotune.runners.ops.env import Env, wide
from autotune.runners.ops.norm import input_gradient, reciprocal_rms
from autotune.spec.graph import Node


def _heads(env: Env, node: Node) -> tuple[int, int]:
    """Query and key heads of this tensor rank."""
    return node.attr("heads") // env.tensor_size, node.attr("kv_heads") // env.tensor_size


def on_gpu(env: Env, node: Node) -> tuple[Any, Any, Any]:
    """Our kernels, the heads they are to turn, and the norms that come first (None: none)."""
    from autotune.kernels import rotary as kernels

    queries, keys = _heads(env, node)
    norms = None
    if node.weights:
        q, k = (env.weights[weight.name] for weight in node.weights)
        norms = kernels.Norms(q, k, node.number("eps"))
    return kernels, kernels.Heads(queries, keys, node.attr("head_dim"), env.sequence), norms


def _split(env: Env, node: Node, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [batch, sequence, heads, head_dim] of q and k, and [tokens, kv heads * head_dim] of v."""
    width = node.attr("head_dim")
    queries, keys = _heads(env, node)
    end_q, end_k = queries * width, (queries + keys) * width
    shape = (env.batch, env.sequence, -1, width)
    return qkv[:, :end_q].view(shape), qkv[:, end_q:end_k].view(shape), qkv[:, end_k:]


def angles(env: Env, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of this micro-batch's positions, [1 or batch, sequence, 1, head_dim / 2], in at least fp32."""
    half, shape = env.rope[0].shape[1] // 2, (-1, env.sequence, 1, env.rope[0].shape[1])
    cos, sin = (table.index_select(0, env.positions).view(shape)[..., :half].to(wide(dtype)) for table in env.rope)
    return cos, sin


def turn_pairs(
    x: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], direction: int = 1
) -> None:
    """Writes the pairs x turned by direction * angle to `out` (which may not be x); all [batch, sequence, heads, n]."""
    (a, b), (cos, sin), (out_a, out_b) = x, table, out
    if out_a.dtype == cos.dtype:
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-direction)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=direction)
    else:  # narrower: round once, at the end
        out_a.copy_((a * cos).addcmul_(b, sin, value=-direction))
        out_b.copy_((b * cos).addcmul_(a, sin, value=direction))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int = 1) -> None:
    """Writes x [batch, sequence, heads, head_dim] turned by direction * angle to `out` (which may not be x)."""
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    turn_pairs((a, b), (cos, sin), (out_a, out_b), direction)


def rotary(env: Env, node: Node, qkv: Tensor) -> tuple[Tensor, ...]:
    """[tokens, (heads + 2 * kv_heads) * head_dim] -> q, k (turned) and v, each [tokens, its heads * head_dim]."""
    if usable(qkv):
        return _turned(env, node, qkv)
    q, k, v = _split(env, node, qkv)
    cos, sin = angles(env, qkv.dtype)
    turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    for x, out in zip((q, k), turned, strict=True):
        _turn(x, cos, sin, out)
    return (*(x.view(len(qkv), -1) for x in turned), v.contiguous())


def _turned(env: Env, node: Node, qkv: Tensor) -> tuple[Tensor, ...]:
    kernels, heads, norms = on_gpu(env, node)
    made: tuple[Tensor, ...] = kernels.split_and_turn(qkv, heads, env.rope, env.positions, norms)
    return made


def _turned_back(env: Env, node: Node, grads: tuple[Tensor, ...], qkv: Tensor | None = None) -> tuple[Tensor, ...]:
    kernels, heads, norms = on_gpu(env, node)
    return (kernels.turn_back(grads, heads, env.rope, env.positions, norms, qkv),)


def rotary_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v -> gradient of the fused qkv."""
    if usable(grads[0]):
        return _turned_back(env, node, grads)
    result = torch.empty((len(grads[0]), sum(g.shape[1] for g in grads)), dtype=grads[0].dtype, device=grads[0].device)
    q, k, v = _split(env, node, result)
    cos, sin = angles(env, result.dtype)
    for g, out in zip(grads, (q, k), strict=False):
        _turn(g.view(out.shape), cos, sin, out, -1)
    v.copy_(grads[2])
    return (result,)


def rotary_norm(env: Env, node: Node, qkv: Tensor) -> tuple[Tensor, ...]:
    """Like `rotary`, each head of q and k normalised first. Weights: q's then k's, [head_dim]."""
    if usable(qkv):
        return _turned(env, node, qkv)
    q, k, v = _split(env, node, qkv)
    cos, sin = angles(env, qkv.dtype)
    results = []
    for x, weight in zip((q, k), node.weights, strict=True):
        normal = (x * reciprocal_rms(x, node.number("eps"))).mul_(env.weights[weight.name])
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _turn(normal, cos, sin, out)
        results.append(out.view(len(qkv), -1))
    return (*results, v.contiguous())


def rotary_norm_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the saved qkv -> gradient of qkv; the norms' statistics are computed again."""
    (qkv,) = saved
    if usable(qkv):
        return _turned_back(env, node, grads, qkv)
    result = torch.empty_like(qkv)
    *inputs, _ = _split(env, node, qkv)
    *outputs, v = _split(env, node, result)
    cos, sin = angles(env, qkv.dtype)
    for g, x, out, weight in zip(grads, inputs, outputs, node.weights, strict=False):
        back = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
        _turn(g.view(x.shape), cos, sin, back, -1)
        out.copy_(input_gradient(back, x, reciprocal_rms(x, node.number("eps")), env.weights[weight.name]))
    v.copy_(grads[2])
    return (result,)


def rotary_norm_wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds the norms' weight gradients: sums over this rank's heads, so that the tensor group must add them up."""
    (qkv,) = saved
    *inputs, _ = _split(env, node, qkv)
    cos, sin = angles(env, qkv.dtype)
    for g, x, weight in zip(grads, inputs, node.weights, strict=False):
        back = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
        _turn(g.view(x.shape), cos, sin, back, -1)
        env.grads[weight.name].add_(back.mul_(x).mul_(reciprocal_rms(x, node.number("eps"))).sum((0, 1, 2)))
