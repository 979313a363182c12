"""From pipeline ranks to every rank of the world: tensor fastest, then data, then pipeline (as Megatron-LM orders)."""

from __future__ import annotations

from autotune.spec.plan import Plan
from autotune.spec.program import ALL_TENSOR, DATA, TENSOR, Instruction, Program

Axes = dict[str, tuple[int, ...]]


def coordinates(plan: Plan, rank: int) -> tuple[int, int, int]:
    """(pipeline, data, tensor) of a world rank."""
    rest, tensor = divmod(rank, plan.tensor)
    pipeline, data = divmod(rest, plan.data)
    return pipeline, data, tensor


def world_rank(plan: Plan, pipeline: int, data: int, tensor: int) -> int:
    return (pipeline * plan.data + data) * plan.tensor + tensor


def groups(plan: Plan, axis: str) -> list[tuple[int, ...]]:
    """All groups of ranks that differ along one axis of the mesh alone: "data", "tensor" or "pipeline"."""
    extent = {"pipeline": plan.pipeline, "data": plan.data, "tensor": plan.tensor}
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(plan.world):
        at = dict(zip(extent, coordinates(plan, rank), strict=True))
        at.pop(axis)
        found.setdefault(tuple(at.values()), []).append(rank)
    return [tuple(g) for g in found.values()]


def expand(program: Program, plan: Plan) -> Program:
    """The same program over all ranks, every meeting explicit: what the workers run and record."""
    ranks, buffers = [], []
    for rank in range(plan.world):
        pipeline, data, tensor = coordinates(plan, rank)
        # A lane named after an axis of the mesh, or after one and a dot, meets along that axis.
        members = {
            DATA: tuple(world_rank(plan, pipeline, d, tensor) for d in range(plan.data)),
            TENSOR: tuple(world_rank(plan, pipeline, data, t) for t in range(plan.tensor)),
        }

        def placed(
            instruction: Instruction, data: int = data, tensor: int = tensor, members: Axes = members
        ) -> Instruction:
            op, stage, item = instruction[:3]
            if (axis := instruction.lane.partition(".")[0]) in members:
                peers = members[axis]
                return instruction._replace(meet=f"{op}.{stage}.{item}@{peers[0]}", peers=peers)
            if instruction.meet is None:
                return instruction
            if instruction.lane.endswith(ALL_TENSOR):
                peers = tuple(world_rank(plan, p, data, t) for p in instruction.peers for t in range(plan.tensor))
                return instruction._replace(meet=f"{instruction.meet}@d{data}", peers=peers)
            peers = tuple(world_rank(plan, p, data, tensor) for p in instruction.peers)
            return instruction._replace(meet=f"{instruction.meet}@d{data}t{tensor}", peers=peers)

        ranks.append(tuple(map(placed, program.ranks[pipeline])))
        buffers.append(program.buffers[pipeline])
    return Program(tuple(ranks), tuple(buffers), facts=program.facts)
