"""From pipeline ranks to every rank of the world: tensor fastest, then context, then data, then pipeline (as
Megatron-LM orders). A replica is a place along data and context together: its number is data x context + context's."""

from __future__ import annotations

from autotune.spec.plan import Plan
from autotune.spec.program import ALL_TENSOR, DATA, TENSOR, Instruction, Program

Axes = dict[str, tuple[int, ...]]


def coordinates(plan: Plan, rank: int) -> tuple[int, int, int]:
    """(pipeline, replica, tensor) of a world rank."""
    rest, tensor = divmod(rank, plan.tensor)
    pipeline, replica = divmod(rest, plan.replicas)
    return pipeline, replica, tensor


def world_rank(plan: Plan, pipeline: int, replica: int, tensor: int) -> int:
    return (pipeline * plan.replicas + replica) * plan.tensor + tensor


def groups(plan: Plan, axis: str) -> list[tuple[int, ...]]:
    """All groups of ranks that differ along one axis of the mesh alone: "data" (all replicas), "context" (those that
    exchange heads for tokens), "ring" (those that pass keys around), "expert" (replicas that divide the
    experts), "copies" (replicas with the same ones), "tensor" or "pipeline"."""
    heads = plan.context // plan.context_ring
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(plan.world):
        pipeline, replica, tensor = coordinates(plan, rank)
        outside = {
            "pipeline": (replica, tensor),
            "data": (pipeline, tensor),
            "context": (pipeline, replica // heads, tensor),
            "ring": (pipeline, replica // plan.context, replica % heads, tensor),
            "expert": (pipeline, replica // plan.expert, tensor),
            "copies": (pipeline, replica % plan.expert, tensor),
            "tensor": (pipeline, replica),
        }
        found.setdefault(outside[axis], []).append(rank)
    return [tuple(g) for g in found.values()]


def expand(program: Program, plan: Plan) -> Program:
    """The same program over all ranks, every meeting explicit: what the workers run and record."""
    ranks, buffers = [], []
    for rank in range(plan.world):
        pipeline, replica, tensor = coordinates(plan, rank)
        # A lane named after an axis of the mesh, or after one and a dot, meets along that axis.
        members = {
            DATA: tuple(world_rank(plan, pipeline, r, tensor) for r in range(plan.replicas)),
            TENSOR: tuple(world_rank(plan, pipeline, replica, t) for t in range(plan.tensor)),
        }

        def placed(
            instruction: Instruction, replica: int = replica, tensor: int = tensor, members: Axes = members
        ) -> Instruction:
            op, stage, item = instruction[:3]
            if (axis := instruction.lane.partition(".")[0]) in members:
                peers = members[axis]
                return instruction._replace(meet=f"{op}.{stage}.{item}@{peers[0]}", peers=peers)
            if instruction.meet is None:
                return instruction
            if instruction.lane.endswith(ALL_TENSOR):
                peers = tuple(world_rank(plan, p, replica, t) for p in instruction.peers for t in range(plan.tensor))
                return instruction._replace(meet=f"{instruction.meet}@d{replica}", peers=peers)
            peers = tuple(world_rank(plan, p, replica, tensor) for p in instruction.peers)
            return instruction._replace(meet=f"{instruction.meet}@d{replica}t{tensor}", peers=peers)

        ranks.append(tuple(map(placed, program.ranks[pipeline])))
        buffers.append(program.buffers[pipeline])
    return Program(tuple(ranks), tuple(buffers), facts=program.facts)
