"""Any plan gives the serial loss, gradients and updated weights; and runs as its program says."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest
import torch

from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.train import lower_training
from autotune.planners.simulate import memory
from autotune.planners.validate import validate
from autotune.runners.checkpoint import unshard
from autotune.runners.reference import adamw_step, init_weights, reference_gradients
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.pool import Pool
from tests.tasks import random_batch

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
            draw.choice([0, 1]),
            draw.choice([False, True]),
        )
        model = draw.choice([LLAMA, QWEN])
        if why_not(model, WORK, plan, world) is None and (model, plan) not in found:
            found.append((model, plan))
    return found


@lru_cache
def oracle(model: ModelSpec) -> tuple[list[float], dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Two steps in one process: losses, first gradients, final weights."""
    weights = init_weights(model, 0, torch.float64)
    tokens, targets = random_batch(WORK, model.vocab)
    losses, first = [], {}
    states: dict[Any, Any] = {}
    for step in range(2):
        loss, gradients = reference_gradients(model, weights, tokens, targets)
        losses.append(float(loss))
        first = first or {k: g.clone() for k, g in gradients.items()}
        adamw_step(weights, gradients, states, step + 1, WORK.learning_rate, WORK.weight_decay)
    return losses, first, weights


def whole(model: ModelSpec, answers: list[dict[str, Any]], what: str) -> dict[Any, torch.Tensor]:
    """Full tensors from the ranks' shards."""
    found = {}
    for block in blocks(model):
        for weight in block.weights():
            key = (block.index, weight.name)
            shards = {a["tensor"]: torch.from_numpy(a[what][key]) for a in answers if key in a[what]}
            found[key] = unshard(weight, [shards[t] for t in sorted(shards)])
    return found


@pytest.mark.parametrize(("model", "plan"), random_plans(44, 1), ids=lambda x: getattr(x, "id", getattr(x, "name", "")))
def test_plan_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan) -> None:
    answers = pool.run("train", plan.world, plan=plan, model=model, workload=WORK, steps=2)
    losses, gradients, weights = oracle(model)
    for step, expected in enumerate(losses):
        measured = sum(a["losses"][step] for a in answers) / plan.tensor
        assert measured == pytest.approx(expected, abs=1e-10)
    for key, gradient in whole(model, answers, "gradients").items():
        assert torch.allclose(gradient, gradients[key], rtol=0, atol=1e-10), (plan.describe(), key)
    for key, weight in whole(model, answers, "weights").items():
        assert torch.allclose(weight, weights[key], rtol=0, atol=1e-10), (plan.describe(), key)
    program = expand(lower_training(plan, model, WORK), plan)
    validate(program)
    validate(program, inline=True)
    predicted = memory(program, lambda rank, instruction: 0)
    for rank, answer in enumerate(answers):
        assert answer["order"] == [i.label for i in program.ranks[rank]]
        assert answer["memory"] == predicted[rank]["device"]
