"""OFFLOAD and RELOAD: a chunk activation to the host's memory and back; RELEASE and MARK, which only order.

On CUDA the host's copy is pinned and both copies run on their lane's stream; on a CPU a copy is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autotune.spec.program import Instruction

if TYPE_CHECKING:
    from autotune.runners.training import Trainer

Store = Mapping[str, Any]


def _each(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """The same lists and mappings with every tensor moved."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {name: _each(item, move) for name, item in value.items()}
    return [_each(item, move) for item in value]


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; from CUDA a pinned one, under way on the current stream."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def offload(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    return tuple(_each(values[name], to_host) for name in instruction.reads)


def reload(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    device = trainer.mesh.device

    def back(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor, non_blocking=True)

    return tuple(_each(values[name], back) for name in instruction.reads[: len(instruction.writes)])


def nothing(trainer: Trainer, instruction: Instruction, values: Store) -> tuple[Any, ...]:
    return (None,) * len(instruction.writes)


OPERATIONS = {"OFFLOAD": offload, "RELOAD": reload, "RELEASE": nothing, "MARK": nothing}
