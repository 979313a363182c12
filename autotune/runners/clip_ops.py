"""The gradients' global norm: its parts, their sums over ranks, and what follows for an optimizer step taken early."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.runners.interpreter import Again, Started
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer

Store = Mapping[str, Any]


def factor(squared: float, limit: float) -> float | None:
    """What gradients of this squared norm are multiplied by; None: the step is skipped, since one is not finite."""
    if not isfinite(squared):
        return None
    norm = sqrt(squared)
    return limit / norm if norm > limit else 1.0


def early(squared: float, limit: float) -> float | None:
    """The same while only a part of the norm is known: 1, or None where the step would surely be another."""
    return 1.0 if isfinite(squared) and sqrt(squared) <= limit else None


def counted(trainer: Trainer, stage: int) -> list[Tensor]:
    """The slices of a stage's flat gradients that this rank counts.

    Weights held whole by every tensor rank count on the first, tied embeddings in the first stage, and of ZeRO's
    gradients only this rank's shard is summed; where replicas hold different experts, what several hold counts on their
    first. Rows of a sharded vocabulary are no other rank's. Neighbours are one
    slice.
    """
    state, plan = trainer.states[stage], trainer.plan
    rows = stage == plan.stages
    tied = trainer.model.tied and stage > 0 and not rows
    ranges: list[list[int]] = []
    spans = set()
    for block in state.blocks:
        for weight in block.trained():
            whole = weight.shard is None and not rows and plan.tensor > 1 and trainer.mesh.tensor > 0
            if not whole and not (tied and weight.name in ("embed.weight", "lm_head.weight")):
                place = state.places[block.index, weight.name].range
                spans.add((place.start, place.stop))
    once = plan.expert > 1 and not plan.zero
    for span in sorted(spans):
        where = state.mine(slice(*span))
        begin, end = where.start, where.stop
        if begin >= end or (once and trainer.mesh.number(state.copies(where))):
            continue
        if ranges and ranges[-1][1] == begin:
            ranges[-1][1] = end
        else:
            ranges.append([begin, end])
    return [state.part(state.grad, slice(begin, end)) for begin, end in ranges]


def norm(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """Adds a stage's squared norm to n, or starts n with it."""
    known: Tensor = values["n"]
    if "n" not in instruction.reads:
        known.zero_()
    for part in counted(trainer, instruction.stage) if instruction.reads else ():
        known += torch.linalg.vector_norm(part).double().square()
    return (known,)


def over_axis(axis: str) -> Any:
    def reduce(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
        known: Tensor = values["n"]
        return Started((known,), dist.all_reduce(known, group=trainer.mesh.axes[axis], async_op=True))

    return reduce


def over_pipeline(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    known: Tensor = values["n"]
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    return Started((known,), dist.all_reduce(known, group=group, async_op=True))


def send(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    return Started((), trainer.mesh.send(instruction, values[instruction.reads[0]]))


def receive(trainer: Trainer, instruction: Instruction, values: Store) -> Started:
    """Into the buffer that is there."""
    into: Tensor = values[instruction.writes[0]]
    return Started((into,), trainer.mesh.receive(instruction, into))


def add(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    """n becomes the sum of all ranks up to here; its second number the first rank's own, as it came."""
    known, carried = values["n"], values["c"]
    known[0] += carried[0]
    known[1] = carried[1]
    return (known,)


def validate(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...] | Again:
    """Sets right what the last update did wrong here; begins the step again where any rank's was wrong.

    Partial norms only grow, so what the first rank did says what the others did: where the whole norm is within the
    limit all have updated as they should, where it is not finite all have skipped if the first one has, and where
    gradients must be scaled only the last rank knew by how much. n = 0 is a step that is settled.
    """
    limit = trainer.workload.clip
    total, first = values[instruction.reads[0]].tolist()
    right = factor(total, limit)
    valid = right == 1.0 or (right is None and early(first, limit) is None)
    for state in trainer.states.values():
        if state.unsettled and state.taken != right:
            trainer.redo(state, right)
        state.unsettled = False
    values["n"].zero_()
    made = tuple(values[name] for name in instruction.writes)
    return made if valid else Again(made)


def clear(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    state = trainer.states[instruction.stage]
    state.grad.zero_()
    return (state.grad,)


OPERATIONS = {
    "NORM": norm,
    "NORM_TENSOR": over_axis("tensor"),
    "NORM_DATA": over_axis("data"),
    "NORM_PIPELINE": over_pipeline,
    "NORM_SEND": send,
    "NORM_RECV": receive,
    "NORM_ADD": add,
    "STATE_SEND": send,
    "STATE_RECV": receive,
    "VALIDATE": validate,
    "CLEAR": clear,
}
