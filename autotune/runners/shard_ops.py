"""Sharded weights and gradients: gathered whole before a run of uses, summed into the data ranks' shares after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from autotune.runners.interpreter import Started
from autotune.runners.state import Flat
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer

Store = Mapping[str, Any]


def unshard(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """A stage's whole weights from every data rank's share."""
    state = trainer.states[instruction.stage]
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    whole = state.weight.new_empty(len(instruction.peers) * state.weight.numel())
    work = dist.all_gather_into_tensor(whole, state.weight, group=group, async_op=True)
    return Started((Flat(whole, state.views(whole)),), work)


def fresh(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """Whole gradients of a stage, zero."""
    state = trainer.states[instruction.stage]
    whole = torch.zeros(trainer.plan.replicas * state.grad.numel(), dtype=state.grad.dtype, device=state.grad.device)
    return (Flat(whole, state.views(whole)),)


def scatter(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """Whole gradients summed over the data ranks, each adding its share to what it has."""
    state = trainer.states[instruction.stage]
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    whole: Flat = values[instruction.reads[0]]
    share = state.part(whole.whole, state.shard)

    def run() -> None:
        dist.reduce_scatter_tensor(share, whole.whole, group=group)
        state.grad.add_(share)

    return Started((state.grad,), trainer.mesh.in_order(instruction.lane, run))


OPERATIONS = {"UNSHARD": unshard, "FRESH": fresh, "SCATTER": scatter}
