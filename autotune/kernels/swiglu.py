"""The gated SiLU (Shazeer, 2002.05202, equation 6) and its gradient, each in one kernel and one pass over memory.

torch takes two kernels forward and three backward. The plain reference is `runners/ops/elementwise.py` on a CPU;
`tests/gpu/check_ops.py` compares the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of one program


@triton.jit
def _forward(gate_up, out, width, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    here = at < width
    gate = tl.load(gate_up + token * 2 * width + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * width + at, gate * tl.sigmoid(gate) * up, mask=here)


@triton.jit
def _backward(grad, gate_up, out, width, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    here = at < width
    g = tl.load(grad + token * width + at, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + token * 2 * width + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + at, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(out + token * 2 * width + at, g * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=here)
    tl.store(out + token * 2 * width + width + at, g * gate * sigmoid, mask=here)


def swiglu(gate_up: Tensor) -> Tensor:
    """[tokens, 2 width], gate first -> silu(gate) * up [tokens, width]; computed in fp32, rounded once."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    _forward[(tokens, triton.cdiv(width, BLOCK))](gate_up.contiguous(), out, width, BLOCK)
    return out


def swiglu_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient [tokens, width] of the product and the saved [tokens, 2 width] -> that of gate and up."""
    tokens, width = grad.shape
    out = torch.empty_like(gate_up)
    grid = (tokens, triton.cdiv(width, BLOCK))
    _backward[grid](grad.contiguous(), gate_up.contiguous(), out, width, BLOCK)
    return out
