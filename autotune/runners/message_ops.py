"""SEND and RECV: boundary activations and their gradients between the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from autotune.runners.interpreter import Started
from autotune.runners.state import DTYPES
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer


def send(trainer: Trainer, instruction: Instruction, values: Mapping[str, Any]) -> Started:
    return Started((), trainer.mesh.send(instruction, values[instruction.reads[0]]))


def receive(trainer: Trainer, instruction: Instruction, values: Mapping[str, Any]) -> Started:
    """A boundary activation or gradient: [tokens here, hidden] in the compute precision."""
    plan = trainer.plan
    rows = trainer.shape.rows(plan.sequence_parallel and plan.tensor > 1)
    dtype = DTYPES[trainer.workload.precision]
    empty = torch.empty(rows, trainer.model.hidden, dtype=dtype, device=trainer.mesh.device)
    return Started((empty,), trainer.mesh.receive(instruction, empty))


OPERATIONS = {"SEND": send, "RECV": receive}
