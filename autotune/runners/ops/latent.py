"""Latent attention's own operations (DeepSeek-V2, 2405.04434, section 2.1): the latent beside its rotary key, rotations
of interleaved pairs, and the heads' keys and values put together.

Pairs lie side by side in the projections; turned ones are left as two halves, in queries and keys alike, so that their
products are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autotune.runners.ops.env import Env
from autotune.runners.ops.norm import input_gradient, reciprocal_rms
from autotune.runners.ops.rotary import angles, turn_pairs
from autotune.spec.graph import Node


def latent_norm(env: Env, node: Node, kva: Tensor) -> tuple[Tensor, ...]:
    """[tokens, rank + rope_dim] -> RMSNorm of the first `rank`, the rest as it is, and rstd [tokens]."""
    latent, key = kva.split([node.attr("width"), node.attr("rope_dim")], 1)
    rstd = reciprocal_rms(latent, node.number("eps"))
    made = (latent * rstd).mul_(env.weights[node.weights[0].name]).to(kva.dtype)
    return made, key.contiguous(), rstd.view(-1)


def latent_norm_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the normalised latent and of the rotary key -> that of both side by side."""
    (of_latent, of_key), (kva, rstd) = grads, saved
    result = torch.empty_like(kva)
    rank, weight = node.attr("width"), env.weights[node.weights[0].name]
    result[:, rank:] = of_key
    result[:, :rank] = input_gradient(of_latent, kva[:, :rank], rstd.view(-1, 1), weight)
    return (result,)


def latent_norm_wgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
    """Adds sum over tokens of g * latent * rstd to the gain's accumulator."""
    kva, rstd = saved
    latent = kva[:, : node.attr("width")]
    env.grads[node.weights[0].name].add_((latent * rstd.view(-1, 1)).mul_(grads[0]).sum(0))


def _paired(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, dim=-1)
    return a, b


def _by_head(env: Env, x: Tensor, width: int) -> Tensor:
    """[tokens, heads * width] -> [batch, sequence, heads, width]."""
    return x.view(env.batch, env.sequence, -1, width)


def latent_key(env: Env, node: Node, key: Tensor) -> tuple[Tensor, ...]:
    """The key that all heads share, turned [tokens, rope_dim]."""
    result = torch.empty_like(key)
    x, out = (_by_head(env, t, node.attr("width")) for t in (key, result))
    turn_pairs(_paired(x), angles(env, key.dtype), _halves(out))
    return (result,)


def latent_key_dgrad(env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Its gradient, turned back."""
    result = torch.empty_like(grads[0])
    x, out = (_by_head(env, t, node.attr("width")) for t in (grads[0], result))
    turn_pairs(_halves(x), angles(env, result.dtype), _paired(out), -1)
    return (result,)


def _empty(like: Tensor, columns: int) -> Tensor:
    return like.new_empty(len(like), columns)


def latent_rotary(env: Env, node: Node, queries: Tensor, key: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
    """queries [tokens, heads * (nope_dim + rope_dim)], the turned key [tokens, rope_dim], kv [tokens, heads * (nope_dim
    + v_dim)] -> q and k [tokens, heads * (nope_dim + rope_dim)] and v [tokens, heads * v_dim]; q scaled."""
    nope, rope, v_dim = (node.attr(name) for name in ("nope_dim", "rope_dim", "v_dim"))
    x, parts = _by_head(env, queries, nope + rope), _by_head(env, kv, nope + v_dim)
    q, k = torch.empty_like(queries), torch.empty_like(queries)
    turned, keys = (_by_head(env, t, nope + rope) for t in (q, k))
    turned[..., :nope] = x[..., :nope]
    turn_pairs(_paired(x[..., nope:]), angles(env, queries.dtype), _halves(turned[..., nope:]))
    if node.number("scale") != 1:
        q.mul_(node.number("scale"))
    keys[..., :nope] = parts[..., :nope]
    keys[..., nope:] = _by_head(env, key, rope)
    return q, k, parts[..., nope:].reshape(len(queries), -1)


def latent_rotary_dgrad(
    env: Env, node: Node, grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v -> those of the queries, of the shared key (the part of this rank's heads), of kv."""
    nope, rope, v_dim = (node.attr(name) for name in ("nope_dim", "rope_dim", "v_dim"))
    of_q, of_k = (_by_head(env, g, nope + rope) for g in grads[:2])
    heads = of_q.shape[2]
    queries, kv = torch.empty_like(grads[0]), _empty(grads[0], heads * (nope + v_dim))
    x, parts = _by_head(env, queries, nope + rope), _by_head(env, kv, nope + v_dim)
    x[..., :nope] = of_q[..., :nope]
    turn_pairs(_halves(of_q[..., nope:]), angles(env, queries.dtype), _paired(x[..., nope:]), -1)
    if node.number("scale") != 1:
        queries.mul_(node.number("scale"))
    parts[..., :nope] = of_k[..., :nope]
    parts[..., nope:] = _by_head(env, grads[2], v_dim)
    return queries, of_k[..., nope:].sum(2).view(-1, rope), kv
