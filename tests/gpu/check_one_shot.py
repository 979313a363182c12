"""Sums over GPUs in one step, beside NCCL's: right, the same bits on every rank, and how long they take in a graph.

    torchrun --standalone --nproc-per-node 2 tests/gpu/check_one_shot.py

Not collected by pytest; exits with 6 where a sum is wrong.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels import one_shot

SIZES = (1 << 10, 8 << 10, 64 << 10, 256 << 10)
CALLS = 50


def graph_us(call: Callable[[], Any]) -> float:
    """Microseconds of a call among many in one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    spent = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(spent)


def wrong(mine: Tensor) -> bool:
    """Whether the sum of every rank's tensor is not what it should be, or not the same on all ranks."""
    exact = mine.double()
    dist.all_reduce(exact)
    found = mine.clone()
    one_shot.all_reduce(found, None)
    everyone = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, found)
    apart = (found.double() - exact).abs().max() > 2 ** -(7 if mine.dtype == torch.bfloat16 else 20) * exact.abs().max()
    return bool(apart) or any(not torch.equal(found, other) for other in everyone)


def main() -> int:
    dist.init_process_group("cpu:gloo,cuda:nccl")
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    failed = 0
    for dtype in one_shot.SUMMED:
        for size in SIZES:
            mine = torch.randn(size // dtype.itemsize, device="cuda").to(dtype)
            assert one_shot.small(mine)
            bad = wrong(mine)
            failed += bad
            ours = graph_us(lambda mine=mine: one_shot.all_reduce(mine, None))
            theirs = graph_us(lambda mine=mine: dist.all_reduce(mine))
            if rank == 0:
                print(f"{dtype!s:<16} {size:>8} B  {'WRONG' if bad else 'right'}  {ours:6.1f} us, NCCL {theirs:6.1f}")
    dist.destroy_process_group()
    return 6 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
