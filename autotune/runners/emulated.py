"""What the one-process reference computes with where a plan changes results: whole weights of the same meaning.

Plain torch, and none of the code that it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autotune.runners.reference import Key
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import EXACT, INT8

Weights = Mapping[Key, Tensor]


def rounded_and_back(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] rounded to 8 bits a row and multiplied back, in fp32 (fp64 stays)."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    largest = wide.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0) / 127
    return torch.round(wide / scale) * scale


def _int8(model: ModelSpec, weights: Weights) -> Weights:
    """The linear weights of layers rounded and back, the rest as they are."""
    names = {
        (b.index, n.weights[0].name) for b in blocks(model) if b.kind == "layer" for n in b.nodes if n.op == "linear"
    }
    return {key: rounded_and_back(weight) if key in names else weight for key, weight in weights.items()}


# By a plan's `weights`.
EMULATIONS: Mapping[str, Callable[[ModelSpec, Weights], Weights]] = {EXACT: lambda model, weights: weights, INT8: _int8}
