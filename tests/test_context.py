"""Ranks that share sequences: equal to the serial reference, with the bytes of the closed form, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.costs.works import flops, works
from autotune.planners.feasible import why_not
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.expand import coordinates, groups
from autotune.planners.lower.shape import Shape
from autotune.planners.space import Enumeration
from autotune.planners.validate import validate
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.work import Collective
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.prices import bare

LLAMA = ModelSpec("tiny-llama", "LlamaForCausalLM", 16, 4, 4, 4, 8, 24, 32, tied=True)
QWEN = ModelSpec("tiny-qwen", "Qwen3ForCausalLM", 24, 5, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
SLIDING = ModelSpec("tiny-mistral", "MistralForCausalLM", 16, 2, 8, 4, 4, 24, 32, window=3)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
CLIPPED = replace(WORK, clip=0.1)

EQUAL = [
    (QWEN, Plan(context=2, micro_batch=2, zero=1, recompute="full"), WORK),
    (SLIDING, Plan(context=2, micro_batch=2, attention="sdpa"), WORK),
    (LLAMA, Plan(context=4, attention="sdpa", zero=2, recompute="selective"), CLIPPED),
    (QWEN, Plan(context=2, tensor=2, sequence_parallel=True, recompute="selective"), WORK),
    (LLAMA, Plan(context=2, pipeline=2, attention="sdpa", zero=3, micro_batch=2), WORK),
    (QWEN, Plan(context=2, pipeline=2, vocabulary="vocab-2", offload=100), WORK),
    (LLAMA, Plan(context=2, pipeline=2, schedule="2bp-1f1b", weight_gradients="joined", recompute="full"), WORK),
    (LLAMA, Plan(data=2, context=2, zero=3, micro_batch=2), CLIPPED),
]


@pytest.mark.parametrize(("model", "plan", "work"), EQUAL, ids=[plan.describe() for _, plan, _ in EQUAL])
def test_plan_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    plan = replace(plan, attention="math") if plan.attention != "sdpa" or model.window else plan
    assert why_not(model, work, plan, plan.world) is None
    assert_equal(pool, model, plan, work)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(("tensor", "context"), [(1, 2), (2, 2), (1, 4)])
def test_bytes_and_work(policy: str, tensor: int, context: int) -> None:
    """Per layer and rank a forward sends (c - 1) / c of q, k, v and o for its tokens (2309.14509, section 3.2: 4 h s /
    c where all have as many heads); the backward as much, and a full recompute the forward's once more. The floating-
    point operations are those of one rank over `context`."""
    layer = blocks(QWEN)[1]
    alone, shared = (
        Shape(2, 8, 8, tensor, dtype="fp32"),
        Shape(2, 8 // context, 8, tensor, dtype="fp32", context=context),
    )
    body, one = lower_block(layer, shared, policy), lower_block(layer, alone, policy)
    features = 2 * (QWEN.heads + QWEN.kv_heads) * QWEN.head_dim // tensor
    once = shared.tokens * features * 4 * (context - 1) / context
    for program, whole, times in (
        (body.forward, one.forward, 1),
        (body.backward, one.backward, 2 if policy == "full" else 1),
    ):
        done = [w for i in program.ranks[0] for w in works(layer, body, i, shared) if isinstance(w, Collective)]
        assert sum(w.bytes for w in done if w.op == "all_to_all") == times * once
        assert {w.group for w in done if w.op == "all_to_all"} == {context}
        assert flops(layer, program, body, shared) == flops(layer, whole, one, alone) / context
    for program in (body.forward, body.backward, body.input_gradient, body.weight_gradient):
        kept = replace(program, facts={"leaves": True})
        validate(kept)
        validate(kept, inline=True)


def test_ranks_that_share_sequences_lie_inside_a_replica() -> None:
    plan = Plan(2, 2, 2, context=2)
    assert plan.world == 16 and plan.replicas == 4
    assert groups(plan, "tensor")[0] == (0, 1)
    assert groups(plan, "context")[:2] == [(0, 2), (1, 3)]
    assert groups(plan, "data")[0] == (0, 2, 4, 6)
    assert coordinates(plan, 13) == (1, 2, 1)


REFUSED = [
    (Plan(context=3), "context must divide sequence_length 8 (found 3; nearest 2)"),
    (Plan(context=8), "context must divide heads of a tensor rank 4 (found 8; nearest 4)"),
    (Plan(context=4, tensor=2), "context must divide heads of a tensor rank 2 (found 4; nearest 2)"),
    (Plan(context=0), "every degree must be at least 1"),
    (
        Plan(context=4, tensor=2, sequence_parallel=True, micro_batch=8),
        "context must divide heads of a tensor rank 2 (found 4; nearest 2)",
    ),
]


@pytest.mark.parametrize(("plan", "reason"), REFUSED)
def test_what_cannot_be_shared_is_refused(plan: Plan, reason: str) -> None:
    assert why_not(LLAMA, WORK, plan) == reason


def test_generation_does_not_share_sequences() -> None:
    asked = Workload("generate", prompt_length=8, new_tokens=8, precision="fp64")
    reason = "context has no meaning when generating (found 2; nearest 1)"
    assert why_not(LLAMA, asked, Plan(context=2)) == reason


def test_long_sequences_are_shared_unasked() -> None:
    """And others where the recipe says so."""
    for length, axes, expected in (
        (4096, {}, {1}),
        (8192, {}, {1, 2, 4}),
        (4096, {"context": (2,)}, {2}),
        (8192, {"context": (1,)}, {1}),
    ):
        work = replace(WORK, sequence_length=length, precision="bf16")
        listed = list(Enumeration(Question(LLAMA, work, bare(), 4, axes)))
        assert {plan.context for plan in listed} == expected
        assert all(plan.world == 4 for plan in listed)
