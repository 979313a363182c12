"""The one-process oracle of a training step, and the comparison of a plan's run with it: loss, gradients, weights, and
order and bytes with what the simulator says."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from autotune.planners.lower.expand import expand
from autotune.planners.lower.train import lower_training
from autotune.planners.simulate import memory
from autotune.planners.validate import validate
from autotune.runners.reference import adamw_step, init_weights, reference_gradients
from autotune.runners.vocabulary_shard import assemble
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.pool import Pool
from tests.tasks import random_batch

BOUND = 1e-10  # in double precision, absolute


@lru_cache
def oracle(model: ModelSpec, work: Workload) -> tuple[list[float], dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Two steps in one process: losses, first gradients, final weights."""
    weights = init_weights(model, 0, torch.float64)
    tokens, targets = random_batch(work, model.vocab)
    losses, first = [], {}
    states: dict[Any, Any] = {}
    for step in range(2):
        loss, gradients = reference_gradients(model, weights, tokens, targets)
        losses.append(float(loss))
        first = first or {k: g.clone() for k, g in gradients.items()}
        adamw_step(weights, gradients, states, step + 1, work.learning_rate, work.weight_decay)
    return losses, first, weights


def whole(plan: Plan, model: ModelSpec, answers: list[dict[str, Any]], what: str) -> dict[Any, torch.Tensor]:
    """Full tensors from the ranks' shards."""
    pieces = [
        (a["pipeline"], a["tensor"], {f"{block}/{name}": torch.from_numpy(t) for (block, name), t in a[what].items()})
        for a in answers
    ]
    return assemble(plan, model, pieces)


def assert_equal(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    """Two steps of `plan` on real processes equal the oracle's, in the order and with the bytes of its program."""
    answers = pool.run("train", plan.world, plan=plan, model=model, workload=work, steps=2)
    losses, gradients, weights = oracle(model, work)
    for step, expected in enumerate(losses):
        measured = sum(a["losses"][step] for a in answers) / plan.tensor
        assert measured == pytest.approx(expected, abs=BOUND)
    for key, gradient in whole(plan, model, answers, "gradients").items():
        assert torch.allclose(gradient, gradients[key], rtol=0, atol=BOUND), (plan.describe(), key)
    for key, weight in whole(plan, model, answers, "weights").items():
        assert torch.allclose(weight, weights[key], rtol=0, atol=BOUND), (plan.describe(), key)
    program = expand(lower_training(plan, model, work), plan)
    validate(program)
    validate(program, inline=True)
    predicted = memory(program, lambda rank, instruction: 0)
    for rank, answer in enumerate(answers):
        assert answer["order"] == [i.label for i in program.ranks[rank]]
        assert answer["memory"] == predicted[rank]["device"]
