"""Any plan gives the serial loss, gradients and updated weights; and runs as its program says."""

from __future__ import annotations

import random

import pytest

from autotune.planners.feasible import why_not
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool

LLAMA = ModelSpec("tiny-llama", "LlamaForCausalLM", 16, 4, 4, 4, 8, 24, 32, tied=True)
QWEN = ModelSpec("tiny-qwen", "Qwen3ForCausalLM", 24, 5, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
MIXTRAL = ModelSpec("tiny-mixtral", "MixtralForCausalLM", 16, 4, 4, 4, 8, 24, 32, experts=Experts(4, 2, 12))
SPARSE = ModelSpec(
    "tiny-qwen-moe",
    "Qwen3MoeForCausalLM",
    16,
    5,
    4,
    2,
    8,
    24,
    32,
    qk_norm=True,
    experts=Experts(8, 3, 8, dense_layers=(1,), normalise=False),
)
DEEPSEEK = ModelSpec(
    "tiny-deepseek",
    "DeepseekV3ForCausalLM",
    16,
    4,
    4,
    4,
    12,
    24,
    32,
    latent=LatentAttention(12, 8, 8, 4, 6),
    experts=Experts(8, 3, 8, 8, first_layer=1, groups=4, top_groups=2, scoring="sigmoid", scale=2.5, score_bias=True),
)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)


def random_plans(count: int, seed: int) -> list[tuple[ModelSpec, Plan]]:
    """Feasible plans drawn over every axis, each world size and both models."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        world = draw.choice([1, 2, 4, 4])
        data, tensor, pipeline = draw.choice(
            [(d, t, world // d // t) for d in (1, 2, 4) for t in (1, 2, 4) if world % (d * t) == 0]
        )
        schedule, chunks = draw.choice([("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2)])
        plan = Plan(
            data,
            tensor,
            pipeline,
            draw.choice([1, 2]),
            schedule,
            chunks,
            draw.choice(["none", "selective", "full"]),
            "math",
            draw.choice([0, 1, 2, 3]),
            draw.choice([False, True]),
        )
        model = draw.choice([LLAMA, QWEN])
        if why_not(model, WORK, plan, world) is None and (model, plan) not in found:
            found.append((model, plan))
    return found


@pytest.mark.parametrize(("model", "plan"), random_plans(44, 1), ids=lambda x: getattr(x, "id", getattr(x, "name", "")))
def test_plan_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan) -> None:
    assert_equal(pool, model, plan, WORK)


MIXED = [
    (MIXTRAL, Plan(tensor=2, micro_batch=2, sequence_parallel=True, recompute="full")),
    (MIXTRAL, Plan(2, 1, 2, 1, "interleaved-1f1b", 2, zero=1)),
    (SPARSE, Plan(data=2, micro_batch=2, recompute="selective", zero=3)),
    (SPARSE, Plan(pipeline=2, schedule="zb-v", chunks=2, offload=50)),
    (SPARSE, Plan(tensor=2, recompute="selective")),
    (DEEPSEEK, Plan(data=2, attention="math", zero=2)),
    (DEEPSEEK, Plan(tensor=2, pipeline=2, schedule="zb-h1")),
    (DEEPSEEK, Plan(tensor=2, sequence_parallel=True, recompute="full")),
    (DEEPSEEK, Plan(context=2, attention="math", zero=1)),
    (MIXTRAL, Plan(context=4, context_ring=2, recompute="selective")),
]


@pytest.mark.parametrize(("model", "plan"), MIXED, ids=lambda x: getattr(x, "id", getattr(x, "name", "")))
def test_experts_and_latent_attention_equal_the_reference(pool: Pool, model: ModelSpec, plan: Plan) -> None:
    """The same mechanisms: whoever holds which layers, shares which weights, or splits each expert and head."""
    assert why_not(model, WORK, plan, plan.world) is None
    assert_equal(pool, model, plan, WORK)
