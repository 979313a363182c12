"""RMSNorm (Zhang and Sennrich, 1910.07467, equation 4): y = x / sqrt(mean(x^2) + eps) * weight.

On CUDA through torch's fused kernels, which do the whole row in one pass; elsewhere by the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autotune.runners.ops.env import Env, wide
from autotune.spec.graph import Node

aten = torch.ops.aten


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays as 1; at least fp32."""
    x = x.to(wide(x.dtype))
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def input_gradient(g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x [..., width] from that of y, in rstd's type. rstd [..., 1].

    With n = x * rstd: dx = rstd * (g * weight - n * mean(g * weight * n)).
    """
    normal = x * rstd
    gw = g.to(rstd.dtype) * weight
    return normal.mul_((gw * normal).mean(-1, keepdim=True)).neg_().add_(gw).mul_(rstd)


def forward(env: Env, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    """x [tokens, width] -> y like x, rstd [tokens]."""
    weight = env.weights[node.weights[0].name]
    eps = node.number("eps")
    if x.is_cuda:
        y, rstd = aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        return y, rstd.view(-1)
    rstd = reciprocal_rms(x, eps)
    return (x * rstd).mul_(weight).to(x.dtype), rstd.view(-1)


def dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient of y [tokens, width] -> gradient of x."""
    (g,), (x, rstd) = grads, saved
    weight = env.weights[node.weights[0].name]
    if x.is_cuda:
        dx, _ = aten._fused_rms_norm_backward(g, x, [x.shape[-1]], rstd.view(-1, 1), weight, [True, False])
        return (dx,)
    return (input_gradient(g, x, rstd.view(-1, 1), weight).to(x.dtype),)


def wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds sum over tokens of g * x * rstd to the weight's accumulator."""
    (g,), (x, rstd) = grads, saved
    name = node.weights[0].name
    if x.is_cuda:
        # The call wants the weight, though this gradient does not depend on it; where they are shared it may be away.
        weight = env.weights[name] if name in env.weights else x.new_empty(x.shape[-1])
        _, dw = aten._fused_rms_norm_backward(g, x, [x.shape[-1]], rstd.view(-1, 1), weight, [False, True])
        env.grads[name].add_(dw)
    else:
        env.grads[name].add_((x * rstd.view(-1, 1)).mul_(g).sum(0))
