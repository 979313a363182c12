"""Sums of small tensors over GPUs of one host in one step: every rank reads all others' parts and adds them up.

A decoded token's activations are a few KiB a layer, and NCCL takes as long for them as for a MiB, some 40 us. The
kernel is torch's (`symm_mem.one_shot_all_reduce_copy_out`); it works on the current stream, so that a CUDA graph may
hold it, and adds in the ranks' order on each of them: all get the same bits. Elsewhere, and for what is larger, the
backend's own all-reduce. Probes time what runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels.mailbox import mapped_memory

LARGEST = 256 << 10  # bytes
ALIGNED = 16  # bytes
SUMMED = (torch.bfloat16, torch.float32)  # what torch's kernel adds
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

_slabs: dict[tuple[str, torch.dtype], Tensor | None] = {}  # by group; None: its ranks cannot map each other's memory


class Done:
    """A sum that the current stream has in its order already."""

    def wait(self) -> None:
        pass


def all_reduce(tensor: Tensor, group: Any, how: str = "sum", async_op: bool = False) -> Any:
    """The sum or the largest over the group's ranks, in place. As of `torch.distributed.all_reduce`, something to wait
    for with `async_op`. The first sum of a group and type maps memory: on every rank, and before any capture."""
    if how == "sum" and small(tensor) and (slab := _slab(group, tensor)) is not None:
        flat = tensor.view(-1)
        name = _group(group).group_name
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(slab[: flat.numel()], flat, "sum", name, flat)
        return Done() if async_op else None
    return dist.all_reduce(tensor, REDUCTIONS[how], group=group, async_op=async_op)


def small(tensor: Tensor) -> bool:
    """Whether a tensor may be summed in one step."""
    return (
        tensor.is_cuda
        and tensor.dtype in SUMMED
        and 0 < tensor.nbytes <= LARGEST
        and tensor.nbytes % ALIGNED == 0
        and tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNED == 0
    )


def forget(group: Any) -> None:
    """Gives a group's memory back, before the group itself."""
    for key in [key for key in _slabs if key[0] == _group(group).group_name]:
        del _slabs[key]


def _group(group: Any) -> Any:
    return dist.group.WORLD if group is None else group


def _slab(group: Any, like: Tensor) -> Tensor | None:
    key = _group(group).group_name, like.dtype
    if key not in _slabs:
        found = None if dist.get_backend(group) == "gloo" else mapped_memory(LARGEST, _group(group), like.device)
        _slabs[key] = found[0].view(like.dtype) if found else None
    return _slabs[key]
