"""Speculative sampling in one process, token by token and without caches: what `commit = "rejection"` is compared with.

Written to be obviously Leviathan et al.'s algorithm 1 (2211.17192) and to share no code with what it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Chances = Callable[[Tensor], Tensor]  # tokens int64 [n] -> probabilities [n, vocabulary] of the token after each
# A text and what is drafted after it so far -> probabilities [vocabulary] of the next draft.
Drafts = Callable[[Sequence[int], Sequence[int]], Tensor]


def one_by_one(draft: Chances) -> Drafts:
    """Each after those before it."""
    return lambda text, drafted: draft(torch.tensor([*text, *drafted]))[-1]


def at_once(draft: Chances, mask: Callable[[int], int]) -> Drafts:
    """Each after masks, `mask(place)` from place 0, whatever was drafted there."""
    return lambda text, drafted: draft(torch.tensor([*text, *map(mask, range(len(drafted)))]))[-1]


def _draw(p: Tensor, number: float) -> tuple[int, float]:
    """The token whose share of [0, 1) holds the number, and how far that is from the share's nearer edge."""
    begin = 0.0
    for token, share in enumerate(p.tolist()):
        if number < begin + share:
            return token, min(number - begin, begin + share - number)
        begin += share
    return int(p.nonzero()[-1]), 0.0


def speculative(
    target: Chances,
    draft: Drafts,
    prompt: Sequence[int],
    new_tokens: int,
    length: int,
    numbers: Mapping[str, Sequence[float]],
) -> tuple[list[int], list[float]]:
    """The answer to one prompt where `length` tokens a round are drafted, and of each token how far the numbers that
    decided about it were from deciding otherwise. `numbers` by purpose ("draft", "accept", ""), one a token."""
    text, slack = list(prompt), list[float]()

    def number(purpose: str, ahead: int) -> float:
        return numbers[purpose][min(len(text) - len(prompt) + ahead, new_tokens - 1)]

    token, room = _draw(target(torch.tensor(text))[-1], number("", 0))
    text.append(token)
    slack.append(room)
    while len(text) - len(prompt) < new_tokens:
        drafted, q, edges = list[int](), list[Tensor](), list[float]()
        for ahead in range(length):
            q.append(draft(text, drafted))
            token, room = _draw(q[-1], number("draft", ahead))
            drafted.append(token)
            edges.append(room)
        p = target(torch.tensor(text + drafted))[-length - 1 :]
        kept, news = list[int](), list[float]()
        for ahead, token in enumerate(drafted):
            share = float(p[ahead, token] / q[ahead][token])
            accept = number("accept", ahead)
            if accept < share:
                kept.append(token)
                news.append(min(share - accept, edges[ahead]))
                continue
            rest = (p[ahead] - q[ahead]).clamp_min(0)
            token, room = _draw(rest / rest.sum(), number("", ahead))
            kept.append(token)
            news.append(min(accept - share, edges[ahead], room))
            break
        else:
            token, room = _draw(p[length], number("", length))
            kept.append(token)
            news.append(room)
        text += kept
        slack += news
    return text[len(prompt) :][:new_tokens], slack[:new_tokens]
