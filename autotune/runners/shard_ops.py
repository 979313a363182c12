"""Sharded weights and gradients: gathered whole before a run of uses, summed into the data ranks' shares after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from autotune.kernels.exchange import Several
from autotune.runners.interpreter import Started
from autotune.runners.state import Flat
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer

Store = Mapping[str, Any]


def unshard(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """A stage's whole weights from every data rank's share."""
    state = trainer.states[instruction.stage]
    whole = state.weight.new_empty(state.whole)
    started = []
    for segment in state.segments:
        share, group = state.weight[segment.at], trainer.mesh.holders(segment.axis, instruction)
        if group is None:  # nobody else holds these
            whole[segment.where].copy_(share)
        else:
            started.append(dist.all_gather_into_tensor(whole[segment.where], share, group=group, async_op=True))
    return Started((Flat(whole, state.views(whole)),), Several(started, ()))


def fresh(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """Whole gradients of a stage, zero."""
    state = trainer.states[instruction.stage]
    whole = torch.zeros(state.whole, dtype=state.grad.dtype, device=state.grad.device)
    return (Flat(whole, state.views(whole)),)


def scatter(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """Whole gradients summed over the data ranks, each adding its share to what it has."""
    state = trainer.states[instruction.stage]
    whole: Flat = values[instruction.reads[0]]
    held = [(segment, trainer.mesh.holders(segment.axis, instruction)) for segment in state.segments]

    def run() -> None:
        for segment, group in held:
            share = whole.whole[segment.mine]
            if group is not None:
                dist.reduce_scatter_tensor(share, whole.whole[segment.where], group=group)
            state.grad[segment.at].add_(share)

    return Started((state.grad,), trainer.mesh.in_order(instruction.lane, run))


OPERATIONS = {"UNSHARD": unshard, "FRESH": fresh, "SCATTER": scatter}
