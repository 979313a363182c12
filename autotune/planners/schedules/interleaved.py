"""Interleaved 1F1B (Megatron-LM, 2104.04473, section 2.2.2): v chunks a rank shrink the bubble by v.

Rank r holds stages r, r+p, ... Micro-batches go in groups of p, chunk by chunk inside a group, so m must be a
multiple of p. Bubble (p-1)(F+BW)/v; rank 0 holds p v + p - 1 chunk activations; stage traffic grows by v.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step


def _at(k: int, rank: int, ranks: int, chunks: int, backward: bool) -> tuple[int, int]:
    """(stage, item) of a rank's k-th forward or backward."""
    group, inside = divmod(k, ranks * chunks)
    chunk = inside // ranks
    if backward:
        chunk = chunks - 1 - chunk
    return chunk * ranks + rank, group * ranks + inside % ranks


def warm_up(rank: int, ranks: int, items: int, chunks: int) -> int:
    """Forwards before the first backward."""
    return min(items * chunks, 2 * (ranks - rank - 1) + (chunks - 1) * ranks)


def order(pipe: Pipe) -> Order:
    ranks, chunks, total = pipe.ranks, pipe.chunks, pipe.items * pipe.chunks
    lists: Order = []
    for rank in range(ranks):
        warm = warm_up(rank, ranks, pipe.items, chunks)
        steps = [Step("F", *_at(k, rank, ranks, chunks, False)) for k in range(warm)]
        for k in range(total - warm):
            steps.append(Step("F", *_at(warm + k, rank, ranks, chunks, False)))
            steps.append(Step("BW", *_at(k, rank, ranks, chunks, True)))
        steps += [Step("BW", *_at(k, rank, ranks, chunks, True)) for k in range(total - warm, total)]
        lists.append(steps)
    return lists


def refuse(pipe: Pipe) -> str | None:
    ranks, items, chunks = pipe.ranks, pipe.items, pipe.chunks
    if chunks < 2:
        return f"at least two chunks a rank (found {chunks}; nearest 2)"
    if ranks < 2:
        return f"at least two pipeline ranks (found {ranks}; nearest 2)"
    if items % ranks:
        return f"micro-batches a multiple of {ranks} (found {items}; nearest {max(1, round(items / ranks)) * ranks})"
    return None


def peak(pipe: Pipe) -> list[int]:
    """Chunk activations alive at once: the warm-up and the forward that follows it."""
    total = pipe.items * pipe.chunks
    return [min(total, warm_up(rank, pipe.ranks, pipe.items, pipe.chunks) + 1) for rank in range(pipe.ranks)]


SCHEDULE = Schedule(
    order,
    refuse=refuse,
    makespan=lambda pipe: 3.0 * (pipe.items * pipe.chunks + pipe.ranks - 1),
    peak=peak,
    chunks=(2, 4),
)
