"""Ranks that divide the experts: equal to the serial reference, with the bytes of the closed form, or refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from autotune.planners.costs.works import flops, works
from autotune.planners.feasible import why_not
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.expand import groups
from autotune.planners.lower.shape import Shape, training_shape
from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.planners.lower.traits import micro_batches, stage_sizes
from autotune.planners.space import Enumeration
from autotune.planners.validate import validate
from autotune.runners.expert_layouts import by_expert, by_rank, places, splits
from autotune.runners.ops import Env
from autotune.spec.experts_graph import divided
from autotune.spec.graph import blocks
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.work import Collective
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.operands import make_env
from tests.pool import Pool
from tests.prices import bare
from tests.test_conformance import SEARCHED, draw_plan, mixed
from tests.test_equality import DEEPSEEK, MIXTRAL, SPARSE, WORK

V2 = replace(
    DEEPSEEK,
    name="tiny-deepseek-v2",
    architecture="DeepseekV2ForCausalLM",
    experts=Experts(8, 3, 8, 16, first_layer=1, groups=4, top_groups=2, normalise=False, scale=1.5),
)
CLIPPED = replace(WORK, clip=0.1)

# Every token visits every expert: as many rows come to a rank as go, and bytes are those of the program.
EVEN = replace(MIXTRAL, name="tiny-even", experts=Experts(4, 4, 12))
# Two tokens a micro-batch, each with one of eight experts: most ranks get no rows, and most experts none.
LONELY = replace(MIXTRAL, name="tiny-lonely", experts=Experts(8, 1, 12))
FEW = replace(CLIPPED, sequence_length=2, global_batch=8)
VALIDATED = Plan(2, pipeline=2, expert=2, optimizer="post-validated")

EQUAL = [
    (MIXTRAL, Plan(2, expert=2), WORK),
    (MIXTRAL, Plan(4, expert=2, micro_batch=2, recompute="selective"), CLIPPED),
    (MIXTRAL, Plan(4, expert=4, recompute="full", zero=1), CLIPPED),
    (MIXTRAL, Plan(2, tensor=2, expert=2, zero=1), WORK),
    (SPARSE, Plan(2, tensor=2, expert=2, sequence_parallel=True, recompute="selective", zero=2), CLIPPED),
    (SPARSE, Plan(4, expert=2, zero=3, micro_batch=2), CLIPPED),
    (SPARSE, Plan(2, expert=2, zero=1, recompute="full"), WORK),
    (SPARSE, Plan(2, pipeline=2, expert=2, zero=1, recompute="selective"), CLIPPED),
    (SPARSE, Plan(2, pipeline=2, expert=2, schedule="interleaved-1f1b", chunks=2, zero=3, gathered=1), CLIPPED),
    (DEEPSEEK, Plan(4, expert=4), CLIPPED),
    (DEEPSEEK, Plan(4, expert=2, zero=2, recompute="full"), WORK),
    (DEEPSEEK, Plan(2, pipeline=2, expert=2, schedule="zb-h1"), CLIPPED),
    (V2, Plan(2, tensor=2, expert=2, recompute="full"), CLIPPED),
    (V2, Plan(2, expert=2, zero=3), WORK),
    (MIXTRAL, Plan(context=2, expert=2, micro_batch=2), WORK),
    (MIXTRAL, Plan(2, context=2, expert=4, context_ring=2, zero=1), CLIPPED),
    (MIXTRAL, VALIDATED, CLIPPED),
    (MIXTRAL, replace(VALIDATED, zero=1), CLIPPED),
    (MIXTRAL, Plan(2, pipeline=2, expert=2, schedule="dualpipe", sync="late"), WORK),
    (MIXTRAL, Plan(2, pipeline=2, expert=2, vocabulary="vocab-2", offload=100), CLIPPED),
    (MIXTRAL, Plan(2, expert=2, optimizer_offload=50, optimizer_stride=2), CLIPPED),
    (MIXTRAL, Plan(4, expert=2, optimizer_offload=60, optimizer_stride=3, zero=1), CLIPPED),
    (EVEN, Plan(4, expert=2, optimizer_offload=100, optimizer_stride=2, zero=2, micro_batch=2), CLIPPED),
    (EVEN, Plan(2, expert=2, optimizer_offload=100, zero=3), WORK),
    (replace(MIXTRAL, tied=True), Plan(2, pipeline=2, expert=2, zero=2), CLIPPED),
    (LONELY, Plan(4, expert=4, recompute="selective"), FEW),
    (LONELY, Plan(4, expert=4, zero=3), FEW),
    (EVEN, Plan(2, expert=2), WORK),
    (EVEN, Plan(4, expert=2, zero=1, recompute="selective"), CLIPPED),
    (EVEN, Plan(2, tensor=2, expert=2, zero=3, recompute="full"), CLIPPED),
    (EVEN, Plan(2, tensor=2, expert=2, sequence_parallel=True, zero=2), WORK),
    (EVEN, Plan(2, pipeline=2, expert=2, schedule="zb-h1", recompute="selective"), WORK),
    (EVEN, Plan(4, expert=4, recompute="full"), WORK),
]


@pytest.mark.parametrize(("model", "plan", "work"), EQUAL, ids=[plan.describe() for _, plan, _ in EQUAL])
def test_plan_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    plan = replace(plan, attention="math")
    assert why_not(model, work, plan, plan.world) is None
    assert_equal(pool, model, plan, work)


MOST_PARTS = 8  # micro-batches times chunks of a rank


def drawn(name: str) -> tuple[ModelSpec, Plan, Workload]:
    """A plan of a schedule at random whose two replicas divide the experts: a small one, for each of its parts has
    blocks of experts."""
    draw = random.Random(f"experts {name}")
    while True:
        if (case := draw_plan(draw, name)) is None:
            continue
        model, plan, work = case
        model = model if model.experts else mixed(model)
        plan = replace(plan, expert=2, weight_gradients="apart")
        small = plan.chunks * micro_batches(plan, work) <= MOST_PARTS
        if plan.data == 2 and small and why_not(model, work, plan, plan.world) is None:
            return model, plan, work


@pytest.mark.parametrize("name", SEARCHED)
def test_every_schedule_equals_the_reference(pool: Pool, name: str) -> None:
    assert_equal(pool, *drawn(name))


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(("tensor", "ranks"), [(1, 2), (2, 2), (1, 4)])
def test_bytes_and_work(policy: str, tensor: int, ranks: int) -> None:
    """What a layer's forward and backward put on links and compute, on each rank, with a router in balance.

    Rows go to their experts and back, and their gradients as well; a row has `hidden` elements, with a weight on the
    way there. Where all runs again rows go once more (the way back is not needed again). Counts of rows go before, four
    bytes an expert. The share (ranks - 1) / ranks goes to others. Each rank computes as much as without.
    """
    model, shape = MIXTRAL, Shape(2, 8, 8, tensor, dtype="fp32", expert=ranks)
    assert model.experts
    layer = divided(blocks(model)[1], ranks)
    body = lower_block(layer, shape, policy)
    alone = replace(shape, expert=1)
    whole = lower_block(blocks(model)[1], alone, policy)
    rows, others, again = 16 * model.experts.top_k, (ranks - 1) / ranks, policy == "full"
    there, back, counts = (4 * (model.hidden + 1) * rows, 4 * model.hidden * rows, 4 * model.experts.count)
    for program, one, sent in (
        (body.forward, whole.forward, there + back + counts),
        (body.backward, whole.backward, there + back + again * (there + counts)),
    ):
        done = [w for i in program.ranks[0] for w in works(layer, body, i, shape) if isinstance(w, Collective)]
        exchanged = [w for w in done if w.op == "all_to_all"]
        assert sum(w.bytes for w in exchanged) == sent * others
        assert {w.group for w in exchanged} == {ranks}
        assert flops(layer, program, body, shape) == flops(blocks(model)[1], one, whole, alone)
    for program in (body.forward, body.backward, body.input_gradient, body.weight_gradient):
        kept = replace(program, facts={"leaves": True})
        validate(kept)
        validate(kept, inline=True)


@pytest.mark.parametrize(
    ("plan", "even"), [(Plan(4, expert=2), True), (Plan(2, 2, expert=2), True), (Plan(4, expert=4), False)]
)
def test_what_ranks_send_is_what_is_priced(pool: Pool, plan: Plan, even: bool) -> None:
    """In balance every rank sends the bytes of the formula. Elsewhere a rank gets more or fewer rows, all ranks of a
    group together as many: none is lost."""
    model, plan = EVEN if even else MIXTRAL, replace(plan, attention="math")
    assert model.experts
    shape, layer = training_shape(plan, WORK), divided(blocks(model)[1], plan.expert)
    body = lower_block(layer, shape, plan.recompute)
    said = [
        w.bytes
        for program in (body.forward, body.backward)
        for i in program.ranks[0]
        for w in works(layer, body, i, shape)
        if isinstance(w, Collective) and w.op == "all_to_all"
    ]
    found = pool.run("expert_rows", plan.world, plan=plan, model=model, workload=WORK)
    steps = micro_batches(plan, WORK) * model.layers
    rows = shape.tokens * model.experts.top_k
    if even:
        assert [sum(handed) for handed, _ in found] == [steps * sum(said)] * plan.world
    calls = list(zip(*(came for _, came in found), strict=True))
    moved = [call for call in calls if sum(call) > plan.world * plan.expert]  # the others tell how many
    assert len(moved) == steps * 6  # rows and weights go, rows come back; and so do gradients
    assert all(sum(call) == plan.world * rows for call in moved)
    assert even == all(set(call) == {rows} for call in moved)


def test_rows_as_they_came_and_by_expert() -> None:
    """Rows of three ranks for two experts, one of them none from two ranks: each where it belongs, and back."""
    counts = torch.tensor([[2, 1], [0, 0], [3, 0]], dtype=torch.int32)
    ends = torch.tensor([1, 2, 2, 5, 6, 6], dtype=torch.int32)
    env: Env = make_env(MIXTRAL, {})
    (told,) = splits((), env, None, (ends, counts))
    assert told.tolist() == [[2, 3, 1], [3, 0, 3]] and told.device.type == "cpu"
    index, own = places((), env, None, (counts, told))
    came = torch.tensor([[0, 0], [0, 0], [0, 1], [2, 0], [2, 0], [2, 0]])  # the rank that a row is from, its expert
    (sorted_,) = by_expert((), env, None, (came, index))
    assert sorted_.tolist() == [[0, 0], [0, 0], [2, 0], [2, 0], [2, 0], [0, 1]] and own.tolist() == [5, 6]
    (back,) = by_rank((), env, None, (sorted_, index))
    assert torch.equal(back, came)


@pytest.mark.parametrize("model", [MIXTRAL, SPARSE, DEEPSEEK, V2], ids=lambda m: m.name)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_asks_for_its_experts_alone(model: ModelSpec, ranks: int) -> None:
    """Of the checkpoint's tensors each expert's are one rank's; all others are every rank's."""
    cut = cut_of(Plan(ranks, expert=ranks), model)
    asked = [
        {name for block in stage_blocks(model, cut, rank)[0] for w in block.tensors() for name, _ in w.parts}
        for rank in range(ranks)
    ]
    every = {name for block in blocks(model) for w in block.tensors() for name, _ in w.parts}
    routed = {name for name in every if ".experts." in name}
    assert routed and set().union(*asked) == every
    for names in asked:
        assert names >= every - routed
        assert len(names & routed) * ranks == len(routed)


def test_a_rank_holds_its_share() -> None:
    """Weights and gradients of its experts and of all the rest; with ZeRO, states over those that hold the same."""
    whole, half = (stage_sizes(Plan(4, expert=e), MIXTRAL, WORK)[0] for e in (1, 2))
    assert half.routed * 2 == whole.routed and half.parameters == whole.parameters - half.routed
    plan = Plan(2, 2, context=2, expert=2)
    assert plan.copies == 2 and plan.world == 8
    assert groups(plan, "expert")[:2] == [(0, 2), (1, 3)]
    assert groups(plan, "copies")[:2] == [(0, 4), (1, 5)]


REFUSED = [
    (MIXTRAL, Plan(3, expert=3), "expert must divide experts 4 (found 3; nearest 1)"),
    (MIXTRAL, Plan(2, expert=4), "expert must divide replicas (data x context) 2 (found 4; nearest 2)"),
    (MIXTRAL, Plan(8, expert=8), "expert must divide experts 4 (found 8; nearest 4)"),
    (MIXTRAL, Plan(expert=0), "every degree must be at least 1"),
    (replace(MIXTRAL, experts=None, architecture="MistralForCausalLM"), Plan(2, expert=2),
     "expert needs a model with experts: MistralForCausalLM has none (found 2; nearest 1)"),
    (MIXTRAL, Plan(2, tensor=8, expert=2), "tensor must divide heads 4 (found 8; nearest 4)"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "plan", "reason"), REFUSED)
def test_what_cannot_be_divided_is_refused(model: ModelSpec, plan: Plan, reason: str) -> None:
    assert why_not(model, replace(WORK, global_batch=24), plan) == reason


def test_a_generation_does_not_divide_experts() -> None:
    asked = Workload("generate", prompt_length=8, new_tokens=8, batch=2, precision="fp64")
    reason = why_not(MIXTRAL, asked, Plan(2, expert=2))
    assert reason == (
        "expert needs training: a captured pass of a generation cannot wait for how many rows come (found 2; nearest 1)"
    )


def test_degrees_are_searched() -> None:
    """Every one that divides both, or what the recipe says; what does not fit is counted with its reason."""
    work = replace(WORK, precision="bf16")
    for model, axes, expected in (
        (MIXTRAL, {}, {1, 2, 4}),
        (MIXTRAL, {"expert": (2,)}, {2}),
        (replace(MIXTRAL, experts=None, architecture="MistralForCausalLM"), {}, {1}),
        (MIXTRAL, {"tensor": (2,)}, {1, 2}),
    ):
        assert {plan.expert for plan in Enumeration(Question(model, work, bare(), 4, axes))} == expected
    space = Enumeration(Question(MIXTRAL, work, bare(), 4, {"expert": (3,)}))
    assert not list(space) and "expert must divide experts 4" in space.infeasible
