"""The optimizer's step: clipped by the gradients' global norm, with a barrier or validated afterwards."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.traits import pipe_of, place_of
from autotune.planners.schedules import SCHEDULES
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import Faults, assert_equal
from tests.pool import Pool

TIED = ModelSpec("deep-llama", "LlamaForCausalLM", 16, 9, 4, 4, 4, 24, 32, tied=True)
OPEN = ModelSpec("deep-qwen", "Qwen3ForCausalLM", 24, 10, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
SOMETIMES = 3.0  # a clip that plain gradients of these models stay under
EARLY, LATE = (1, "attn_norm.weight"), (9, "attn_norm.weight")  # in the first stage, and in the last
CASES: dict[str, Faults] = {
    "plain": (),
    "nan at the end": ((1, LATE, float("nan")),),
    "nan at the start": ((1, EARLY, float("nan")),),
    "infinite": ((0, LATE, float("inf")),),
    "huge at the end": ((1, LATE, 1e3),),
    "huge at the start": ((1, EARLY, 1e3),),
    "huge, and in the last step too": ((0, LATE, 1e3), (2, EARLY, 10.0)),
}


def early_plans() -> list[Plan]:
    """One plan of each schedule on 2 and on 4 ranks, where it is legal."""
    found = []
    for name, entry in SCHEDULES.items():
        for pipeline in (2, 4):
            chunks = entry.chunks[-1]
            plan = Plan(1, 1, pipeline, 1, name, chunks, attention="math", optimizer="post-validated")
            if pipeline * chunks <= TIED.layers and not entry.refuse(pipe_of(plan, 8)):
                found.append(plan)
    return found


@pytest.mark.parametrize("clip", [1e-3, SOMETIMES])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(attention="math"),
        Plan(2, 1, 2, zero=1, attention="math"),
        Plan(1, 2, 2, attention="math", sequence_parallel=True),
        Plan(2, 2, 1, zero=1, attention="math"),
        Plan(1, 1, 4, attention="math"),
    ],
    ids=Plan.describe,
)
@pytest.mark.parametrize("model", [TIED, OPEN], ids=lambda m: m.name)
def test_a_clipped_step_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan, clip: float) -> None:
    assert_equal(pool, model, plan, replace(WORK, clip=clip))


@pytest.mark.parametrize("faults", CASES.values(), ids=list(CASES))
def test_a_step_with_a_fault_equals_the_reference(pool: Pool, faults: Faults) -> None:
    assert_equal(pool, TIED, Plan(1, 1, 2, attention="math"), replace(WORK, clip=SOMETIMES), faults, steps=3)


@pytest.mark.parametrize("plan", early_plans(), ids=Plan.describe)
@pytest.mark.parametrize("faults", CASES.values(), ids=list(CASES))
def test_validated_afterwards_equals_the_reference(pool: Pool, plan: Plan, faults: Faults) -> None:
    work = replace(WORK, clip=SOMETIMES)
    assert why_not(TIED, work, plan, plan.world) is None
    answers = assert_equal(pool, TIED, plan, work, faults, steps=3)
    # A step begins again just where a rank has updated wrongly before it: not where the first rank saw the NaN itself.
    place = place_of(plan, 8)
    first = {EARLY: min(place[0]) == 0, LATE: min(place[-1]) == 0}
    wrong = {step for step, key, value in faults if isfinite(value) or not first[key]}
    for answer in answers:
        begun = answer["validated"]  # the last entry is the validation after the last step
        assert {step for step in begun[:-1] if begun[:-1].count(step) > 1} == {s + 1 for s in wrong if s < 2}
