"""Attention of new queries over a key-value cache, whose filled length the host knows or only the device does.

A pass that is captured once and replayed cannot be told a length by the host: it reads it where the device keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from autotune.planners.decoding.trees import Tree
from autotune.runners.ops import attention_math as plain

if TYPE_CHECKING:
    from autotune.runners.ops.env import Env

aten: Any = torch.ops.aten

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_WIDEST = 256
AMPERE = 8


class Lengths(NamedTuple):
    """How much of each sequence's cache is filled once the new tokens are in it, where they go, and what they see; on
    the device. New tokens that follow one another see what comes before them; those of a tree see their ancestors."""

    used: Tensor  # int32 [batch]
    rows: Tensor  # int32 [batch + 1]: where each sequence's new tokens begin among all, and their number
    columns: Tensor  # int32 [batch + 1]: where each sequence's positions begin in a layer of the cache, and all of them
    begins: Tensor  # int64 [batch, new]: where each new token of a sequence that is empty goes in a layer of the cache
    places: Tensor  # int64 [batch * new]: where it goes now
    depths: Tensor  # int64 [new]: how many of the new tokens come before each in its text
    positions: Tensor  # int64 [batch * new]: of each new token in its text
    visible: Tensor | None = None  # bool [new, new]: which of the others each sees, itself too; None: those before it

    @classmethod
    def empty(cls, batch: int, new: int, max_len: int, device: torch.device, tree: Tree | None = None) -> Lengths:
        """Of `batch` sequences of no tokens, each to be given `new` at a time and with room for `max_len`. `tree`: what
        the new tokens are, where they do not follow one another."""
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device)
        begins = (bounds[:-1, None] * max_len + torch.arange(new, device=device)).long()
        depths, visible = torch.arange(new, device=device), None
        if tree is not None and not tree.chain:
            depths = torch.tensor(tree.depths, device=device)
            visible = torch.tensor(tree.visible(), device=device)
        return cls(
            torch.zeros_like(bounds[:-1]),
            bounds * new,
            bounds * max_len,
            begins,
            begins.flatten().clone(),
            depths,
            depths.repeat(batch),
            visible,
        )

    def move(self, filled: Tensor, offset: int = 0) -> None:
        """The next step, before which so many positions, int64 [batch], and `offset` are filled."""
        if filled.is_cuda:
            from autotune.kernels.rounds import place

            place(filled, offset, self.begins, self.used, self.places, self.positions, self.depths)
            return
        filled = filled + offset
        torch.add(filled, self.begins.shape[1], out=self.used)
        torch.add(filled[:, None], self.begins, out=self.places.view(self.begins.shape))
        torch.add(filled[:, None], self.depths, out=self.positions.view(self.begins.shape))

    def seen(self, columns: Tensor, window: int) -> Tensor:
        """bool [batch, new, columns]: which positions of its cache each new token sees."""
        new = self.begins.shape[1]
        place = columns - (self.used.long() - new)[:, None]  # among the new tokens; below 0: before them
        inside = place.clamp(0, new - 1)
        depth = torch.where(place < 0, place, self.depths[inside])[:, None]
        if self.visible is None:
            found = depth <= self.depths[:, None]
            found &= (place < new)[:, None]
        else:
            found = (place < 0)[:, None] | (self.visible[:, inside].transpose(0, 1) & (place < new)[:, None])
        return found & (depth > self.depths[:, None] - window) if window else found


def over_cache(env: Env, q: Tensor, window: int) -> Tensor:
    """New queries [batch, heads, new, width] over everything in the cache, their own keys too; the result like q."""
    if env.lengths is None:
        return _known(env, q, window)
    flash = q.is_cuda and q.dtype in FLASH_DTYPES and q.shape[-1] <= FLASH_WIDEST and _since(q.device, AMPERE)
    if flash and env.lengths.visible is None:
        return _flash(env, env.lengths, q, window)
    return _masked(env, env.lengths, q, window)


def _since(device: torch.device, major: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= major


def _folded(q: Tensor, kv_heads: int) -> Tensor:
    """The query heads that share a key head as further rows of its queries: no key is copied, none is read twice."""
    batch, heads, new, width = q.shape
    return q.reshape(batch, kv_heads, heads // kv_heads * new, width)


def _known(env: Env, q: Tensor, window: int) -> Tensor:
    """The host knows the length: only what is filled is read, and for one new token no mask is needed."""
    assert env.cache is not None
    new, end = q.shape[2], env.start + q.shape[2]
    begin = max(0, env.start + 1 - window) if window else 0
    k, v = env.cache.view(env.layer, begin, end)
    mask = None
    if new > 1:
        hidden = plain.hidden(new, end, window, q.device)[:, begin:]
        mask = ~hidden.repeat(q.shape[1] // k.shape[1], 1)
    return F.scaled_dot_product_attention(_folded(q, k.shape[1]), k, v, attn_mask=mask).reshape(q.shape)


def _flash(env: Env, lengths: Lengths, q: Tensor, window: int) -> Tensor:
    """FlashAttention-2's kernel for sequences of different lengths, told them by the device. For one new token it
    splits the keys among the processors (Flash-Decoding). Its causal mask ends at the last key."""
    assert env.cache is not None
    batch, heads, new, width = q.shape
    k, v = env.cache.flat(env.layer)
    limits = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    o: Tensor = aten._flash_attention_forward(
        q.transpose(1, 2).reshape(batch * new, heads, width),
        k,
        v,
        lengths.rows,
        lengths.columns,
        new,
        env.cache.max_len,
        0.0,
        new > 1,
        False,
        seqused_k=lengths.used,
        **limits,
    )[0]
    return o.view(batch, new, heads, width).transpose(1, 2)


def _masked(env: Env, lengths: Lengths, q: Tensor, window: int) -> Tensor:
    """The cache under a mask that the device makes, all of it where nobody told the host how much is filled (`start`):
    for what no kernel takes lengths."""
    assert env.cache is not None
    new = q.shape[2]
    k, v = env.cache.view(env.layer, 0, env.start + new if env.start else env.cache.max_len)
    seen = lengths.seen(torch.arange(k.shape[2], device=q.device), window)
    mask = seen.repeat(1, q.shape[1] // k.shape[1], 1).unsqueeze(1)
    return F.scaled_dot_product_attention(_folded(q, k.shape[1]), k, v, attn_mask=mask).reshape(q.shape)
