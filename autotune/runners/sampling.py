"""How the next token of each sequence is chosen from its logits: the likeliest, or one drawn by its probability.

A draw is a number in [0, 1) that was made beforehand from the seed, the sequence and the step, so that an answer is the
same whatever the plan, the other sequences beside it, and whether the step is replayed from a graph.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from autotune.runners.ops.env import wide
from autotune.spec.workload import Workload

MOST_PARTS = 256  # of a row of logits whose largest are found at the same time


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row [rows, vocabulary] and its place, of equal ones the first. In two steps where the
    vocabulary divides: a row alone would keep one of a device's processors busy and leave the others idle."""
    rows, vocabulary = logits.shape
    parts = math.gcd(vocabulary, MOST_PARTS)
    best, place = logits.view(rows, parts, -1).max(dim=2)
    top, part = best.max(dim=1)
    return top, part * (vocabulary // parts) + place.gather(1, part[:, None]).squeeze(1)


def distribution(logits: Tensor, workload: Workload) -> Tensor:
    """Probabilities [rows, vocabulary] of the logits at the workload's temperature, zero outside its `top_k` likeliest
    tokens and outside the fewest that together have `top_p` (nucleus sampling, Holtzman et al., 1904.09751, 3.1). Both
    cuts are made in the whole distribution; what is left sums to one."""
    p = logits.to(wide(logits.dtype)).div(workload.temperature).softmax(dim=1)
    if workload.top_k or workload.top_p < 1:
        ordered, tokens = p.sort(dim=1, descending=True, stable=True)
        kept = ordered.cumsum(dim=1) - ordered < workload.top_p
        if workload.top_k:
            kept[:, workload.top_k :] = False
        p = torch.zeros_like(p).scatter_(1, tokens, ordered * kept)
    return p / p.sum(dim=1, keepdim=True)


def drawn(logits: Tensor, draws: Tensor, workload: Workload) -> Tensor:
    """int64 [rows]: of each row of logits [rows, vocabulary] the token whose share of [0, 1) holds its draw [rows].
    Shares lie in the vocabulary's order: whatever is nearly as likely, a rounding moves none of them far."""
    return draw(distribution(logits, workload), draws[:, None]).squeeze(1)


def draw(p: Tensor, numbers: Tensor) -> Tensor:
    """int64 [rows, 1]: of probabilities [rows, vocabulary] the token whose share of [0, 1), in the vocabulary's order,
    holds the number [rows, 1]."""
    place = (p.cumsum(dim=1) <= numbers.to(p.dtype)).sum(dim=1, keepdim=True)
    last = (
        p.shape[1] - 1 - (p > 0).flip(1).long().argmax(dim=1, keepdim=True)
    )  # its share may end below 1 by a rounding
    return torch.minimum(place, last)


def shares(logits: Tensor, tokens: Tensor, workload: Workload) -> tuple[Tensor, Tensor]:
    """Begin and end in [0, 1), each [rows], of the share that `tokens` [rows] have."""
    p = distribution(logits, workload)
    end = p.cumsum(dim=1).gather(1, tokens[:, None]).squeeze(1)
    return end - p.gather(1, tokens[:, None]).squeeze(1), end


def draws(seed: int, first: int, sequences: int, steps: int, stream: str = "") -> Tensor:
    """float64 [sequences, steps] in [0, 1): of the sequences from number `first` on, each with numbers of its own; in
    another `stream` they are others."""
    rows = []
    for number in range(first, first + sequences):
        key = hashlib.sha256(f"{seed}:{number}{stream}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
