"""Proposals of heads refined by the text so far: the best path is that of enumeration, pairs are counted rightly."""

from __future__ import annotations

from itertools import pairwise, product
from math import log

import pytest
import torch

from autotune.planners.decoding.strategies import acceptance_key, tells_ranks
from autotune.runners.decoding.refine import PRIOR, best_path, pairs
from autotune.spec.plan import Plan


def counted(text: list[int], a: int, b: int | None) -> int:
    return sum(x == a and b in (None, y) for x, y in pairwise(text))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_path_is_that_of_enumeration(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, many, columns = 3, 3, 4, 40
    text = torch.randint(6, (batch, columns), generator=generator)
    filled = torch.randint(10, columns, (batch,), generator=generator)
    p = torch.rand((batch, heads, many), generator=generator, dtype=torch.float64)
    p = (p / p.sum(dim=2, keepdim=True)).sort(dim=2, descending=True).values
    each = [torch.randperm(6, generator=generator)[:many] for _ in range(batch * heads)]
    tokens = torch.stack(each).view(batch, heads, many)
    newest = text.gather(1, filled[:, None])
    found = best_path(text, filled, newest, tokens, p)
    other = 0
    for row in range(batch):
        so_far = text[row, : int(filled[row]) + 1].tolist()

        def score(path: tuple[int, ...], row: int = row, so_far: list[int] = so_far) -> float:
            total, before = 0.0, so_far[-1]
            for head, place in enumerate(path):
                token = int(tokens[row, head, place])
                share = counted(so_far, before, token) + PRIOR * float(p[row, head, place])
                total += log(share / (counted(so_far, before, None) + PRIOR))
                before = token
            return total

        best = max(product(range(many), repeat=heads), key=score)
        assert found[row].tolist() == [int(tokens[row, head, place]) for head, place in enumerate(best)]
        other += any(best)
    assert other, "some of it is not what the heads hold likeliest"


def test_pairs_are_those_of_the_text_so_far() -> None:
    text = torch.tensor([[1, 2, 1, 2, 3, 1, 2, 9, 9], [4, 4, 4, 4, 1, 2, 0, 0, 0]])
    both, alone = pairs(text, torch.tensor([5, 3]), torch.tensor([[1, 2], [4, 1]]), torch.tensor([[2, 3], [4, 2]]))
    assert both.tolist() == [[[2, 0], [0, 1]], [[3, 0], [0, 0]]]
    assert alone.tolist() == [[2, 2], [3, 0]]


def test_a_text_that_says_nothing_leaves_the_heads_word() -> None:
    tokens = torch.tensor([[[3, 1, 2], [5, 4, 0]]])
    p = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]], dtype=torch.float64)
    text, filled = torch.tensor([[7, 8, 9, 9]]), torch.tensor([2])
    assert best_path(text, filled, torch.tensor([[9]]), tokens, p).tolist() == [[3, 5]]


def test_an_acceptance_is_of_the_refined_row_alone() -> None:
    plan = Plan(decoding="heads", speculate=3, refine="ngram")
    assert acceptance_key(plan) == "heads speculate=3 refine=ngram" and not tells_ranks(plan)
    assert acceptance_key(plan.altered(refine="none")) == "heads" and tells_ranks(plan.altered(refine="none"))
