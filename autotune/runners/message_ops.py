"""SEND and RECV: boundary activations and their gradients between the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from autotune.runners.interpreter import Started
from autotune.runners.state import DTYPES
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer


def send(trainer: Trainer, instruction: Instruction, values: Mapping[str, Any]) -> Started:
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    work = dist.isend(values[instruction.reads[0]], instruction.peers[1], group=group)
    assert work is not None
    return Started((), work)


def receive(trainer: Trainer, instruction: Instruction, values: Mapping[str, Any]) -> Started:
    """A boundary activation or gradient: [tokens here, hidden] in the compute precision."""
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    plan, device = trainer.plan, trainer.mesh.device
    rows = trainer.shape.rows(plan.sequence_parallel and plan.tensor > 1)
    empty = torch.empty(rows, trainer.model.hidden, dtype=DTYPES[trainer.workload.precision], device=device)
    work = dist.irecv(empty, instruction.peers[0], group=group)
    assert work is not None
    return Started((empty,), work)


OPERATIONS = {"SEND": send, "RECV": receive}
