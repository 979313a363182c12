"""The outer program of one training step: the schedule's order, then messages, gradient sums and the update.

Buffers of stage s and micro-batch m: x.s.m the stage's input, a.s.m what its forward keeps, d.s.m the gradient of its
output; w.s weights, g.s gradients, o.s optimizer states; `tokens` and `targets` the step's data.
"""

from __future__ import annotations

from autotune.planners.lower.body import TENSOR
from autotune.planners.lower.shape import training_shape
from autotune.planners.lower.stage import Sizes, sizes, stage_blocks
from autotune.planners.passes.communicate import communicate
from autotune.planners.schedules import SCHEDULES, Step
from autotune.spec.graph import Block, Weight
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload

DATA = "data"  # the lane of collectives over the data ranks


def micro_batches(plan: Plan, workload: Workload) -> int:
    """Micro-batches that one replica runs in a step."""
    return workload.global_batch // (plan.data * plan.micro_batch)


def stage_sizes(plan: Plan, model: ModelSpec, workload: Workload) -> tuple[Sizes, ...]:
    """The bytes of every stage of a plan."""
    shape = training_shape(plan, workload)
    return tuple(sizes(model, plan.stages, s, shape, plan.recompute) for s in range(plan.stages))


def state_bytes(parameters: int, precision: str, shards: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of `parameters` elements; states over `shards` data ranks.

    bf16 trains with fp32 gradients, master weights and two moments (Micikevicius et al., 1710.03740): 18 bytes.
    """
    padded = -(-parameters // shards)
    if precision == "bf16":
        return 2 * parameters, 4 * parameters, 12 * padded
    width = BYTES[precision]
    return width * parameters, width * parameters, 2 * width * padded


def _compute(step: Step, sizes: tuple[Sizes, ...]) -> Instruction:
    """One forward or backward with the buffers it touches."""
    op, s, m = step
    first, last = s == 0, s == len(sizes) - 1
    here, grad = f"x.{s}.{m}", f"d.{s}.{m}"
    inputs = (f"w.{s}", "tokens" if first else here) + (("targets",) if last else ())
    if op == "F":
        made = ("loss",) if last else (f"x.{s + 1}.{m}",)
        return Instruction(op, s, m, reads=inputs, writes=(f"a.{s}.{m}", *made))
    frees = (f"a.{s}.{m}", *(() if first else (here,)), *(() if last else (grad,)))
    made = () if first else (f"d.{s - 1}.{m}",)
    return Instruction(op, s, m, reads=(*inputs, *dict.fromkeys(frees)), writes=(f"g.{s}", *made), frees=frees)


def partial_weights(block: Block, plan: Plan) -> tuple[Weight, ...]:
    """Weights that every tensor rank holds whole but sees only a part of the work for, its heads or its tokens.

    Their gradients are partial sums (Megatron-LM all-reduces them after the last backward).
    """
    return tuple(
        weight
        for node in block.nodes
        if plan.tensor > 1 and (node.split == "heads" or (plan.sequence_parallel and not node.split))
        for weight in node.weights
        if weight.shard is None
    )


def _update(stage: int, plan: Plan, blocks: tuple[Block, ...]) -> list[Instruction]:
    """What follows a stage's last backward: sum the gradients over the replicas, step, share the new weights."""
    w, g, o = f"w.{stage}", f"g.{stage}", f"o.{stage}"
    step = Instruction("OPT", stage, reads=(g, w), writes=(w, o, g))
    first = []
    if any(partial_weights(block, plan) for block in blocks):
        first = [Instruction("SUM_PARTIAL", stage, lane=TENSOR, reads=(g,), writes=(g,))]
    if plan.data == 1:
        return [*first, step]
    if plan.zero == 0:
        return [*first, Instruction("ALL_REDUCE", stage, lane=DATA, reads=(g,), writes=(g,)), step]
    return [
        *first,
        Instruction("REDUCE_SCATTER", stage, lane=DATA, reads=(g,), writes=(g,)),
        step,
        Instruction("ALL_GATHER", stage, lane=DATA, reads=(w,), writes=(w,)),
    ]


def _buffers(rank: int, place: tuple[int, ...], plan: Plan, sizes: tuple[Sizes, ...], w: Workload) -> dict[str, Buffer]:
    """Everything a rank may hold. What crosses ranks is declared where it is written; the pass adds the other end."""
    items = micro_batches(plan, w)
    held: dict[str, Buffer] = {}
    tokens = Buffer(items * plan.micro_batch * w.sequence_length * 8, persistent=True)
    shards = plan.data if plan.zero else 1
    for s in (s for s, owner in enumerate(place) if owner == rank):
        size = sizes[s]
        parts = state_bytes(size.parameters, w.precision, shards)
        held |= {f"{n}.{s}": Buffer(b, persistent=True) for n, b in zip("wgo", parts, strict=True)}
        if s == 0:
            held["tokens"] = tokens
        if s == len(sizes) - 1:
            held |= {"targets": tokens, "loss": Buffer(max(4, BYTES[w.precision]), persistent=True)}
        for m in range(items):
            held[f"a.{s}.{m}"] = Buffer(size.saved)
            if s + 1 < len(sizes):
                held[f"x.{s + 1}.{m}"] = Buffer(size.output)
            if s:
                held[f"d.{s - 1}.{m}"] = Buffer(size.inputs)
    return held


def _tie(program: list[list[Instruction]], place: tuple[int, ...], last: int) -> None:
    """Tied embeddings on two ranks: their gradients are summed before either stage is updated."""
    ends = (place[0], place[last])
    for rank, stage in zip(ends, (0, last), strict=True):
        g = f"g.{stage}"
        tie = Instruction("TIE", stage, lane="tie", reads=(g,), writes=(g,), meet="tie", peers=tuple(sorted(ends)))
        program[rank].append(tie)


def lower_training(plan: Plan, model: ModelSpec, workload: Workload) -> Program:
    """The step's program over pipeline ranks. Data and tensor peers run the same one: `expand` makes them explicit."""
    schedule = SCHEDULES[plan.schedule]
    sizes = stage_sizes(plan, model, workload)
    place = schedule.place(plan.pipeline, plan.chunks)
    order = schedule.order(plan.pipeline, micro_batches(plan, workload), plan.chunks)
    buffers = tuple(_buffers(rank, place, plan, sizes, workload) for rank in range(plan.pipeline))
    compute = tuple(tuple(_compute(step, sizes) for step in steps) for steps in order)
    program = communicate(Program(compute, buffers))
    ranks = [list(listing) for listing in program.ranks]
    last = len(sizes) - 1
    stages = stage_blocks(model, plan.stages)
    if model.tied and place[0] != place[last]:
        _tie(ranks, place, last)
    for stage, rank in enumerate(place):
        ranks[rank] += _update(stage, plan, stages[stage])
    return Program(tuple(map(tuple, ranks)), program.buffers, facts={"place": place})
