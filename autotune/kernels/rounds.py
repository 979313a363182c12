"""What a round does once its tokens are chosen, in one kernel: which proposals are kept, the texts, and where the next
round's tokens go. From torch's own operations it takes two dozen launches, each as long as reading megabytes of
weights.

A program has a sequence. The plain reference is `runners/decoding` (`match_row`, `Sequences.take`, `Lengths.move`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class State(NamedTuple):
    """What is known of the sequences, and changed: see runners.decoding.sequences and ops.attention_cache.Lengths."""

    text: Tensor
    own: Tensor
    filled: Tensor
    before: Tensor
    taken: Tensor
    round: Tensor
    used: Tensor
    places: Tensor
    positions: Tensor
    depths: Tensor


@triton.jit
def _settle(
    choices, slate, news, text, own, filled, before, taken, round, used, places, positions, depths, token,
    new_tokens, columns, rounds, room, slates, wide, tokens,
    depth: tl.constexpr, lanes: tl.constexpr, nodes: tl.constexpr, spots: tl.constexpr,
    first: tl.constexpr, chosen: tl.constexpr, proposed: tl.constexpr, handed: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    f, o = tl.load(filled + b), tl.load(own + b)
    i = tl.arange(0, lanes)
    inside = i < depth
    if chosen:  # what the target chose after each token of a row: how many are kept follows
        told = tl.load(choices + b * depth + i, mask=inside, other=0)
        count = tl.full([], 1, tl.int64)
        if proposed:
            guess = tl.load(slate + b * slates + 1 + i, mask=i < depth - 1, other=-1)
            count += tl.min(tl.where((guess == told) & (i < depth - 1), depth - 1, i), 0)
        tl.store(news + b * wide + 1 + i, told, mask=inside)
    else:
        told = tl.load(news + b * wide + 1 + i, mask=inside, other=0)
        count = tl.load(news + b * wide)
    base = f
    if not first:
        base = f + 1
        count = tl.where(f + 1 < o + new_tokens, count, 0)
        at = tl.load(round + b)
        tl.store(taken + b * rounds + at, count)
        tl.store(round + b, at + 1)
    tl.store(news + b * wide, count)
    tl.store(text + b * columns + base + i, told, mask=inside)
    now = base - 1 + tl.minimum(count, o + new_tokens - base)
    tl.store(before + b, f)
    tl.store(filled + b, now)
    j = tl.arange(0, spots)
    tl.store(used + b, (now + nodes).to(tl.int32))
    tl.store(places + b * nodes + j, b * room + now + j, mask=j < nodes)
    tl.store(positions + b * nodes + j, now + tl.load(depths + j, mask=j < nodes, other=0), mask=j < nodes)
    if handed:
        new = tl.sum(tl.where(i == now - base, told, 0), 0)
        tl.store(token + b * tokens, tl.where(now < base, tl.load(text + b * columns + now), new))


def settle(
    state: State,
    news: Tensor,
    depth: int,
    new_tokens: int,
    room: int,
    first: bool,
    choices: Tensor | None = None,
    slate: Tensor | None = None,
    token: Tensor | None = None,
) -> None:
    """Commits a round's tokens and makes ready for the next. `news`, int64 [batch, 1 + depth + ...], says which; or,
    with `choices` int64 [batch, depth], what the target chose after each token of a row, it is written: one token is
    committed, or with `slate` [batch, depth] as many as were right and one. `token` [batch, ...] gets the newest one.
    `room`: positions of a sequence's cache; `first`: after a prompt."""
    batch, nodes = len(news), len(state.depths)
    none = news
    _settle[(batch,)](
        none if choices is None else choices, none if slate is None else slate, news, *state,
        none if token is None else token, new_tokens, state.text.shape[1], state.taken.shape[1], room,
        0 if slate is None else slate.stride(0), news.stride(0), 0 if token is None else token.stride(0),
        depth, triton.next_power_of_2(depth), nodes, triton.next_power_of_2(nodes),
        first, choices is not None, slate is not None, token is not None, num_warps=1,
    )  # fmt: skip


def empty_news(choices: Tensor) -> Tensor:
    """Room for what `settle` writes for choices [batch, depth]."""
    return torch.empty((len(choices), 1 + choices.shape[1]), dtype=torch.int64, device=choices.device)


@triton.jit
def _place(
    filled, begins, used, places, positions, depths, offset, nodes: tl.constexpr, spots: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    now = tl.load(filled + b) + offset
    j = tl.arange(0, spots)
    inside = j < nodes
    tl.store(used + b, (now + nodes).to(tl.int32))
    tl.store(places + b * nodes + j, now + tl.load(begins + b * nodes + j, mask=inside, other=0), mask=inside)
    tl.store(positions + b * nodes + j, now + tl.load(depths + j, mask=inside, other=0), mask=inside)


def place(
    filled: Tensor, offset: int, begins: Tensor, used: Tensor, places: Tensor, positions: Tensor, depths: Tensor
) -> None:
    """Where the next tokens go, of sequences with `filled` + offset positions in the cache: see
    ops.attention_cache.Lengths.move."""
    nodes = len(depths)
    spots = triton.next_power_of_2(nodes)
    _place[(len(filled),)](filled, begins, used, places, positions, depths, offset, nodes, spots, num_warps=1)
