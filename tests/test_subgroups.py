"""Optimizer states on the host: any share and stride gives the same weights, and the bytes are where they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.costs.step import StepCosts
from autotune.planners.feasible import why_not
from autotune.planners.lower.subgroups import SUBGROUPS
from autotune.planners.lower.train import lower_training
from autotune.planners.predict import Predictor
from autotune.planners.simulate import memory
from autotune.planners.solvers.stride import Subgroup, best_stride
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import Faults, assert_equal
from tests.pool import Pool

MODEL = ModelSpec("deep-llama", "LlamaForCausalLM", 16, 5, 4, 4, 4, 24, 32, tied=True)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
MESHES = [Plan(), Plan(2, 1, 2, zero=1), Plan(1, 2, 2, sequence_parallel=True), Plan(1, 1, 2, 1, "interleaved-1f1b", 2)]


@pytest.mark.parametrize(("percent", "stride"), [(100, 0), (100, 1), (100, 3), (60, 2), (30, 16), (1, 1)])
@pytest.mark.parametrize("mesh", MESHES, ids=Plan.describe)
def test_any_share_and_stride_equals_the_reference(pool: Pool, mesh: Plan, percent: int, stride: int) -> None:
    plan = replace(mesh, attention="math", optimizer_offload=percent, optimizer_stride=stride)
    assert why_not(MODEL, WORK, plan, plan.world) is None
    assert_equal(pool, MODEL, plan, WORK, steps=3)


@pytest.mark.parametrize(
    "faults", [(), ((1, (5, "attn_norm.weight"), float("nan")),), ((1, (1, "attn_norm.weight"), 1e3),)]
)
def test_clipping_reaches_the_host(pool: Pool, faults: Faults) -> None:
    plan = Plan(1, 1, 2, attention="math", optimizer_offload=70, optimizer_stride=4)
    assert_equal(pool, MODEL, plan, replace(WORK, clip=1.0), faults, steps=3)
