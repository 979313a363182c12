"""Any plan gives the serial loss, gradients and updated weights; and runs as its program says."""

from __future__ import annotations

import random

import pytest

from autotune.planners.feasible import why_not
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool

LLAMA = ModelSpec("tiny-llama", "LlamaForCausalLM", 16, 4, 4, 4, 8, 24, 32, tied=True)
QWEN = ModelSpec("tiny-qwen", "Qwen3ForCausalLM", 24, 5, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
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
