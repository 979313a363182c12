"""How answers of a plan that changes results differ from those of plain decoding, by what the model itself says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from autotune.runners.reference import Weights, reference_logits
from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class Drift:
    """`equal`: share of tokens that stand where plain decoding has the same one. `first`: the median over answers that
    differ, `differing` of `answers`, of how many tokens come before the first other one; the length where none does.
    `log_p` and `plain_log_p`: the mean log-probability of a token under the model, of these answers and of plain
    decoding's."""

    answers: int
    differing: int
    equal: float
    first: float
    log_p: float
    plain_log_p: float


def drift(
    model: ModelSpec,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    plain: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> Drift:
    """Of answers to prompts, and plain decoding's, all token ids."""
    same = [[x == y for x, y in zip(a, b, strict=False)] for a, b in zip(ours, plain, strict=True)]
    firsts = [row.index(False) for row in same if not all(row)]

    def mean(answers: Sequence[Sequence[int]]) -> float:
        told = [_log_p(model, weights, p, a, dtype) for p, a in zip(prompts, answers, strict=True) if a]
        return float(torch.cat(told).mean())

    tokens = [one for row in same for one in row]
    first = median(firsts) if firsts else max(map(len, same), default=0)
    return Drift(len(ours), len(firsts), sum(tokens) / max(1, len(tokens)), float(first), mean(ours), mean(plain))


def _log_p(
    model: ModelSpec, weights: Weights, prompt: Sequence[int], answer: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """[tokens of the answer]: the log-probability of each."""
    tokens = torch.tensor([*prompt, *answer])
    log_p = reference_logits(model, weights, tokens[None, :-1], dtype)[0].log_softmax(-1)
    return log_p[len(prompt) - 1 :].gather(1, tokens[len(prompt) :, None]).squeeze(1)
