"""Speculative sampling and typical acceptance in one process, token by token and without caches: what `commit =
"rejection"` and `"typical"` are compared with.

Written to be obviously Leviathan et al.'s algorithm 1 (2211.17192) and Medusa's section 2.3.1 (2401.10774), and to
share no code with what it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, log

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


Choice = Callable[[Sequence[int]], tuple[int, float]]  # a text -> the target's token after it, and how sure that is
# A text -> of each head its tokens, the likeliest first, and how far each is from changing places with the next one.
Ranked = Callable[[Sequence[int]], Sequence[Sequence[tuple[int, float]]]]


def typical(
    target: Chances,
    choose: Choice,
    ranked: Ranked,
    prompt: Sequence[int],
    new_tokens: int,
    parents: Sequence[int],
    epsilon: float,
    delta: float,
) -> tuple[list[int], list[float]]:
    """The answer to one prompt where each round proposes a tree of what heads hold likely, given by the parents of its
    nodes, and keeps the longest path of tokens that are likely enough; and of each token how near what decided about it
    was to deciding otherwise. Every path is run as a text of its own."""
    text = list(prompt)
    token, room = choose(text)
    text.append(token)
    slack = [room]
    while len(text) - len(prompt) < new_tokens:
        guesses, near = ranked(text), list[float]()
        paths: dict[int, list[int]] = {0: []}  # of the nodes that are kept: their tokens from the root's child on
        scores, seen = {0: 0.0}, dict[int, int]()
        known: dict[int, Tensor] = {}
        for node, parent in enumerate(parents, 1):
            rank = seen.get(parent, 0)  # how many of its siblings came before
            seen[parent] = rank + 1
            if parent not in paths:
                continue
            token, room = guesses[len(paths[parent])][rank]
            near.append(room)
            if parent not in known:
                known[parent] = target(torch.tensor(text + paths[parent]))[-1]
            p = known[parent]
            entropy = -sum(share * log(share) for share in p.tolist() if share > 0)
            least = min(epsilon, delta * exp(-entropy))
            near.append(abs(float(p[token]) - least))
            if float(p[token]) > least:
                paths[node] = [*paths[parent], token]
                scores[node] = scores[parent] + log(float(p[token]))
        deepest = max(map(len, paths.values()))
        longest = [node for node, path in paths.items() if len(path) == deepest]
        best = max(longest, key=lambda node: scores[node])  # of equal ones the first
        near += [scores[best] - scores[node] for node in longest if node != best]
        token, room = choose(text + paths[best])
        text += [*paths[best], token]
        slack += [min(near, default=1.0)] * deepest + [min([room, *near])]
    return text[len(prompt) :][:new_tokens], slack[:new_tokens]
