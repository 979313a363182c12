"""Any plan generates the reference's tokens, and runs as its program says; what cannot be generated is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import lower_generation
from autotune.planners.resolve import resolve
from autotune.planners.simulate import memory
from autotune.planners.validate import validate
from autotune.runners import tokens as text
from autotune.runners.generation import Generator
from autotune.runners.prompts import Prompts, prompt_tokens
from autotune.runners.reference import reference_generate, reference_logits
from autotune.spec.errors import InfeasibleError, UsageError
from autotune.spec.graph import Weight, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import FUSED, Plan
from autotune.spec.workload import Workload
from tests.pool import Pool
from tests.tasks import lively_weight, random_prompts

LLAMA = ModelSpec("tiny-llama", "LlamaForCausalLM", 16, 4, 4, 4, 8, 24, 272, tied=True, max_positions=64)
QWEN = ModelSpec("tiny-qwen", "Qwen3ForCausalLM", 24, 5, 8, 4, 4, 32, 260, qkv_bias=True, qk_norm=True)
WINDOW = replace(QWEN, name="tiny-window", window=6)
MODELS = {"llama": LLAMA, "qwen": QWEN, "window": WINDOW}
WORK = Workload("generate", precision="fp64", prompt_length=7, new_tokens=6, batch=8)

CASES = [
    ("llama", Plan()),
    ("qwen", Plan(attention="math")),
    ("window", Plan(attention="math")),
    ("llama", Plan(data=2)),
    ("llama", Plan(tensor=2)),
    ("llama", Plan(pipeline=2)),
    ("qwen", Plan(tensor=2, attention="math")),
    ("qwen", Plan(pipeline=2)),
    ("llama", Plan(tensor=4)),
    ("qwen", Plan(tensor=4)),
    ("llama", Plan(pipeline=4)),
    ("qwen", Plan(pipeline=4)),
    ("llama", Plan(data=4)),
    ("qwen", Plan(tensor=2, pipeline=2)),
    ("llama", Plan(tensor=2, pipeline=2)),
    ("window", Plan(tensor=2, pipeline=2)),
    ("llama", Plan(data=2, tensor=2)),
    ("qwen", Plan(data=2, pipeline=2)),
    ("llama", Plan(kernels=FUSED)),
    ("window", Plan(kernels=FUSED, attention="math")),
    ("qwen", Plan(kernels=FUSED, tensor=2, pipeline=2)),
    ("llama", Plan(prompt_chunk=3)),
    ("window", Plan(prompt_chunk=2, tensor=2, attention="math")),
    ("qwen", Plan(prompt_chunk=4, pipeline=2)),
    ("llama", Plan(prompt_chunk=1, tensor=2, pipeline=2)),
]


def lively(model: ModelSpec, precision: str) -> dict[Any, torch.Tensor]:
    """Every weight, whole."""
    return {(b.index, w.name): lively_weight(w, precision) for b in blocks(model) for w in b.weights()}


@lru_cache
def expected(name: str, precision: str, batch: int, length: int) -> list[list[int]]:
    """The reference's tokens."""
    model, work = MODELS[name], replace(WORK, precision=precision, batch=batch, prompt_length=length)
    prompts = random_prompts(work, model.vocab)
    found = reference_generate(model, lively(model, precision), prompts, work.new_tokens, torch.float64)
    return found.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "plan"), CASES, ids=lambda case: getattr(case, "describe", lambda: case)())
def test_a_plan_generates_the_reference_tokens(pool: Pool, name: str, plan: Plan) -> None:
    model = MODELS[name]
    answers = pool.run("generate", plan.world, plan=plan, model=model, workload=WORK)
    tokens = expected(name, WORK.precision, WORK.batch, WORK.prompt_length)
    assert len({token for row in tokens for token in row}) >= 16  # what came before counts: few repeat themselves
    for answer in answers:
        assert answer["tokens"] == tokens
    passes = (WORK.prompt_length,) * 2, (1, WORK.prompt_length + WORK.new_tokens - 1)
    for number, (queries, keys) in enumerate(passes):
        program = expand(lower_generation(plan, model, WORK, queries, keys), plan)
        validate(program)
        resolve(program, inline=True)
        predicted = memory(program, lambda rank, instruction: 0)
        for rank, answer in enumerate(answers):
            order, held = answer["traces"][number]
            assert order == [i.label for i in program.ranks[rank]]
            assert held == predicted[rank]["device"]


@pytest.mark.parametrize(
    ("name", "plan", "change"),
    [
        ("llama", Plan(tensor=2), {"precision": "fp32"}),
        ("qwen", Plan(tensor=2, pipeline=2), {"precision": "fp32"}),
        ("qwen", Plan(pipeline=2), {"prompt_length": 1}),
        ("llama", Plan(tensor=2, pipeline=2), {"prompt_length": 1, "batch": 2}),
        ("llama", Plan(data=2), {"new_tokens": 1}),
    ],
    ids=lambda case: str(getattr(case, "id", case)),
)
def test_other_precisions_and_lengths(pool: Pool, name: str, plan: Plan, change: dict[str, Any]) -> None:
    work = replace(WORK, **change)
    answers = pool.run("generate", plan.world, plan=plan, model=MODELS[name], workload=work)
    whole = expected(name, work.precision, work.batch, work.prompt_length)
    for answer in answers:
        assert answer["tokens"] == [row[: work.new_tokens] for row in whole]


def build(model: ModelSpec, work: Workload, plan: Plan | None = None) -> Generator:
    """A generator of this process alone."""
    load = lambda index, weight: lively_weight(weight, work.precision)  # noqa: E731
    return Generator.build(plan or Plan(), model, work, 0, torch.device("cpu"), load)


