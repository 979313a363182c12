"""SEND and RECV: boundary activations and their gradients between the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.runners.interpreter import Started
from autotune.runners.mesh import staged
from autotune.runners.state import DTYPES
from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer


@dataclass(frozen=True)
class Landing:
    """A message that arrives in the host's memory and is copied on when it is waited for."""

    work: dist.Work
    host: Tensor
    device: Tensor

    def wait(self) -> None:
        self.work.wait()
        self.device.copy_(self.host)


def send(trainer: Trainer, instruction: Instruction, values: Mapping[str, Any]) -> Started:
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    tensor = values[instruction.reads[0]]
    if staged(trainer.mesh.device):
        tensor = tensor.cpu()
    work = dist.isend(tensor, instruction.peers[1], group=group)
    assert work is not None
    return Started((), work)


def receive(trainer: Trainer, instruction: Instruction, values: Mapping[str, Any]) -> Started:
    """A boundary activation or gradient: [tokens here, hidden] in the compute precision."""
    group = trainer.mesh.lanes[instruction.lane, instruction.peers]
    plan, device = trainer.plan, trainer.mesh.device
    rows = trainer.shape.rows(plan.sequence_parallel and plan.tensor > 1)
    empty = torch.empty(rows, trainer.model.hidden, dtype=DTYPES[trainer.workload.precision], device=device)
    landing = torch.empty_like(empty, device="cpu") if staged(device) else empty
    work = dist.irecv(landing, instruction.peers[0], group=group)
    assert work is not None
    return Started((empty,), work if landing is empty else Landing(work, landing, empty))


OPERATIONS = {"SEND": send, "RECV": receive}
