"""The outer program of one training step: the schedule's order, then messages, gradient sums and the update.

Buffers of stage s and micro-batch m: x.s.m the stage's input, a.s.m what its forward keeps, d.s.m the gradient of its
output; w.s weights, g.s gradients, o.s optimizer states; `tokens` and `targets` the step's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from autotune.planners.lower.body import TENSOR
from autotune.planners.lower.shape import Shape, training_shape
from autotune.planners.lower.stage import Sizes, sizes, stage_blocks
from autotune.planners.lower.workspace import Site
from autotune.planners.passes.communicate import communicate
from autotune.planners.resolve import Shared, uncollected
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


def stage_sizes(plan: Plan, model: ModelSpec, workload: Workload, site: Site | None = None) -> tuple[Sizes, ...]:
    """The bytes of every stage of a plan. `site` matters to what is transient alone."""
    return _stage_sizes(model, plan.stages, training_shape(plan, workload), plan.recompute, site or Site())


@lru_cache(maxsize=4096)
def _stage_sizes(model: ModelSpec, stages: int, shape: Shape, policy: str, site: Site) -> tuple[Sizes, ...]:
    return tuple(sizes(model, stages, s, shape, policy, site) for s in range(stages))


def state_bytes(parameters: int, precision: str, shards: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of `parameters` elements; states over `shards` data ranks.

    bf16 trains with fp32 gradients, master weights and two moments (Micikevicius et al., 1710.03740): 18 bytes.
    """
    padded = -(-parameters // shards)
    if precision == "bf16":
        return 2 * parameters, 4 * parameters, 12 * padded
    width = BYTES[precision]
    return width * parameters, width * parameters, 2 * width * padded


def _compute(step: Step, stages: int) -> Instruction:
    """One forward or backward with the buffers it touches."""
    op, s, m = step
    first, last = s == 0, s == stages - 1
    here, grad = f"x.{s}.{m}", f"d.{s}.{m}"
    inputs = (f"w.{s}", "tokens" if first else here) + (("targets",) if last else ())
    if op == "F":
        output = "loss" if last else f"x.{s + 1}.{m}"
        return Instruction(op, s, m, reads=inputs, writes=(f"a.{s}.{m}", output))
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


@lru_cache(maxsize=1024)
def _sums_partial(model: ModelSpec, plan: Plan) -> tuple[bool, ...]:
    """Of each stage, whether it has such weights. `plan` has only the axes that matter, so that few are different."""
    return tuple(any(partial_weights(b, plan) for b in stage) for stage in stage_blocks(model, plan.stages))


def _update(stage: int, data: int, zero: int, partial: bool) -> list[Instruction]:
    """What follows a stage's last backward: sum the gradients over the replicas, step, share the new weights."""
    w, g, o = f"w.{stage}", f"g.{stage}", f"o.{stage}"
    step = Instruction("OPT", stage, reads=(g, w), writes=(w, o, g))
    first = [Instruction("SUM_PARTIAL", stage, lane=TENSOR, reads=(g,), writes=(g,))] if partial else []
    if data == 1:
        return [*first, step]
    if zero == 0:
        return [*first, Instruction("ALL_REDUCE", stage, lane=DATA, reads=(g,), writes=(g,)), step]
    return [
        *first,
        Instruction("REDUCE_SCATTER", stage, lane=DATA, reads=(g,), writes=(g,)),
        step,
        Instruction("ALL_GATHER", stage, lane=DATA, reads=(w,), writes=(w,)),
    ]


def _names(rank: int, place: tuple[int, ...], items: int) -> list[str]:
    """Everything a rank may hold. What crosses ranks is declared where it is written; the pass adds the other end."""
    names: list[str] = []
    for s in (s for s, owner in enumerate(place) if owner == rank):
        first, last = s == 0, s == len(place) - 1
        names += [f"w.{s}", f"g.{s}", f"o.{s}", *(["tokens"] if first else []), *(["targets", "loss"] if last else [])]
        for m in range(items):
            names.append(f"a.{s}.{m}")
            if not last:
                names.append(f"x.{s + 1}.{m}")
            if not first:
                names.append(f"d.{s - 1}.{m}")
    return names


def _kind(name: str) -> str:
    """What the size of a buffer depends on: its name without the micro-batch."""
    return name.rpartition(".")[0] if name.count(".") == 2 else name


def _kinds(plan: Plan, sizes: tuple[Sizes, ...], w: Workload) -> Mapping[str, Buffer]:
    """The buffer of every kind: sizes, and whether it outlives the step."""
    tokens = Buffer(micro_batches(plan, w) * plan.micro_batch * w.sequence_length * 8, persistent=True)
    shards = plan.data if plan.zero else 1
    kinds = {"tokens": tokens, "targets": tokens, "loss": Buffer(max(4, BYTES[w.precision]), persistent=True)}
    for s, size in enumerate(sizes):
        parts = state_bytes(size.parameters, w.precision, shards)
        kinds |= {f"{n}.{s}": Buffer(b, persistent=True) for n, b in zip("wgo", parts, strict=True)}
        kinds |= {f"a.{s}": Buffer(size.saved), f"x.{s + 1}": Buffer(size.output), f"d.{s - 1}": Buffer(size.inputs)}
    return kinds


def _tie(program: list[list[Instruction]], place: tuple[int, ...], last: int) -> None:
    """Tied embeddings on two ranks: their gradients are summed before either stage is updated."""
    ends = (place[0], place[last])
    for rank, stage in zip(ends, (0, last), strict=True):
        g = f"g.{stage}"
        tie = Instruction("TIE", stage, lane="tie", reads=(g,), writes=(g,), meet="tie", peers=tuple(sorted(ends)))
        program[rank].append(tie)


class Outline(NamedTuple):
    """What plans of one schedule share: the lists, and the kind of every buffer they name."""

    ranks: Shared
    kinds: tuple[dict[str, str], ...]
    place: tuple[int, ...]


Key = tuple[str, int, int, int, int, int, tuple[bool, ...], bool]

MOST_INSTRUCTIONS = 300_000  # of the outlines that are kept: about 1 kB each with what is resolved about them
_outlines: dict[Key, Outline] = {}  # the one used last is last


def _outline(key: Key) -> Outline:
    found = _outlines.pop(key, None)
    if found is None:
        with uncollected():
            found = _draw(*key)
    _outlines[key] = found
    while len(_outlines) > 1 and sum(len(r) for o in _outlines.values() for r in o.ranks) > MOST_INSTRUCTIONS:
        del _outlines[next(iter(_outlines))]
    return found


def _draw(
    name: str, pipeline: int, items: int, chunks: int, data: int, zero: int, partial: tuple[bool, ...], tied: bool
) -> Outline:
    schedule, stages = SCHEDULES[name], pipeline * chunks
    place = schedule.place(pipeline, chunks)
    order = schedule.order(pipeline, items, chunks)
    persistent = {kind: kind[0] not in "axd" for kind in map(_kind, _names(0, (0,) * stages, 1))}
    buffers = tuple(
        {n: Buffer(persistent=persistent[_kind(n)]) for n in _names(r, place, items)} for r in range(pipeline)
    )
    program = communicate(Program(tuple(tuple(_compute(step, stages) for step in steps) for steps in order), buffers))
    ranks = [list(listing) for listing in program.ranks]
    if tied and place[0] != place[-1]:
        _tie(ranks, place, stages - 1)
    for stage, rank in enumerate(place):
        ranks[rank] += _update(stage, data, zero, partial[stage])
    kinds = tuple({n: _kind(n) for n in held} for held in program.buffers)
    return Outline(Shared(tuple(map(tuple, ranks))), kinds, place)


def lower_training(plan: Plan, model: ModelSpec, workload: Workload) -> Program:
    """The step's program over pipeline ranks. Data and tensor peers run the same one: `expand` makes them explicit."""
    items = micro_batches(plan, workload)
    axes = Plan(
        tensor=plan.tensor, pipeline=plan.pipeline, chunks=plan.chunks, sequence_parallel=plan.sequence_parallel
    )
    key = (plan.schedule, plan.pipeline, items, plan.chunks, min(plan.data, 2), plan.zero)
    outline = _outline((*key, _sums_partial(model, axes), model.tied))
    kinds = _kinds(plan, stage_sizes(plan, model, workload), workload)
    buffers = tuple({name: kinds[kind] for name, kind in held.items()} for held in outline.kinds)
    return Program(outline.ranks, buffers, facts={"place": outline.place})
