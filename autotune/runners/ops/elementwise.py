"""The gated SiLU (Shazeer, 2002.05202, equation 6) and the residual addition. On CUDA the SiLU is a kernel of ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.kernels import usable
from autotune.runners.ops.env import Env
from autotune.spec.graph import Node

aten = torch.ops.aten


def swiglu(env: Env, node: Node, gate_up: Tensor) -> tuple[Tensor, ...]:
    """[tokens, 2 * width], gate first -> silu(gate) * up [tokens, width]."""
    if usable(gate_up):
        from autotune.kernels import swiglu as kernel

        return (kernel.swiglu(gate_up),)
    gate, up = gate_up.chunk(2, dim=1)
    return (F.silu(gate).mul_(up),)


def swiglu_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient [tokens, width] -> [tokens, 2 * width], made half by half in one allocation and nothing beside it."""
    (g,), (gate_up,) = grads, saved
    if usable(gate_up):
        from autotune.kernels import swiglu as kernel

        return (kernel.swiglu_gradient(g, gate_up),)
    gate, up = gate_up.chunk(2, dim=1)
    result = torch.empty_like(gate_up)
    of_gate, of_up = result.chunk(2, dim=1)
    aten.silu.out(gate, out=of_up).mul_(g)
    torch.mul(g, up, out=of_gate)
    aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    return (result,)


def add(env: Env, node: Node, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """x + y. Its gradient is the same tensor for both, so that no instruction computes it."""
    return (x + y,)
