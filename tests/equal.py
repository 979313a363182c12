"""The one-process oracle of a training step, and the comparison of a plan's run with it: loss, gradients, weights, and
order and bytes with what the simulator says."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from autotune.planners.lower.expand import expand
from autotune.planners.lower.train import lower_training
from autotune.planners.resolve import resolve
from autotune.planners.simulate import memory
from autotune.planners.validate import validate
from autotune.runners.reference import adamw_step, clip_gradients, init_weights, reference_gradients
from autotune.runners.vocabulary_shard import Piece, assemble
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.pool import Pool
from tests.tasks import even, random_rows

Faults = tuple[tuple[int, tuple[int, str], float], ...]  # (step, weight, what is added to its gradient)
BOUND = 1e-10  # in double precision, absolute


def shallow(model: ModelSpec, plan: Plan, more: int = 1) -> ModelSpec:
    """The model with a layer more than the plan has stages, if it has that many: no stage is empty, and they differ."""
    return replace(model, layers=min(model.layers, plan.stages + more))


def busy(work: Workload, plan: Plan) -> Workload:
    """The same with two micro-batches for every pipeline rank: enough for a schedule to come into its steady state."""
    return replace(work, global_batch=2 * plan.pipeline * plan.data * plan.micro_batch)


@lru_cache
def oracle(
    model: ModelSpec, work: Workload, faults: Faults = (), steps: int = 2
) -> tuple[list[float], dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Some steps in one process: losses, first gradients, final weights. `faults` are added to gradients."""
    weights = init_weights(model, 0, torch.float64)
    tokens, targets, rows = random_rows(model, work)
    losses, first = [], {}
    states: dict[Any, Any] = {}
    taken = 0
    for step in range(steps):
        loss, gradients = reference_gradients(model, weights, tokens, targets, rows=rows)
        losses.append(float(loss))
        trained = {(block.index, w.name) for block in blocks(model) for w in block.trained()}
        gradients = {key: gradient for key, gradient in gradients.items() if key in trained}
        for when, key, value in faults:
            gradients[key].add_(value if when == step else 0.0)
        first = first or {k: g.clone() for k, g in gradients.items()}
        if work.clip and not clip_gradients(gradients, work.clip):
            continue
        taken += 1
        adamw_step(weights, gradients, states, taken, work.rate(taken), work.weight_decay)
    return losses, first, weights


def whole(plan: Plan, model: ModelSpec, answers: list[dict[str, Any]], what: str) -> dict[Any, torch.Tensor]:
    """Full tensors from the ranks' shards."""
    pieces = [
        Piece(
            a["pipeline"],
            a["expert"],
            a["tensor"],
            {f"{block}/{name}": torch.from_numpy(t) for (block, name), t in a[what].items()},
        )
        for a in answers
    ]
    return assemble(plan, model, pieces)


def assert_equal(
    pool: Pool, model: ModelSpec, plan: Plan, work: Workload, faults: Faults = (), steps: int = 2
) -> list[dict[str, Any]]:
    """Steps of `plan` on real processes equal the oracle's, in the order and with the bytes of its program."""
    running = pool.start("train", plan.world, plan=plan, model=model, workload=work, steps=steps, faults=faults)
    try:
        program = expand(lower_training(plan, model, work), plan)
        validate(program)
        resolve(program, inline=True)
        predicted = memory(program, lambda rank, instruction: 0)
        losses, gradients, weights = oracle(model, work, faults, steps)
    finally:
        answers = running()
    for step, expected in enumerate(losses):
        measured = sum(a["losses"][step] for a in answers) / plan.tensor
        assert measured == pytest.approx(expected, abs=BOUND)
    for key, gradient in whole(plan, model, answers, "gradients").items():
        assert torch.allclose(gradient, gradients[key], rtol=0, atol=BOUND), (plan.describe(), key)
    for key, weight in whole(plan, model, answers, "weights").items():
        assert torch.allclose(weight, weights[key], rtol=0, atol=BOUND), (plan.describe(), key)
    for rank, answer in enumerate(answers):
        assert answer["order"] == [i.label for i in program.ranks[rank]]
        assert not even(plan, model) or answer["memory"] == predicted[rank]["device"]
    return answers
