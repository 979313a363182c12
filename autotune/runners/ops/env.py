"""What every operation may look at besides its operands: this rank's weights, shapes, positions, group and cache.

One Env serves one block of one micro-batch; `altered`, or `dataclasses.replace`, makes the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autotune.runners.ops.attention_cache import Lengths
from autotune.runners.ops.cache import KVCache
from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class Env:
    """Activations are [tokens, features], tokens = batch * sequence, batch-major; features are this shard's.

    A micro-batch of generation has `sequence` new tokens a sequence, the first of them at position `start`.
    """

    model: ModelSpec
    batch: int  # sequences
    sequence: int  # tokens of one sequence here, all even where sequence parallelism gives an operation fewer rows
    positions: Tensor  # int64 [sequence], or [tokens] where sequences differ: row of the rotary tables for each token
    rope: tuple[Tensor, Tensor]  # cos and sin, fp32 [positions, head_dim]
    weights: Mapping[str, Tensor]  # by Weight.name: this tensor rank's shard
    grads: Mapping[str, Tensor] = field(default_factory=dict)  # accumulators: the shard's shape; fp32 for bf16 weights
    tensor_rank: int = 0
    tensor_size: int = 1
    context_size: int = 1  # ranks that exchange heads for tokens around attention
    ring_rank: int = 0
    ring_size: int = 1  # ranks that pass keys and values around
    expert_size: int = 1  # ranks that divide the routed experts
    hop: int = 0  # how many ranks far those have come that attention now sees
    all_reduce: Callable[[Tensor, str], Tensor] | None = None  # in place over the tensor group; "sum" or "max"
    attention: str = "sdpa"  # a key of ops.attention.BACKENDS
    loss_scale: float = 1.0  # 1 / tokens of the global batch: sums over ranks and micro-batches are then the mean
    cache: KVCache | None = None  # generation only: attention appends to it and reads all of it
    layer: int = 0  # this block's row of the cache
    start: int = 0  # position of the first token given now: the length the cache had before
    frozen: Callable[[Tensor], Tensor] | None = None  # tokens -> hidden rows of the target that heads are trained for
    sight: Tensor | None = None  # training rows that see others than those before them: 0, or -inf for those unseen,
    # [sequence, columns], the activations' type; its columns are padded (planners.lower.shape.sight_columns)
    lengths: Lengths | None = None  # where the device alone knows the cache's length: `start` then says nothing

    def altered(self, **changes: Any) -> Env:
        """As `dataclasses.replace` gives it, in a tenth of its time: a decoded token asks once a block."""
        made = object.__new__(Env)
        made.__dict__.update(self.__dict__, **changes)
        return made

    def combine(self, tensor: Tensor, how: str) -> Tensor:
        """`tensor` reduced in place over the tensor group; untouched where the group is this rank alone."""
        if self.tensor_size == 1:
            return tensor
        if self.all_reduce is None:
            raise ValueError(f"an Env of {self.tensor_size} tensor ranks needs all_reduce for this operation")
        return self.all_reduce(tensor, how)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics and sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
