"""Collectives as the executor starts them, where torch's own names differ or one call is not enough; probes time these.

torch 2.13 renames the two collectives of whole tensors; the versions before know only the old names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Several:
    """Messages under way together; waited for once."""

    def __init__(self, started: list[dist.Work], held: tuple[Tensor, ...]) -> None:
        self.started, self.held = started, held  # what is sent stays until it has gone

    def wait(self) -> None:
        for work in self.started:
            work.wait()
        self.started, self.held = [], ()


def shift(tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None, way: int) -> tuple[tuple[Tensor, ...], Several]:
    """Each tensor to the rank `way` further in the ring, from the one as far before: (what comes, what to wait for)."""
    at, ranks = dist.get_rank(group), dist.get_world_size(group)
    ahead, behind = ((at + step) % ranks for step in (way, -way))
    sent = tuple(tensor.contiguous() for tensor in tensors)
    received = tuple(map(torch.empty_like, sent))
    messages = [
        dist.P2POp(act, tensor, group=group, tag=tag, group_peer=peer)
        for act, ends, peer in ((dist.isend, sent, ahead), (dist.irecv, received, behind))
        for tag, tensor in enumerate(ends)
    ]
    return received, Several(dist.batch_isend_irecv(messages), sent)
