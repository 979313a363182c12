"""How rows are laid out that ranks exchange with their experts' ranks (planners.lower.expert), and the exchanges.

A rank's own rows lie by expert, and so by the rank that has it. What comes lies by the rank that it is from, each part
by expert. `splits`, int64 [2, ranks] on the host: rows that go to each rank, and rows that come from each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels.exchange import Several
from autotune.runners.ops import Env

Group = dist.ProcessGroup | None
Tensors = tuple[Tensor, ...]


def per_expert(ends: Tensor, ranks: int) -> Tensor:
    """Where each expert's rows end, int32 [experts] -> how many there are, int32 [ranks, experts of one rank]."""
    return torch.diff(ends, prepend=ends.new_zeros(1)).view(ranks, -1)


def counts_to_all(env: Env, group: Group, reads: Tensors) -> tuple[object, ...]:
    """Where this rank's rows end, int32 [experts] -> of each rank's tokens the rows of each expert here, int32 [ranks,
    experts here]."""
    sent = per_expert(reads[0], env.expert_size)
    received = torch.empty_like(sent)
    return received, Several([dist.all_to_all_single(received, sent, group=group, async_op=True)], (sent,))


def splits(shares: tuple[int, ...], env: Env, group: Group, reads: Tensors) -> Tensors:
    """Where rows end here, and the counts that have come -> the splits: the host waits for them."""
    ends, counts = reads
    going = torch.diff(ends.view(len(counts), -1)[:, -1], prepend=ends.new_zeros(1))
    return (torch.stack((going, counts.sum(1))).to("cpu", torch.int64),)


def places(shares: tuple[int, ...], env: Env, group: Group, reads: Tensors) -> Tensors:
    """Counts int32 [ranks, experts here] -> where in what came the rows by expert are, int64 [rows], and where each
    expert's end among these, int32 [experts here]."""
    counts, told = reads
    rows = int(told[1].sum())
    came = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()  # where each part began
    lengths = counts.t().flatten()
    ends = lengths.cumsum(0)
    index = torch.repeat_interleave(came - ends + lengths, lengths, output_size=rows)
    index += torch.arange(rows, device=index.device)
    return index, ends.view(-1, len(counts))[:, -1].to(torch.int32)


def by_expert(shares: tuple[int, ...], env: Env, group: Group, reads: Tensors) -> Tensors:
    """Values of rows as they came, and their places -> the same by expert."""
    *values, index = reads
    return tuple(value.index_select(0, index) for value in values)


def by_rank(shares: tuple[int, ...], env: Env, group: Group, reads: Tensors) -> Tensors:
    """The other way."""
    *values, index = reads
    return tuple(torch.empty_like(value).index_copy_(0, index, value) for value in values)


def _exchanged(way: int) -> Callable[[Env, Group, Tensors], tuple[object, ...]]:
    """Values of rows to the ranks that `splits` says; `way` -1: back to where they came from."""

    def run(env: Env, group: Group, reads: Tensors) -> tuple[object, ...]:
        *values, told = reads
        out, into = told.tolist()[::way]
        sent = tuple(value.contiguous() for value in values)
        received = tuple(value.new_empty(sum(into), *value.shape[1:]) for value in sent)
        started = [
            dist.all_to_all_single(new, old, into, out, group=group, async_op=True)
            for new, old in zip(received, sent, strict=True)
        ]
        return *received, Several(started, sent)

    return run


LAYOUTS: dict[str, Callable[..., Tensors]] = {
    "splits": splits,
    "places": places,
    "by_expert": by_expert,
    "by_rank": by_rank,
}
COLLECTIVES = {"counts_to_all": counts_to_all, "to_experts": _exchanged(1), "from_experts": _exchanged(-1)}
