"""Matrix products with a weight [outputs, inputs], bias optional: forward, input gradient, weight gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autotune.runners.ops.env import Env
from autotune.spec.graph import Node
from autotune.spec.int8_graph import SCALE

# A weight gradient in a narrower type than its accumulator needs a product of its own; this bounds that product.
WGRAD_CHUNK_BYTES = 64 * 2**20
ALIGNED_ROWS = 64  # chunks start where products read fastest: cuBLAS has slower kernels for operands off 16 bytes


class Operands(NamedTuple):
    """What a linear layer multiplies with here: of a rounded weight also the scales of its rows; the bias, where this
    rank adds one (of a row split the result is a partial sum: only the first tensor rank adds the whole bias)."""

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None


def operands(env: Env, node: Node) -> Operands:
    weight, *rest = node.weights
    scales = [env.weights[w.name] for w in rest if w.form == SCALE]
    biases = [env.weights[w.name] for w in rest if w.form != SCALE and (node.split != "row" or env.tensor_rank == 0)]
    return Operands(env.weights[weight.name], scales[0] if scales else None, biases[0] if biases else None)


def forward(env: Env, node: Node, x: Tensor) -> tuple[Tensor, ...]:
    """x [tokens, inputs of the shard] -> [tokens, outputs of the shard]; of a row split a partial sum."""
    weight, _, bias = operands(env, node)
    return (torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t()),)


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
