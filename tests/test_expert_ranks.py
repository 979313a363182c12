"""Ranks that divide the experts: equal to the serial reference, with the bytes of the closed form, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.feasible import why_not
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.test_equality import DEEPSEEK, MIXTRAL, SPARSE, WORK

V2 = replace(
    DEEPSEEK,
    name="tiny-deepseek-v2",
    architecture="DeepseekV2ForCausalLM",
    experts=Experts(8, 3, 8, 16, first_layer=1, groups=4, top_groups=2, normalise=False, scale=1.5),
)
CLIPPED = replace(WORK, clip=0.1)

# Every token visits every expert: as many rows come to a rank as go, and bytes are those of the program.
EVEN = replace(MIXTRAL, name="tiny-even", experts=Experts(4, 4, 12))
VALIDATED = Plan(2, pipeline=2, expert=2, optimizer="post-validated")

EQUAL = [
    (MIXTRAL, Plan(2, expert=2), WORK),
    (MIXTRAL, Plan(4, expert=2, micro_batch=2, recompute="selective"), CLIPPED),
    (MIXTRAL, Plan(4, expert=4, recompute="full", zero=1), CLIPPED),
    (MIXTRAL, Plan(2, tensor=2, expert=2, zero=1), WORK),
    (SPARSE, Plan(2, tensor=2, expert=2, sequence_parallel=True, recompute="selective", zero=2), CLIPPED),
    (SPARSE, Plan(4, expert=2, zero=3, micro_batch=2), CLIPPED),
    (SPARSE, Plan(2, expert=2, zero=1, recompute="full"), WORK),
    (SPARSE, Plan(2, pipeline=2, expert=2, zero=1, recompute="selective"), CLIPPED),
    (SPARSE, Plan(2, pipeline=2, expert=2, schedule="interleaved-1f1b", chunks=2, zero=3, gathered=1), CLIPPED),
    (DEEPSEEK, Plan(4, expert=4), CLIPPED),
    (DEEPSEEK, Plan(4, expert=2, zero=2, recompute="full"), WORK),
    (DEEPSEEK, Plan(2, pipeline=2, expert=2, schedule="zb-h1"), CLIPPED),
    (V2, Plan(2, tensor=2, expert=2, recompute="full"), CLIPPED),
    (V2, Plan(2, expert=2, zero=3), WORK),
    (MIXTRAL, Plan(context=2, expert=2, micro_batch=2), WORK),
    (MIXTRAL, Plan(2, context=2, expert=4, context_ring=2, zero=1), CLIPPED),
    (MIXTRAL, VALIDATED, CLIPPED),
    (MIXTRAL, replace(VALIDATED, zero=1), CLIPPED),
    (MIXTRAL, Plan(2, pipeline=2, expert=2, schedule="dualpipe", sync="late"), WORK),
    (MIXTRAL, Plan(2, pipeline=2, expert=2, vocabulary="vocab-2", offload=100), CLIPPED),
    (MIXTRAL, Plan(2, expert=2, optimizer_offload=50, optimizer_stride=2), CLIPPED),
    (MIXTRAL, Plan(4, expert=2, optimizer_offload=60, optimizer_stride=3, zero=1), CLIPPED),
    (EVEN, Plan(4, expert=2, optimizer_offload=100, optimizer_stride=2, zero=2, micro_batch=2), CLIPPED),
    (EVEN, Plan(2, expert=2, optimizer_offload=100, zero=3), WORK),
    (replace(MIXTRAL, tied=True), Plan(2, pipeline=2, expert=2, zero=2), CLIPPED),
    (EVEN, Plan(2, expert=2), WORK),
    (EVEN, Plan(4, expert=2, zero=1, recompute="selective"), CLIPPED),
    (EVEN, Plan(2, tensor=2, expert=2, zero=3, recompute="full"), CLIPPED),
    (EVEN, Plan(2, tensor=2, expert=2, sequence_parallel=True, zero=2), WORK),
    (EVEN, Plan(2, pipeline=2, expert=2, schedule="zb-h1", recompute="selective"), WORK),
    (EVEN, Plan(4, expert=4, recompute="full"), WORK),
]


@pytest.mark.parametrize(("model", "plan", "work"), EQUAL, ids=[plan.describe() for _, plan, _ in EQUAL])
def test_plan_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    plan = replace(plan, attention="math")
    assert why_not(model, work, plan, plan.world) is None
    assert_equal(pool, model, plan, work)
