"""Answers to prompts of different lengths, greedy or drawn, until they end: the same under every plan."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from autotune.runners.reference import reference_generate
from autotune.runners.sampling import drawn, draws
from autotune.spec.plan import FUSED, Plan
from autotune.spec.workload import Workload
from tests.pool import Pool
from tests.tasks import random_prompts
from tests.test_generation import MODELS, WORK, lively

LENGTHS = (7, 3, 1, 6, 7, 2, 5, 4)
SAMPLED = replace(WORK, temperature=0.8, top_k=40, top_p=0.95)
CASES = [
    ("llama", Plan(), WORK),
    ("window", Plan(attention="math"), WORK),
    ("qwen", Plan(tensor=2, pipeline=2), WORK),
    ("window", Plan(data=2), WORK),
    ("qwen", Plan(kernels=FUSED), SAMPLED),
    ("llama", Plan(tensor=2), SAMPLED),
    ("llama", Plan(data=2, tensor=2), SAMPLED),
    ("llama", Plan(pipeline=2), SAMPLED),
    ("window", Plan(prompt_chunk=3), WORK),
    ("qwen", Plan(prompt_chunk=2, pipeline=2), SAMPLED),
    ("llama", Plan(prompt_chunk=3, data=2, decoding="jacobi", speculate=3), WORK),
    ("qwen", Plan(prompt_chunk=3, pipeline=2, decoding="ngram", speculate=2, match=1, branches=2), WORK),
]


@lru_cache
def expected(name: str, work: Workload, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Each prompt continued alone by the reference."""
    model, whole, numbers = (
        MODELS[name],
        random_prompts(work, MODELS[name].vocab),
        draws(3, 0, work.batch, work.new_tokens),
    )
    found = []
    for row, length in enumerate(lengths):
        own = numbers[row]

        def choose(logits: torch.Tensor, step: int, own: torch.Tensor = own) -> torch.Tensor:
            return drawn(logits, own[step : step + 1], work) if work.temperature else logits.argmax(-1)

        prompt = whole[row : row + 1, :length]
        made = reference_generate(model, lively(model, "fp64"), prompt, work.new_tokens, torch.float64, choose)
        found.append(made[0].tolist())
    return found


@pytest.mark.parametrize(("name", "plan", "work"), CASES, ids=lambda case: getattr(case, "describe", lambda: "")())
def test_answers_are_the_references(pool: Pool, name: str, plan: Plan, work: Workload) -> None:
    for answers, _ in pool.run("answer", plan.world, plan=plan, model=MODELS[name], workload=work, lengths=LENGTHS):
        assert answers == expected(name, work)


def test_draws_are_no_likeliest_tokens() -> None:
    """Otherwise the cases above would say nothing about drawing."""
    greedy, drawn_ = expected("llama", WORK), expected("llama", SAMPLED)
    assert sum(a != b for a, b in zip(greedy, drawn_, strict=True)) >= 4


@pytest.mark.parametrize("plan", [Plan(), Plan(tensor=2, pipeline=2), Plan(data=2)], ids=lambda plan: plan.describe())
def test_it_stops_when_all_have_ended(pool: Pool, plan: Plan) -> None:
    whole = expected("llama", WORK)
    until = tuple(row[number % 4] for number, row in enumerate(whole))
    ends = [1 + row.index(token) for row, token in zip(whole, until, strict=True)]
    each = WORK.batch // plan.data
    steps = [max(ends[number // each * each :][:each]) for number in range(WORK.batch)]  # a replica stops by itself
    assert all(1 < step < WORK.new_tokens for step in steps)
    for answers, _ in pool.run(
        "answer", plan.world, plan=plan, model=MODELS["llama"], workload=WORK, lengths=LENGTHS, until=until
    ):
        assert answers == [row[:step] for row, step in zip(whole, steps, strict=True)]
    never = (-1,) * WORK.batch
    for answers, _ in pool.run(
        "answer", plan.world, plan=plan, model=MODELS["llama"], workload=WORK, lengths=LENGTHS, until=never
    ):
        assert answers == whole
