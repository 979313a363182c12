"""The product with a weight rounded to 8 bits, and the scale of each of its rows (spec.int8_graph).

A GPU multiplies a few tokens with the weight as it lies, at half the bytes that bf16 takes (kernels/matvec.py). More
tokens, and every product on a CPU, take the weight some rows at a time, as wide as x, which loses nothing: of int8 no
library's product has a scale a row and x unrounded on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autotune.kernels import usable
from autotune.planners.lower.call import tile_rows
from autotune.runners.ops.env import Env
from autotune.runners.ops.linear import operands
from autotune.spec.graph import Node


def forward(env: Env, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    """x [tokens, inputs of the shard] -> [tokens, outputs of the shard]; of a row split a partial sum."""
    weight, scales, bias = operands(env, node)
    assert scales is not None
    if usable(x):
        from autotune.kernels import matvec

        if len(x) <= matvec.MOST_ROWS and x.shape[1] <= matvec.MOST_INPUTS:
            return (matvec.product(x, weight, bias=bias, scales=scales),)
    out = x.new_empty(len(x), len(weight))
    rows = tile_rows(x.shape[1], x.element_size())
    for part, some, scale in zip(out.split(rows, 1), weight.split(rows), scales.split(rows), strict=True):
        torch.mm(x, some.to(x.dtype).t(), out=part)
        part.mul_(scale)
    if bias is not None:
        out.add_(bias)
    return (out,)
