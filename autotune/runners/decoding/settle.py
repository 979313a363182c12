"""What a round leaves once its tokens are known: texts, where the next round's tokens go, the newest token where the
next pass reads it. One kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from autotune.runners.decoding.commit import match_row
from autotune.runners.decoding.sequences import Sequences
from autotune.runners.ops.attention_cache import Lengths


def settle(
    texts: Sequences,
    lengths: Lengths,
    room: int,
    depth: int,
    first: bool,
    news: Tensor | None = None,
    choices: Tensor | None = None,
    slate: Tensor | None = None,
    token: Tensor | None = None,
) -> Tensor:
    """int64 [batch, 1 + depth + ...]: how many tokens are committed, the tokens, and what else `news` says.

    The tokens come as `news`, or as `choices` [batch, depth] after the tokens of a row: then one is committed, or with
    the row as `slate` [batch, depth] as many as were proposed right, and one. `first`: after a prompt. `room`:
    positions of a sequence's cache. `token` [batch, ...]: its first column gets the newest token. `lengths`: of the
    next round.
    """
    if texts.text.is_cuda:
        from autotune.kernels import rounds

        places = (lengths.used, lengths.places, lengths.positions, lengths.depths)
        state = rounds.State(*texts[:-1], *places)
        if news is None:
            assert choices is not None
            news = rounds.empty_news(choices)
        rounds.settle(state, news, depth, texts.new_tokens, room, first, choices, slate, token)
        return news
    if news is None:
        assert choices is not None
        news = torch.cat((torch.ones_like(choices), choices), dim=1) if slate is None else match_row(slate, choices)
    if not first:
        news[:, 0].mul_(texts.going_on)
    texts.take(news, depth, first)
    lengths.move(texts.filled)
    if token is not None:
        token[:, :1].copy_(texts.newest())
    return news
