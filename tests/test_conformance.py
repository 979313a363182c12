"""Every schedule of the table, with every pass that is legal on it, gives the serial loss and gradients.

A schedule joins by being in the table: plans are drawn at random over ranks, micro-batches, chunks, uneven layers,
recompute, experts, whole or divided, offload, clipping, optimizer states on the host, replicas, what they share and
when they sum, backwards split or not, weight gradients joined or not, and the schedule's own axes. Then every schedule
with every way to cut the vocabulary's work over pipeline and tensor ranks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.traits import micro_batches, pipe_of, place_of
from autotune.planners.schedules import SCHEDULES, Pipe, schedule_of
from autotune.planners.schedules.vocabulary import VOCABULARIES
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.equal import assert_equal, shallow
from tests.pool import Pool

TIED = ModelSpec("deep-llama", "LlamaForCausalLM", 16, 9, 4, 4, 4, 24, 32, tied=True)
OPEN = ModelSpec("deep-qwen", "Qwen3ForCausalLM", 24, 10, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
SEARCHED = [name for name, entry in SCHEDULES.items() if entry.searched]
EACH = 2  # plans a schedule
DRAWS = 600  # after which a pass that was not drawn is taken not to be legal with a schedule


def mixed(model: ModelSpec) -> ModelSpec:
    """The same with every layer, or all but some, of experts."""
    if model.tied:
        return replace(model, architecture="MixtralForCausalLM", experts=Experts(4, 2, 8))
    return replace(model, architecture="Qwen3MoeForCausalLM", experts=Experts(4, 2, 8, dense_layers=(0, 3, 4)))


def shards(name: str, pipe: Pipe) -> bool:
    """Whether a vocabulary may be sharded under a schedule: where each stage is on one rank."""
    return all(len(ranks) == 1 for ranks in SCHEDULES[name].place(pipe))


def uneven(draw: random.Random, layers: int, stages: int) -> str:
    """A cut at random, each stage with at least one layer."""
    cuts = sorted(draw.sample(range(1, layers), stages - 1))
    return ",".join(str(b - a) for a, b in zip([0, *cuts], [*cuts, layers], strict=True))


def draw_plan(draw: random.Random, name: str) -> tuple[ModelSpec, Plan, Workload] | None:
    """One plan at random, or None where it is not legal."""
    entry, model = SCHEDULES[name], draw.choice([TIED, OPEN])
    pipeline = draw.choice([2, 2, 3, 4])
    data = draw.choice([1, 2]) if pipeline == 2 else 1
    chunks = draw.choice(entry.chunks)
    items = draw.choice([1, 2, 3, 4, 5, 6, 8])
    stages = pipeline * chunks
    if stages > model.layers:
        return None
    model = shallow(model, Plan(pipeline=pipeline, chunks=chunks), 2)
    plan = Plan(
        data,
        1,
        pipeline,
        1,
        name,
        chunks,
        draw.choice(["none", "selective", "full"]),
        "math",
        draw.choice([0, 1]) if data > 1 else 0,
        offload=draw.choice([0, 50, 100]),
        layers=draw.choice(["", uneven(draw, model.layers, stages)]),
        times=draw.choice(["", "20,24,11,2"]) if entry.timed else "",
    )
    update = random.Random(plan.digest)  # of how the step ends: drawn apart, so that it changes no other draw
    clip = update.choice([0.0, 0.1, 10.0])  # none; always, and never: the gradients' norm is about 1
    work = Workload(sequence_length=8, global_batch=items * data, precision="fp64", learning_rate=1e-2, clip=clip)
    plan = replace(plan, optimizer=update.choice(["barrier", "post-validated"]) if clip else "barrier")
    share = update.choice([0, 50, 100]) if plan.optimizer == "barrier" else 0
    plan = replace(plan, optimizer_offload=share, optimizer_stride=update.choice([0, 1, 3, 8]) if share else 0)
    plan = replace(plan, optimizer_window=update.choice([0, 1, 4]) if plan.optimizer_stride else 0)
    pipe = pipe_of(plan, items)
    if entry.refuse(pipe) or not entry.groups(pipe):
        return None
    if data > 1:
        zero = update.choice([plan.zero, 2, 3])
        plan = replace(plan, zero=zero, gathered=update.choice([0, 1, chunks]) if zero > 1 else 0)
        once = plan.zero == 3 and not plan.gathered
        plan = replace(plan, gather_each=update.choice(["step", "unit"]) if once else "step")
    if plan.offload:
        part = plan.offload < 100
        plan = replace(plan, offload_choice=update.choice(["selective", "uniform"]) if part else "selective")
        plan = replace(plan, offload_window=update.choice([1, 2, 3]))
    late = replace(plan, sync=update.choice(["eager", "late", "late"]))
    plan = late if why_not(model, work, late, late.world) is None else plan
    whole = not entry.splits  # else the schedule's own backwards are split
    plan = replace(plan, split=update.choice(["own", "own", "immediate", "fill", "end"]) if whole else "own")
    splits = schedule_of(name, plan.split).splits
    plan = replace(plan, weight_gradients=update.choice(["apart", "joined"]) if splits else "apart")
    plan = replace(plan, vocabulary=draw.choice(["ends", *VOCABULARIES]))
    plan = replace(plan, group=draw.choice(entry.groups(pipe)), limit=draw.choice(entry.limits(pipe)))
    if update.choice([True, False, False]) and why_not(mixed(model), work, plan, plan.world) is None:
        model = mixed(model)
        plan = replace(plan, expert=update.choice([1, 2]) if data > 1 else 1)
    return (model, plan, work) if why_not(model, work, plan, plan.world) is None else None


def kinds(plan: Plan) -> set[tuple[str, bool]]:
    """Which of the passes that a schedule must be seen with, and without, this plan has."""
    return {("vocabulary", plan.vocabulary != "ends"), ("offload", plan.offload > 0)}


@cache
def plans(name: str) -> list[Any]:
    """The first plans drawn that show something new, one of each kind that is legal among them, and then any others."""
    draw, found, seen, others = random.Random(name), [], set[tuple[str, bool]](), []
    for _ in range(DRAWS):
        drawn = draw_plan(draw, name)
        if drawn is None or drawn in found or drawn in others:
            continue
        new = kinds(drawn[1]) - seen
        seen |= new
        (found if new else others).append(drawn)
        if len(seen) == 4 and len(found) + len(others) >= EACH:
            break
    found += others[: max(0, EACH - len(found))]
    assert len(found) >= EACH, f"{name}: no legal plans of a small pipeline"
    return [pytest.param(*case, id=f"{name}-{i}") for i, case in enumerate(found)]


@pytest.mark.parametrize(("model", "plan", "work"), [case for name in SEARCHED for case in plans(name)])
def test_every_schedule_equals_the_serial_reference(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    assert_equal(pool, model, plan, work)


def sharded(name: str, vocabulary: str) -> list[Any]:
    """The schedule with the vocabulary over two pipeline ranks, each alone or each of two tensor ranks, or over four:
    each way to cut its work with another of these. No vocabulary here is a multiple of twice the shards."""
    entry, found = SCHEDULES[name], []
    model = {1: replace(OPEN, vocab=45), 2: replace(TIED, vocab=29)}
    turn = SEARCHED.index(name) + list(VOCABULARIES).index(vocabulary)
    for tensor, pipeline, shares in (SHAPES * 2)[turn % len(SHAPES) :][: len(SHAPES)]:
        chunks = next((c for c in entry.chunks if pipeline * c <= TIED.layers), 0)
        legal = [m for m in (4, 8, 16) if not entry.refuse(Pipe(pipeline, m, chunks))]
        if not chunks or not legal:
            continue
        plan = Plan(1, tensor, pipeline, 1, name, chunks, attention="math", vocabulary=vocabulary)
        plan = replace(plan, sequence_parallel=shares)
        work = Workload(sequence_length=8, global_batch=legal[0], precision="fp64", learning_rate=1e-2)
        cut = shallow(model[tensor], plan)
        if why_not(cut, work, plan, plan.world) is None:
            found.append(pytest.param(cut, plan, work, id=plan.describe()))
    assert found, f"{name}: no small pipeline may shard its vocabulary"
    return found[:1]


SHAPES = ((1, 2, False), (2, 2, False), (1, 4, False), (2, 2, True))  # tensor and pipeline ranks, tokens shared or not
SHARDED = [
    case
    for v, entry in VOCABULARIES.items()
    for name in (["1f1b"] if entry.together else SEARCHED)
    for case in sharded(name, v)
]


@pytest.mark.parametrize(("model", "plan", "work"), SHARDED)
def test_every_schedule_shards_its_vocabulary(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    assert_equal(pool, model, plan, work)


@pytest.mark.parametrize("name", SEARCHED)
def test_every_schedule_is_drawn_with_and_without_its_passes(name: str) -> None:
    seen = set().union(*(kinds(case.values[1]) for case in plans(name)))
    assert seen == {("vocabulary", False), ("vocabulary", True), ("offload", False), ("offload", True)}


@pytest.mark.parametrize("name", SEARCHED)
def test_what_a_schedule_says_of_itself(name: str) -> None:
    """Its placement holds every stage on as many ranks as its order uses, and `splits` says what the order does."""
    for case in plans(name):
        _, plan, work = case.values
        items = micro_batches(plan, work)
        pipe = pipe_of(plan, items)
        order, place = SCHEDULES[name].order(pipe), place_of(plan, items)
        assert {(step.stage, rank) for rank, steps in enumerate(order) for step in steps} == {
            (stage, rank) for stage, ranks in enumerate(place) for rank in ranks
        } or any(len(ranks) > 1 for ranks in place)
        assert any(step.op == "W" for steps in order for step in steps) == SCHEDULES[name].splits
