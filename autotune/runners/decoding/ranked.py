"""How likely heads held what really came: of generated texts, place by place, the rank of each following token.

All of a text goes through the target at once, and each row through every head: what a row's heads say does not depend
on what was proposed, so these are the ranks that they had while the text was made, and would have under any tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autotune.planners.decoding.passes import heads_shape
from autotune.planners.decoding.ranks import word
from autotune.planners.lower.shape import Shape
from autotune.runners.decoding.seen import Ranker
from autotune.runners.frozen import Frozen
from autotune.runners.state import Loader
from autotune.spec.graph import blocks
from autotune.spec.heads_graph import features
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload


def rank_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """int64 [rows]: of each row of logits [rows, vocabulary] how many tokens come before its own in the order that
    proposals are taken in; of equal ones the first comes first."""
    own = logits.gather(1, tokens[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < tokens[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1)


def ranks_of(
    heads: Sequence[Ranker],
    plan: Plan,
    model: ModelSpec,
    workload: Workload,
    load: Loader,
    texts: Sequence[tuple[Sequence[int], int]],
    device: torch.device,
) -> Iterator[str]:
    """See planners.decoding.ranks, of each text, (its tokens, how many of them are the prompt): at each token of the
    answer that has as many after it as there are heads, the ranks of those."""
    inner = features(blocks(model))
    longest, many = max(len(tokens) for tokens, _ in texts), len(heads)
    shape = Shape(1, longest, longest, dtype=workload.precision, attention=plan.attention)
    target, each = Frozen.build(model, inner, shape, load, device), heads_shape(plan, workload).batch
    for tokens, prompt in texts:
        padded = torch.tensor([*tokens, *([0] * (longest - len(tokens)))], device=device)
        last = len(tokens) - many  # places whose following tokens are all there
        begin = range(prompt, max(prompt, last))
        if not begin:
            yield ""
            continue
        rows = target.rows(padded)[prompt - 1 : last - 1]
        by_head = []
        for number, head in enumerate(heads):
            logits = torch.cat([head(part) for part in _filled(rows, each)])[: len(begin)]
            by_head.append(rank_of(logits, padded[prompt + number + 1 :][: len(begin)]).tolist())
        yield "".join(word(place) for place in zip(*by_head, strict=True))


def _filled(rows: Tensor, each: int) -> Iterator[Tensor]:
    """So many rows at a time, as heads are compiled for; the last ones with copies of themselves."""
    for part in rows.split(each):
        yield torch.cat((part, part[-1:].expand(each - len(part), -1)))
