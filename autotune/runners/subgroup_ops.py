"""Subgroups of optimizer states that live on the host: moved, updated by the device or by the host's processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autotune.runners.interpreter import Deferred
from autotune.runners.state import adamw
from autotune.runners.tier_ops import to_host
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.state import Owned, StageState
    from autotune.runners.training import Trainer

Store = Mapping[str, Any]
Made = tuple[Any, ...]


def _where(trainer: Trainer, instruction: Instruction) -> tuple[StageState, tuple[Owned, ...]]:
    """The stage's state, and the subgroup's places in its flat tensors."""
    state = trainer.states[instruction.stage]
    return state, state.subgroup(instruction.item)


def fetch(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    def up(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=trainer.mesh.device).copy_(tensor, non_blocking=True)

    return (tuple(map(up, values[instruction.reads[0]])),)


def update_fetched(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """On the device; nothing where the step is skipped."""
    state, where = _where(trainer, instruction)
    master, mean, square = values[instruction.reads[0]]
    if state.taken is not None:
        rates = trainer.rates(state.steps)
        for run, at in where:
            adamw(master[at], mean[at], square[at], state.part(state.grad, run), state.step, rates)
            state.part(state.weight, run).copy_(master[at])
    return tuple(values[name] for name in instruction.writes)


def give_back(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    """Into the host's own tensors."""
    home = values[instruction.writes[0]]
    for there, here in zip(home, values[instruction.reads[0]], strict=True):
        there.copy_(here, non_blocking=True)
    return (home, *(None for _ in instruction.writes[1:]))


def gradient_down(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    state, where = _where(trainer, instruction)
    parts = [state.part(state.grad, run) for run, _ in where]
    return (to_host(parts[0] if len(parts) == 1 else torch.cat(parts)),)


def update_on_host(trainer: Trainer, instruction: Instruction, values: Store) -> Deferred:
    """By the host's processor, as soon as the gradients are there; the new weights in their own precision."""
    state, _ = _where(trainer, instruction)
    gradient, states = (values[name] for name in instruction.reads)
    master, mean, square = states
    weight = torch.empty_like(gradient, dtype=state.weight.dtype, pin_memory=state.weight.is_cuda)
    step, taken, rates = torch.tensor(float(state.steps)), state.taken is not None, trainer.rates(state.steps)

    def work() -> None:
        if taken:
            adamw(master, mean, square, gradient, step, rates)
        weight.copy_(master)

    return Deferred((states, weight), work)


def weight_up(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    state, where = _where(trainer, instruction)
    made: Tensor = values[instruction.reads[0]]
    for run, at in where:
        state.part(state.weight, run).copy_(made[at], non_blocking=True)
    return (None,)


def join(trainer: Trainer, instruction: Instruction, values: Store) -> Made:
    state = trainer.states[instruction.stage]
    state.grad.zero_()
    return tuple(values[name] for name in instruction.writes)


OPERATIONS = {
    "FETCH": fetch,
    "OPT_FETCHED": update_fetched,
    "RETURN": give_back,
    "GRADIENT_DOWN": gradient_down,
    "OPT_HOST": update_on_host,
    "WEIGHT_UP": weight_up,
    "JOIN": join,
}
