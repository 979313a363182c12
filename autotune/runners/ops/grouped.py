"""Matrix products by expert: rows that are sorted by expert, each group with a weight [outputs, inputs] of its own.

One kernel for all groups where the library has one (`grouped_mm`, bf16 on Hopper or newer): it reads on the device
where groups end. Elsewhere a product an expert, for which the host must know the ends: it waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.runners.ops.env import Env
from autotune.runners.ops.linear import accumulate
from autotune.spec.graph import Node

KERNEL: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)  # torch 2.10 made it public
ALIGNED = 8  # bf16 elements of 16 bytes: what the kernel's loads start at
HOPPER = 9  # compute capability


def unsupported(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why the library has no kernel for all groups of rows and weights of such widths at once, or None."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if KERNEL is None:
        return f"needs a torch with grouped_mm, not {torch.__version__}"
    if dtype != torch.bfloat16:
        return f"needs {torch.bfloat16}, not {dtype}"
    if odd := [width for width in widths if width % ALIGNED]:
        return f"needs widths that are multiples of {ALIGNED}, not {odd[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= HOPPER else f"needs compute capability {HOPPER}.0 or newer, not {major}.{minor}"


def widths(node: Node, tensor: int) -> tuple[int, int]:
    """(inputs, outputs) of an expert's product on one of `tensor` ranks."""
    inputs, outputs = node.attr("inputs"), node.attr("outputs")
    return inputs // (tensor if node.split == "inner" else 1), outputs // (tensor if node.split == "heads" else 1)


def _stacked(env: Env, node: Node, which: Tensor) -> Tensor:
    """This shard's weights or accumulators [experts, outputs, inputs]."""
    return which.view(node.attr("experts"), -1, which.shape[1])


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and where."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x [rows, k] by weights [experts, k, n] -> [rows, n]."""
    if unsupported(x.device, x.dtype, *weights.shape[1:]) is None:
        made: Tensor = KERNEL(x, weights, offs=ends)
        return made
    result = x.new_empty(len(x), weights.shape[2])
    for expert, rows in _groups(ends):
        torch.mm(x[rows], weights[expert], out=result[rows])
    return result


def forward(env: Env, node: Node, x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """x [rows, inputs of the shard] and the int32 ends of each expert's rows -> [rows, outputs of the shard]."""
    weights = _stacked(env, node, env.weights[node.weights[0].name])
    return (_product(x, weights.transpose(1, 2), ends),)


def dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradient [rows, outputs] -> [rows, inputs]."""
    return (_product(grads[0], _stacked(env, node, env.weights[node.weights[0].name]), saved[0]),)


def wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds each group's gradient^T x to its expert's accumulator; an expert without rows gets nothing."""
    (g,), (x, ends) = grads, saved
    totals = _stacked(env, node, env.grads[node.weights[0].name])
    if unsupported(x.device, x.dtype, x.shape[1], g.shape[1]) is None:
        product = KERNEL(g.t(), x, offs=ends)
        empty = ends == F.pad(ends, (1, -1))  # no kernel wrote theirs
        totals.add_(product.masked_fill_(empty.view(-1, 1, 1), 0))
        return
    for expert, rows in _groups(ends):
        accumulate(totals[expert], g[rows], x[rows])
