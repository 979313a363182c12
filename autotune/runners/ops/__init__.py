"""The values behind a body's instructions: for each key of `spec.opset.OPS`, what computes it and its gradients.

Nothing here uses autograd. A forward gets exactly the node's reads and gives its writes, then the stats that opset
declares; a gradient gets the gradients of the writes and exactly what opset says it needs, in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from autotune.runners.ops import (
    attention,
    cross_entropy,
    elementwise,
    embedding,
    experts,
    grouped,
    heads,
    latent,
    linear,
    linear_int8,
    norm,
    rotary,
)
from autotune.runners.ops.cache import KVCache
from autotune.runners.ops.env import Env
from autotune.spec.graph import Node

__all__ = ["OPERATIONS", "Env", "KVCache", "Operation"]


# (env, node, one tensor a read) -> writes, then stats.
Forward = Callable[..., tuple[Tensor, ...]]
# (env, node, gradients of the writes, what opset's `dgrad` lists) -> gradients of the first `inputs` reads.
InputGradient = Callable[[Env, Node, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]
# (env, node, gradients of the writes, what opset's `wgrad` lists): adds into env.grads, in place.
WeightGradient = Callable[[Env, Node, tuple[Tensor, ...], tuple[Tensor, ...]], None]


class Operation(NamedTuple):
    """The functions of one operation; None where it has no such gradient (or, of an addition, nothing to compute)."""

    forward: Forward
    dgrad: InputGradient | None = None
    wgrad: WeightGradient | None = None


OPERATIONS: dict[str, Operation] = {
    "embedding": Operation(embedding.forward, None, embedding.wgrad),
    "rmsnorm": Operation(norm.forward, norm.dgrad, norm.wgrad),
    "linear": Operation(linear.forward, linear.dgrad, linear.wgrad),
    "linear_int8": Operation(linear_int8.forward),
    "rotary": Operation(rotary.rotary, rotary.rotary_dgrad),
    "rotary_norm": Operation(rotary.rotary_norm, rotary.rotary_norm_dgrad, rotary.rotary_norm_wgrad),
    "attention_more": Operation(attention.more, attention.more_dgrad),
    "attention": Operation(attention.forward, attention.dgrad),
    "swiglu": Operation(elementwise.swiglu, elementwise.swiglu_dgrad),
    "add": Operation(elementwise.add),
    "latent_norm": Operation(latent.latent_norm, latent.latent_norm_dgrad, latent.latent_norm_wgrad),
    "latent_key": Operation(latent.latent_key, latent.latent_key_dgrad),
    "latent_rotary": Operation(latent.latent_rotary, latent.latent_rotary_dgrad),
    "route": Operation(experts.route, experts.route_dgrad),
    "dispatch": Operation(experts.dispatch, experts.dispatch_dgrad),
    "grouped": Operation(grouped.forward, grouped.dgrad, grouped.wgrad),
    "weighted_swiglu": Operation(experts.weighted_swiglu, experts.weighted_swiglu_dgrad),
    "combine": Operation(experts.combine, experts.combine_dgrad),
    "frozen": Operation(heads.frozen),
    "activate": Operation(heads.activate, heads.activate_dgrad),
    "ahead_entropy": Operation(heads.forward, heads.dgrad),
    "cross_entropy": Operation(cross_entropy.forward, cross_entropy.dgrad),
}
