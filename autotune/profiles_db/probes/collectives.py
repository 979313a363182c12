"""Probe: collectives and point-to-point messages over the real backend, by size and by group.

Sizes follow spec.work.Collective: bytes of the whole, unsharded tensor. Neighbouring ranks form the groups; where a
group is smaller than the world, all groups work at the same time, as the tensor groups of a mesh do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from autotune.kernels.exchange import GATHER, SCATTER
from autotune.kernels.mailbox import Mailboxes, Route
from autotune.kernels.one_shot import all_reduce
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.grid import Setting
from autotune.profiles_db.probes.pool import DTYPES
from autotune.profiles_db.probes.timing import Trial
from autotune.spec.errors import EnvironmentFault, nearest_name
from autotune.spec.work import Collective

KIB, MIB = 1 << 10, 1 << 20
DTYPE = {"cpu": "fp32", "cuda": "bf16"}
BESIDE = ("broadcast", "reduce")  # the executor has them where they wait beside compute: with few thread blocks
IN_A_ROW = 32  # of one graph
SHARDS = ("all_gather", "reduce_scatter", "all_to_all")  # a rank holds a part: the size must divide by the group


def _all_reduce(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    return lambda i: all_reduce(whole, group)


def _all_gather(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    return lambda i: GATHER(whole, part, group=group)


def _reduce_scatter(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    return lambda i: SCATTER(part, whole, group=group)


def _all_to_all(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    other = torch.empty_like(whole)
    return lambda i: dist.all_to_all_single(other, whole, group=group)


def _broadcast(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    # The root moves on each time: a fixed one would run ahead and hide how long a message takes to arrive.
    return lambda i: dist.broadcast(whole, group=group, group_src=i % size)


def _reduce(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    return lambda i: dist.reduce(whole, group=group, group_dst=i % size)


def _send_recv(whole: torch.Tensor, part: torch.Tensor, group: Any, size: int) -> Callable[[int], Any]:
    """As the executor sends: between GPUs through mapped memory where that can be had."""
    me = dist.get_rank(group)
    back = torch.empty_like(whole)
    routes = {sender: Route(sender, 1 - sender, whole.nbytes) for sender in (0, 1)}
    if whole.is_cuda and (boxes := Mailboxes.open(routes, group, whole.device)):

        def pass_on(i: int) -> None:
            for sender in (0, 1):
                if sender == me:
                    boxes.send(sender, whole)
                else:
                    boxes.receive(sender, back)

        return pass_on

    def run(i: int) -> None:
        if me == 0:
            dist.send(whole, group=group, group_dst=1)
            dist.recv(back, group=group, group_src=1)
        else:
            dist.recv(back, group=group, group_src=0)
            dist.send(whole, group=group, group_dst=0)

    return run


OPS: dict[str, Callable[[torch.Tensor, torch.Tensor, Any, int], Callable[[int], Any]]] = {
    "all_reduce": _all_reduce,
    "send_recv": _send_recv,  # there and back, counted as two messages
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
}


def works(setting: Setting) -> list[Collective]:
    """Every operation over the whole world (messages: over pairs), then the smaller groups that divide it."""
    if setting.world < 2:
        return []
    if setting.device == "cuda":
        sizes = [16 * MIB, KIB, 256 * MIB, MIB]
        if not setting.quick:
            sizes = [16 * MIB, KIB, 1024 * MIB, MIB, 64 * KIB, 256 * MIB, 64 * MIB, 4 * MIB, 16 * KIB, 256 * KIB]
    else:
        sizes = [MIB, KIB, 16 * MIB, 64 * KIB]
        if not setting.quick:
            sizes = [MIB, KIB, 16 * MIB, 64 * KIB, 64 * MIB, 256 * KIB, 4 * MIB, 16 * KIB]
    whole = [Collective(op, size, 2 if op == "send_recv" else setting.world) for size in sizes for op in OPS]
    if setting.device == "cuda":  # of a decoded token, or a few
        few = [16 * KIB, 256 * KIB] if setting.quick else [16 * KIB, 256 * KIB, 4 * MIB, KIB, 64 * KIB, MIB, 64 * MIB]
        whole += [Collective("all_reduce", size, setting.world, captured=True) for size in few]
        whole += [Collective("all_gather", size, setting.world, captured=True) for size in (KIB, MIB)]
    smaller = [g for g in range(2, setting.world) if setting.world % g == 0]
    parts = ("all_reduce", "all_gather", "reduce_scatter")
    return [*whole, *(Collective(op, size, g) for g in smaller for size in sizes for op in parts)]


def prepare(work: Collective, crew: Crew) -> Trial:
    """The operation on this rank's group. Sizes are rounded up to whole elements a rank."""
    if work.op not in OPS:
        raise EnvironmentFault(f"no collective named {work.op!r} (nearest: {nearest_name(work.op, OPS)})")
    if not 2 <= work.group <= crew.world or (work.op == "send_recv" and work.group != 2):
        allowed = "2" if work.op == "send_recv" else f"2 to {crew.world}"
        raise EnvironmentFault(
            f"{work.op}: found a group of {work.group} in a world of {crew.world}; expected {allowed}"
        )
    dtype = DTYPES[DTYPE[crew.device]]
    share = work.group if work.op in SHARDS else 1
    elements = max(1, -(-work.size // (dtype.itemsize * share))) * share
    whole = crew.pool.fresh((elements,), dtype).mul_(1e-3)  # summed over and over, it must stay finite
    group = crew.block(work.group, few=work.op in BESIDE)
    if group is None:
        return Trial(lambda i: None)
    run = OPS[work.op](whole, whole[: elements // share].clone(), group, work.group)
    tick = torch.zeros(1, device=crew.place)
    messages = 2.0 if work.op == "send_recv" else 1.0
    if work.captured and whole.is_cuda:
        run, messages = _replayed(run), messages * IN_A_ROW
    return Trial(run, each=messages, align=lambda: dist.all_reduce(tick, group=group))


def _replayed(run: Callable[[int], Any]) -> Callable[[int], Any]:
    """The operation as a CUDA graph has it, IN_A_ROW times: fewer would show how far ranks begin apart."""
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)  # what is set up at first use is set up outside the graph
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(IN_A_ROW):
            run(i)
    return lambda i: graph.replay()
