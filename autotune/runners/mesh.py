"""This worker's place in the mesh, and a process group for every lane and axis it takes part in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotune.kernels import one_shot
from autotune.kernels.few_blocks import few_blocks
from autotune.kernels.mailbox import Mailboxes, Route
from autotune.planners.lower.expand import coordinates, groups
from autotune.runners.flying import Handle
from autotune.runners.seats import hosts
from autotune.spec.plan import Plan
from autotune.spec.program import BESIDE, COPIES, DATA, Instruction, Program

Members = tuple[int, ...]
Lane = tuple[str, Members]


@dataclass(frozen=True)
class Chain:
    """Work in a row that was started; without a future, the stream that it is on keeps its order."""

    future: Future[None] | None

    def wait(self) -> None:
        if self.future is not None:
            self.future.result()


@dataclass(frozen=True)
class Landing:
    """A message that arrives in the host's memory and is copied on when it is waited for."""

    work: dist.Work
    host: Tensor
    device: Tensor

    def wait(self) -> None:
        self.work.wait()
        self.device.copy_(self.host)


@dataclass
class Mesh:
    """Groups are made in one order on every rank, as torch.distributed asks."""

    plan: Plan
    rank: int
    device: torch.device
    pipeline: int = 0
    replica: int = 0
    tensor: int = 0
    axes: dict[str, dist.ProcessGroup | None] = field(default_factory=dict)
    lanes: dict[Lane, dist.ProcessGroup] = field(default_factory=dict)
    copies: dict[str, dist.ProcessGroup] = field(default_factory=dict)  # as "copies", for each lane along the data axis
    boxes: Mailboxes | None = None  # of the lanes that have no group, since messages go through mapped memory
    workers: dict[str, ThreadPoolExecutor] = field(default_factory=dict)  # of lanes on a CPU that need a thread

    @classmethod
    def build(cls, plan: Plan, programs: Sequence[Program], rank: int, device: torch.device) -> Mesh:
        """`programs` are expanded ones: each of their meetings names its members."""
        mesh = cls(plan, rank, device, *coordinates(plan, rank))
        axes = {
            "tensor": plan.tensor,
            "data": plan.replicas,
            "context": plan.context // plan.context_ring,
            "ring": plan.context_ring,
            "expert": plan.expert,
            COPIES: plan.copies if plan.expert > 1 else 1,
        }
        for axis, extent in axes.items():
            mesh.axes[axis] = None
            for members in groups(plan, axis) if extent > 1 else ():
                group = _group(members)
                if rank in members:
                    mesh.axes[axis] = group
        meetings = {(i.lane, i.peers) for program in programs for _, _, i in program if i.peers}
        messages = _messages(programs)
        mapped = mesh.open_boxes(messages) if device.type == "cuda" and not staged(device) else set()
        for lane, members in sorted(meetings - mapped):
            few = (lane, members) in messages or lane.startswith(BESIDE)
            group = _group(members, few_blocks(device.type) if few and not staged(device) else None)
            if rank in members:
                mesh.lanes[lane, members] = group
        beside = {i.lane for program in programs for _, _, i in program if i.lane.partition(".")[0] == DATA}
        for lane in sorted(beside) if axes[COPIES] > 1 else ():
            for members in groups(plan, COPIES):
                group = _group(members)
                if rank in members:
                    mesh.copies[lane] = group
        if not staged(device):
            mesh.connect()
        return mesh

    def number(self, axis: str) -> int:
        """This rank's place among those that hold the same, all replicas (DATA) or of experts (COPIES)."""
        return self.replica // (self.plan.expert if axis == COPIES else 1)

    def holders(self, axis: str, instruction: Instruction) -> dist.ProcessGroup | None:
        """Those ranks, for a collective of the instruction's lane; None where there is no other."""
        if axis == COPIES:
            return self.copies.get(instruction.lane)
        return self.axes[DATA] if instruction.lane == DATA else self.lanes[instruction.lane, instruction.peers]

    @property
    def data(self) -> int:
        """Which rows of a batch this rank takes."""
        return self.replica // self.plan.context

    @property
    def context(self) -> int:
        """Which part of each sequence this rank takes."""
        return self.replica % self.plan.context

    @property
    def expert(self) -> int:
        """Which run of the experts this rank has."""
        return self.replica % self.plan.expert

    def open_boxes(self, messages: Mapping[Lane, int]) -> set[Lane]:
        """The lanes of messages between ranks of one host whose GPUs map each other's memory, on any host."""
        mapped: set[Lane] = set()
        for members in hosts():
            inside = {lane: size for lane, size in messages.items() if set(lane[1]) <= set(members)}
            if not inside:
                continue
            alone = len(members) == dist.get_world_size()
            group: Any = dist.group.WORLD if alone else _group(members)
            opened = [False]
            if self.rank in members:
                self.axes["mapped"] = None if alone else group
                at = {member: number for number, member in enumerate(members)}
                self.boxes = Mailboxes.open(
                    {lane: Route(at[lane[1][0]], at[lane[1][1]], size) for lane, size in inside.items()},
                    group,
                    self.device,
                )
                opened = [self.boxes is not None]
            dist.broadcast_object_list(opened, src=members[0], device=torch.device("cpu"))
            mapped |= set(inside) if opened[0] else set()
        return mapped

    def send(self, instruction: Instruction, tensor: Tensor) -> Handle:
        """Starts a message to the second of the instruction's peers, on the current stream or on gloo's threads."""
        lane = instruction.lane, instruction.peers
        if self.boxes is not None and lane in self.boxes.routes:
            self.boxes.send(lane, tensor)
            return Chain(None)
        tensor = tensor.cpu() if staged(self.device) else tensor
        work = dist.isend(tensor, instruction.peers[1], group=self.lanes[lane])
        assert work is not None
        return work

    def receive(self, instruction: Instruction, into: Tensor) -> Handle:
        """Starts a message from the first of the instruction's peers, of the size and type of `into`."""
        lane = instruction.lane, instruction.peers
        if self.boxes is not None and lane in self.boxes.routes:
            self.boxes.receive(lane, into)
            return Chain(None)
        landing = torch.empty_like(into, device="cpu") if staged(self.device) else into
        work = dist.irecv(landing, instruction.peers[0], group=self.lanes[lane])
        assert work is not None
        return work if landing is into else Landing(work, landing, into)

    def connect(self) -> None:
        """Makes every communicator now, one after another.

        NCCL makes them at first use, and stops the host until the device is free to do so: two ranks that wait in
        messages of one lane while they meet for the first time on another would never come back.
        """
        if self.device.type != "cuda":
            return
        one = torch.ones(1, device=self.device)
        for group in (*(g for g in self.axes.values() if g is not None), *self.copies.values()):
            dist.all_reduce(one, group=group)
        if (divided := self.axes["expert"]) is not None:  # messages between all of them
            every = torch.ones(self.plan.expert, device=self.device)
            dist.all_to_all_single(torch.empty_like(every), every, group=divided)
        for (_, members), group in self.lanes.items():
            dist.all_reduce(one, group=group)
            if len(members) == 2:
                if self.rank == members[0]:
                    dist.send(one, members[1], group=group)
                else:
                    dist.recv(one, members[0], group=group)
            torch.cuda.synchronize(self.device)

    def in_order(self, lane: str, run: Callable[[], None]) -> Chain:
        """Starts collectives that use each other's results, after all others of their lane; the host goes on.

        On CUDA the lane's stream, which must be the current one, keeps the order; on a CPU a thread of the lane's own.
        """
        if self.device.type == "cuda":
            run()
            return Chain(None)
        if lane not in self.workers:
            self.workers[lane] = ThreadPoolExecutor(1)
        return Chain(self.workers[lane].submit(run))

    def close(self) -> None:
        """Gives groups and threads back, when all ranks are done: a process that runs many jobs would keep them all."""
        barrier(self.device)
        for worker in self.workers.values():
            worker.shutdown()
        self.boxes = None
        axes = [group for group in self.axes.values() if group is not None]
        for group in reversed([*axes, *self.lanes.values(), *self.copies.values()]):
            one_shot.forget(group)
            dist.destroy_process_group(group)

    def all_reduce(self, tensor: Tensor, how: str) -> Tensor:
        """In place over the tensor ranks."""
        if self.axes["tensor"] is not None:
            one_shot.all_reduce(tensor, self.axes["tensor"], how)
        return tensor


def _messages(programs: Sequence[Program]) -> dict[Lane, int]:
    """Lanes of messages between two ranks, and bytes of the largest on each."""
    found: dict[Lane, int] = {}
    for program in programs:
        for rank, _, i in program:
            if i.op.endswith("SEND"):
                size = program.buffers[rank][i.reads[0]].size
                found[i.lane, i.peers] = max(size, found.get((i.lane, i.peers), 0))
    return dict(sorted(found.items()))


def staged(device: torch.device) -> bool:
    """Whether messages of CUDA tensors go through the host: several ranks share a device, and gloo joins them."""
    return device.type == "cuda" and dist.get_backend() == "gloo"


def _group(members: Members, options: Any = None) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(members), timeout=timedelta(seconds=600), pg_options=options)
    return group


def barrier(device: torch.device) -> None:
    """All ranks have come here, and this device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "cuda" and not staged(device):
        dist.barrier(device_ids=[device.index])
    else:
        dist.barrier()
