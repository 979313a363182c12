"""What heads propose, refined by the text so far (after Kim et al., 2404.09221, 4.2: n-gram rescoring of the lattice).

Heads guess without seeing one another, so that their likeliest tokens may not go together. Of the likeliest few of each
head, a lattice, the path is proposed that the text's own pairs of tokens make likeliest: after token a, token b has

    (count(a b) + PRIOR p(b)) / (count(a) + PRIOR)

with p the head's own probability: what a head says counts as much as PRIOR tokens of text (a Dirichlet prior), so that
pairs which the text does not have leave the heads' word as it is. Counts are of the prompt and the answer so far, made
anew each round: no table is kept, and everything has one shape, as a captured round needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR = 4.0  # tokens of text that a head's word is worth


def pairs(text: Tensor, filled: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(how often each `after` follows each `before` [batch, many, more], how often each `before` is followed by any
    token [batch, many]) in texts int64 [batch, columns] whose newest tokens are at `filled` [batch]; `before` int64
    [batch, many], `after` int64 [batch, more]."""
    here = torch.arange(text.shape[1] - 1, device=text.device) < filled[:, None]
    first = ((text[:, None, :-1] == before[:, :, None]) & here[:, None]).float()
    second = (text[:, None, 1:] == after[:, :, None]).float()
    return first @ second.transpose(1, 2), first.sum(dim=2)


def best_path(text: Tensor, filled: Tensor, newest: Tensor, tokens: Tensor, p: Tensor) -> Tensor:
    """int64 [batch, heads]: the likeliest path through the lattice `tokens` int64 [batch, heads, many], of which the
    heads hold each as likely as `p` [batch, heads, many], after the `newest` tokens int64 [batch, 1] (Viterbi)."""
    before, score = newest, torch.zeros_like(p[:, 0, :1])
    came: list[Tensor] = []
    for head in range(tokens.shape[1]):
        both, alone = pairs(text, filled, before, tokens[:, head])
        step = (both + PRIOR * p[:, head, None]) / (alone + PRIOR)[:, :, None]
        score, place = (score[:, :, None] + step.log()).max(dim=1)
        came.append(place)
        before = tokens[:, head]
    at = score.argmax(dim=1, keepdim=True)
    path: list[Tensor] = []
    for head in reversed(range(tokens.shape[1])):
        path.append(tokens[:, head].gather(1, at))
        at = came[head].gather(1, at)
    return torch.cat(path[::-1], dim=1)
