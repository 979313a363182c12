"""Matrix products with a weight [outputs, inputs], bias optional: forward, input gradient, weight gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from autotune.runners.ops.env import Env
from autotune.spec.graph import Node

# A weight gradient in a narrower type than its accumulator needs a product of its own; this bounds that product.
WGRAD_CHUNK_BYTES = 64 * 2**20
ALIGNED_ROWS = 64  # chunks start where products read fastest: cuBLAS has slower kernels for operands off 16 bytes


def forward(env: Env, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    """x [tokens, inputs of the shard] -> [tokens, outputs of the shard].

    Of a row split the result is a partial sum, so only the first tensor rank adds the (whole) bias.
    """
    weight = env.weights[node.weights[0].name]
    if len(node.weights) > 1 and (node.split != "row" or env.tensor_rank == 0):
        return (torch.addmm(env.weights[node.weights[1].name], x, weight.t()),)
    return (torch.mm(x, weight.t()),)


def dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient [tokens, outputs] -> [tokens, inputs]; a partial sum where the split is by column."""
    return (torch.mm(grads[0], env.weights[node.weights[0].name]),)


def wgrad_rows(inputs: int, width: int) -> int:
    """Rows of a weight gradient [outputs, inputs] of `width` bytes an element that are multiplied at once."""
    return max(1, WGRAD_CHUNK_BYTES // (inputs * width * ALIGNED_ROWS)) * ALIGNED_ROWS


def accumulate(total: Tensor, g: Tensor, x: Tensor) -> None:
    """Adds g^T x to `total` [outputs, inputs]; g [tokens, outputs], x [tokens, inputs]."""
    if total.dtype == g.dtype:
        total.addmm_(g.t(), x)
        return
    rows = wgrad_rows(x.shape[1], x.element_size())
    for part, columns in zip(torch.split(total, rows), torch.split(g, rows, dim=1), strict=True):
        part.add_(torch.mm(columns.t(), x))


def wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds gradient^T x to the weight's accumulator and the column sums of the gradient to the bias's."""
    (g,), (x,) = grads, saved
    accumulate(env.grads[node.weights[0].name], g, x)
    if len(node.weights) > 1:
        bias = env.grads[node.weights[1].name]
        bias.add_(g.sum(0, dtype=bias.dtype))
