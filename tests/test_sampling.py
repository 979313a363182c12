"""Tokens are drawn with exactly their probabilities, and answers end where a text says so."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from autotune.runners.sampling import distribution, drawn, draws, likeliest, shares
from autotune.runners.stops import LENGTH, STOP, cut, ended
from autotune.spec.workload import Workload

LOGITS = torch.tensor([[1.0, 3.0, 0.5, 2.0, 3.0, -1.0]], dtype=torch.float64)


def formula(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The same distribution by its definition, one token after another."""
    weights = [math.exp(float(x) / temperature) for x in LOGITS[0]]
    p = [w / sum(weights) for w in weights]
    kept, mass = list[int](), 0.0
    for token in sorted(range(len(p)), key=lambda t: (-p[t], t)):
        if mass >= top_p or (top_k and len(kept) == top_k):
            break
        kept.append(token)
        mass += p[token]
    return [p[t] / mass if t in kept else 0.0 for t in range(len(p))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.75), (2.0, 4, 0.6), (1.0, 0, 1e-9)],
)
def test_probabilities_are_the_definitions(temperature: float, top_k: int, top_p: float) -> None:
    work, wanted = Workload("generate", temperature=temperature, top_k=top_k, top_p=top_p), formula
    p = distribution(LOGITS, work)
    assert p[0].tolist() == pytest.approx(wanted(temperature, top_k, top_p), abs=1e-12)
    # The whole of [0, 1) enumerated: each token's share is as long as its probability, and holds its draws.
    cuts = sorted({0.0, 1.0, *p.cumsum(1)[0].tolist()})
    mass = torch.zeros(6, dtype=torch.float64)
    for begin, end in pairwise(cuts):
        if end - begin < 1e-12:
            continue
        inside = torch.tensor([begin + 1e-13, (begin + end) / 2, end - 1e-13], dtype=torch.float64)
        token = drawn(LOGITS.expand(3, -1), inside, work)
        assert len(set(token.tolist())) == 1
        mass[token[0]] += end - begin
        low, high = shares(LOGITS, token[:1], work)
        assert (float(low), float(high)) == pytest.approx((begin, end), abs=1e-12)
    assert mass.tolist() == pytest.approx(wanted(temperature, top_k, top_p), abs=1e-11)


def test_draws_are_uniform_and_of_the_sequence_alone() -> None:
    """Chi-square of tokens drawn by the streams that answers are drawn by: 5 degrees of freedom, 0.1 % in the tail."""
    numbers = draws(5, 0, 40, 500)
    work = Workload("generate", temperature=1.5)
    tokens = drawn(LOGITS.expand(20_000, -1), numbers.flatten(), work)
    p = torch.tensor(formula(1.5, 0, 1.0))
    seen = torch.bincount(tokens, minlength=6)
    assert float(((seen - 20_000 * p).square() / (20_000 * p)).sum()) < 20.5
    assert torch.equal(draws(5, 7, 3, 500), numbers[7:10]) and not torch.equal(draws(6, 0, 1, 500), numbers[:1])
    assert torch.equal(draws(5, 0, 2, 100), numbers[:2, :100])
    assert int(drawn(LOGITS, torch.tensor([1 - 1e-16], dtype=torch.float64), work)) == 5
    nucleus = Workload("generate", temperature=1.0, top_k=3)
    assert int(drawn(LOGITS, torch.tensor([1 - 1e-16], dtype=torch.float64), nucleus)) == 4, "the last that is possible"


@pytest.mark.parametrize("vocabulary", [272, 97, 1024])
def test_the_likeliest_token_is_the_first_of_equal_ones(vocabulary: int) -> None:
    logits = torch.randint(6, (16, vocabulary)).float()  # many share the largest
    best, token = likeliest(logits)
    assert best.tolist() == logits.max(dim=1).values.tolist()
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_an_answer_ends_before_its_stop() -> None:
    def bytes_of(text: str) -> list[int]:
        return list(text.encode())

    assert cut(bytes_of("def f():\n\nclass"), ["\n\n", "class"]) == (bytes_of("def f():"), STOP)
    assert cut(bytes_of("abc"), ["d", "bcd"]) == (bytes_of("abc"), LENGTH)
    assert cut(bytes_of("xab"), ["b", "ab"]) == (bytes_of("x"), STOP), "the longer of two at one place"
    assert cut(bytes_of("grün"), ["ü"]) == (bytes_of("gr"), STOP)
    assert cut([97, 300, 98], ["ab"]) == ([97, 300, 98], LENGTH), "a token that is no byte parts texts"
    assert ended([bytes_of("a."), bytes_of(".")], ["."]) and not ended([bytes_of("a."), bytes_of("a")], ["."])