def test_bf16_picks_what_is_likeliest() -> None:
    """In bf16 near ties may fall either way: each token's logit is the reference's best but for rounding."""
    work = replace(WORK, precision="bf16", batch=2)
    prompts = random_prompts(work, LLAMA.vocab)
    made = build(LLAMA, work).generate(Prompts(prompts, (7, 7))).tokens
    weights = lively(LLAMA, "bf16")
    logits = reference_logits(LLAMA, weights, torch.cat((prompts, made), dim=1), torch.float32)
    rows = logits[:, work.prompt_length - 1 : -1]
    short = rows.max(-1).values - rows.gather(2, made.unsqueeze(2)).squeeze(2)
    assert float(short.max()) < 0.05 * float(rows.std())


def test_prompts_are_real_text_unless_given() -> None:
    work = replace(WORK, batch=2, prompt_length=16)
    found = prompt_tokens(LLAMA, work).tokens
    assert found.shape == (2, 16)
    assert found[0].tolist() != found[1].tolist()
    assert all(character.isprintable() or character in "\n\t" for character in text.decode(found[0].tolist()))
    given, lengths, _ = prompt_tokens(LLAMA, replace(work, prompt_length=8), ["naïve", "è"])
    assert lengths == (6, 2) and given[1, :2].tolist() == list("è".encode())
    given = prompt_tokens(LLAMA, replace(work, prompt_length=6), ["naïve"]).tokens
    assert given.tolist() == [list("naïve".encode())] * 2
    assert text.decode(given[0].tolist()) == "naïve"
    assert text.decode([104, 105, 300, 0xC3]) == "hi\ufffd\ufffd"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["", "abcdefg"], "prompt 1 of 2: found an empty prompt"),
        (["abcdefg", "abcdefgh"], "prompt 2 of 2: found 8 bytes; expected at most 7 (prompt_length)"),
        (["x" * 40, "abcdefg"], "the cache has room for 13 tokens (nearest: prompt_length = 40)"),
        (["abc\udcffefg", "abcdefg"], "prompt 1 of 2: found '\\udcff' at character 3; expected valid UTF-8"),
        (["abcdefg"] * 3, "found 3 prompts; expected 1, or as many as the batch: 2 (nearest: 2)"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        text.encode(prompts, LLAMA, replace(WORK, batch=2))
    assert said in str(caught.value)


def test_text_needs_every_byte() -> None:
    with pytest.raises(UsageError, match=r"100; expected.*at least 256"):
        prompt_tokens(replace(LLAMA, vocab=100), WORK, ["abcdefg"])
    with pytest.raises(UsageError, match=r"100; expected.*at least 256"):
        prompt_tokens(replace(LLAMA, vocab=100), WORK)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_length": 60}, "expected at most the 64 positions of tiny-llama (nearest: 4)"),
        ({"prompt_length": 70}, "prompt_length: found 70 tokens; expected at most the 64 positions"),
        ({"prompt_length": 0}, "prompt_length: found 0; expected at least 1 (nearest: 1)"),
        ({"new_tokens": 0}, "new_tokens: found 0; expected at least 1"),
    ],
)
def test_lengths_are_refused_before_a_weight_is_read(change: dict[str, Any], said: str) -> None:
    def load(index: int, weight: Weight) -> torch.Tensor:
        raise AssertionError("a weight was read")

    with pytest.raises(UsageError) as caught:
        Generator.build(Plan(), LLAMA, replace(WORK, **change), 0, torch.device("cpu"), load)
    assert said in str(caught.value)


def test_plans_that_cannot_run_are_refused_before_a_weight_is_read() -> None:
    def load(index: int, weight: Weight) -> torch.Tensor:
        raise AssertionError("a weight was read")

    for plan, error, said in (
        (Plan(data=3), InfeasibleError, "must divide batch 8 (found 3; nearest 2)"),
        (Plan(kernels="fusd"), InfeasibleError, "kernels 'fusd' is unknown (nearest fused)"),
        (Plan(kernels=FUSED, data=1, micro_batch=80), InfeasibleError, "must divide batch 8 (found 80; nearest 8)"),
        (Plan(kernels=FUSED, micro_batch=8, decoding="jacobi", speculate=8), InfeasibleError, "at a time (found 72"),
        (Plan(attention="flash"), UsageError, "needs a CUDA device, not cpu"),
        (Plan(attention="flsh"), UsageError, "expected one of"),
    ):
        assert (why_not(LLAMA, WORK, plan) is not None) == (error is InfeasibleError)
        with pytest.raises(error) as caught:
            Generator.build(plan, LLAMA, WORK, 0, torch.device("cpu"), load)
        assert said in str(caught.value)


def test_tokens_that_the_model_does_not_have() -> None:
    generator = build(LLAMA, replace(WORK, batch=2))
    with pytest.raises(UsageError, match=r"found \[2, 5\]; expected \[batch, prompt_length\] = \[2, 7\]"):
        generator.generate(Prompts(torch.zeros((2, 5), dtype=torch.int64), (5, 5)))
    with pytest.raises(UsageError, match=r"lengths: found \[7, 8\]; expected 2 from 1 to 7"):
        generator.generate(Prompts(torch.zeros((2, 7), dtype=torch.int64), (7, 8)))
    with pytest.raises(UsageError, match="found token ids from 0 to 272; expected 0 to 271"):
        generator.generate(Prompts(torch.tensor([[0] * 7, [272] * 7]), (7, 7)))


def test_a_corpus_shorter_than_a_prompt(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(UsageError, match="too short"):
        prompt_tokens(LLAMA, replace(WORK, data=str(short)))
