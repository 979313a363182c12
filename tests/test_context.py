"""Ranks that share sequences: equal to the serial reference, with the bytes of the closed form, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autotune.planners.costs.works import flops, works
from autotune.planners.feasible import why_not
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.expand import coordinates, groups
from autotune.planners.lower.shape import Shape
from autotune.planners.space import Enumeration
from autotune.planners.validate import validate
from autotune.runners.ops import OPERATIONS, Env
from autotune.runners.training import places
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.work import Collective
from autotune.spec.workload import Workload
from tests.equal import assert_equal, busy
from tests.pool import Pool
from tests.prices import bare

LLAMA = ModelSpec("tiny-llama", "LlamaForCausalLM", 16, 4, 4, 4, 8, 24, 32, tied=True)
QWEN = ModelSpec("tiny-qwen", "Qwen3ForCausalLM", 24, 5, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
SLIDING = ModelSpec("tiny-mistral", "MistralForCausalLM", 16, 2, 8, 4, 4, 24, 32, window=3)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
CLIPPED = replace(WORK, clip=0.1)

EQUAL = [
    (QWEN, Plan(context=2, micro_batch=2, zero=1, recompute="full"), WORK),
    (SLIDING, Plan(context=2, micro_batch=2, attention="sdpa"), WORK),
    (LLAMA, Plan(context=4, attention="sdpa", zero=2, recompute="selective"), CLIPPED),
    (QWEN, Plan(context=2, tensor=2, sequence_parallel=True, recompute="selective"), WORK),
    (LLAMA, Plan(context=2, pipeline=2, attention="sdpa", zero=3, micro_batch=2), WORK),
    (QWEN, Plan(context=2, pipeline=2, vocabulary="vocab-2", offload=100), WORK),
    (LLAMA, Plan(context=2, pipeline=2, schedule="2bp-1f1b", weight_gradients="joined", recompute="full"), WORK),
    (LLAMA, Plan(data=2, context=2, zero=3, micro_batch=2), CLIPPED),
    (QWEN, Plan(context=2, context_ring=2, micro_batch=2), WORK),
    (LLAMA, Plan(context=2, context_ring=2, attention="sdpa", recompute="full", zero=1), WORK),
    (LLAMA, Plan(context=4, context_ring=4, micro_batch=2, recompute="full"), WORK),
    (QWEN, Plan(context=4, context_ring=4, attention="sdpa", zero=3, recompute="selective"), WORK),
    (QWEN, Plan(context=4, context_ring=2, zero=2, micro_batch=2), CLIPPED),
    (LLAMA, Plan(context=2, context_ring=2, tensor=2, sequence_parallel=True), WORK),
    (
        QWEN,
        Plan(context=2, context_ring=2, pipeline=2, schedule="2bp-1f1b", weight_gradients="joined", recompute="full"),
        WORK,
    ),
]


@pytest.mark.parametrize(("model", "plan", "work"), EQUAL, ids=[plan.describe() for _, plan, _ in EQUAL])
def test_plan_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    plan = replace(plan, attention="math") if plan.attention != "sdpa" or model.window else plan
    work = busy(work, plan)
    assert why_not(model, work, plan, plan.world) is None
    assert_equal(pool, model, plan, work)


LAYOUTS = [(1, 2, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2), (2, 2, 2), (1, 4, 2), (1, 4, 4)]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(("tensor", "context", "ring"), LAYOUTS)
def test_bytes_and_work(policy: str, tensor: int, context: int, ring: int) -> None:
    """What a layer's forward and backward put on links, per rank, and how much they compute.

    Of u ranks that exchange heads each sends (u - 1) / u of q, k, v and o of its tokens (2309.14509, section 3.2), the
    backward as much, and the forward's once more where it all runs again. In a ring of n each passes k and v on n - 1
    times; in the backward again, and their gradients. Each rank computes its part of the whole, but for a ring's
    diagonals: 2 n pieces a sequence have more of them than one.
    """
    layer, users = blocks(QWEN)[1], context // ring
    alone = Shape(2, 8, 8, tensor, dtype="fp32")
    shared = replace(alone, queries=8 // context, context=context, ring=ring)
    body, one = lower_block(layer, shared, policy), lower_block(layer, alone, policy)
    each = shared.tokens * 4 * QWEN.head_dim // tensor  # bytes of a head
    exchanged = 2 * (QWEN.heads + QWEN.kv_heads) * each * (users - 1) / users
    passed = 2 * QWEN.kv_heads * each * (ring - 1)
    again = policy == "full"
    for program, whole, exchanges, passes in (
        (body.forward, one.forward, 1, 1),
        (body.backward, one.backward, 1 + again, 2),
    ):
        done = [w for i in program.ranks[0] for w in works(layer, body, i, shared) if isinstance(w, Collective)]
        assert sum(w.bytes for w in done if w.op == "all_to_all") == exchanges * exchanged
        assert sum(w.bytes for w in done if w.op == "send_recv") == passes * passed
        assert {w.group for w in done if w.op == "all_to_all"} == ({users} if users > 1 else set())
        own, all_of_it = flops(layer, program, body, shared), flops(layer, whole, one, alone)
        products = 2 if program is body.forward else 5 + 2 * again
        diagonal = 2 * products * 2 * QWEN.heads * QWEN.head_dim / tensor * 8 / 2  # half of each token's own pair
        assert own == pytest.approx(all_of_it / context + diagonal * (ring - 1) / context, rel=1e-12)
    for program in (body.forward, body.backward, body.input_gradient, body.weight_gradient):
        kept = replace(program, facts={"leaves": True})
        validate(kept)
        validate(kept, inline=True)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_merge_into_whole_attention(backend: str, ranks: int) -> None:
    """In any number of ranks, here one after another: o, lse and all gradients, each rank with its two pieces."""
    torch.manual_seed(0)
    (node,) = (n for n in blocks(SLIDING)[1].nodes if n.op == "attention")
    node = replace(node, attrs=tuple((name, 0 if name == "window" else value) for name, value in node.attrs))
    length, kinds = 12, (SLIDING.heads, SLIDING.kv_heads, SLIDING.kv_heads, SLIDING.heads)
    plan, work = Plan(context=ranks, context_ring=ranks), replace(WORK, sequence_length=length)
    q, k, v, g = (torch.randn(2, length, heads * SLIDING.head_dim, dtype=torch.float64) for heads in kinds)
    here = [places(plan, work, rank) for rank in range(ranks)]
    positions, rope = torch.arange(length), (torch.ones(0), torch.ones(0))
    first, more = OPERATIONS["attention"], OPERATIONS["attention_more"]
    assert first.dgrad and more.dgrad

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[2])

    whole = Env(SLIDING, 2, length, positions, rope, {}, attention=backend)
    o, lse = first.forward(whole, node, flat(q), flat(k), flat(v))
    expected = first.dgrad(whole, node, (flat(g),), (flat(q), flat(k), flat(v), o, lse))
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for rank, mine in enumerate(here):
        env = replace(whole, sequence=len(mine), positions=mine, ring_rank=rank, ring_size=ranks)
        blocks_ = [here[(rank - hop) % ranks] for hop in range(ranks)]
        queries = flat(q[:, mine])
        part, statistics = first.forward(env, node, queries, flat(k[:, mine]), flat(v[:, mine]))
        for hop, theirs in enumerate(blocks_[1:], 1):
            keys, values = flat(k[:, theirs]), flat(v[:, theirs])
            made = more.forward(replace(env, hop=hop), node, queries, keys, values, part, statistics)
            assert made[0] is part and made[1] is statistics
        assert torch.allclose(part, flat(o.view(q.shape)[:, mine]), rtol=0, atol=1e-12)
        assert torch.allclose(statistics, flat(lse.view(2, length, -1)[:, mine]), rtol=0, atol=1e-12)
        for hop, theirs in enumerate(blocks_):
            saved = (queries, flat(k[:, theirs]), flat(v[:, theirs]), part, statistics)
            gradient = more.dgrad if hop else first.dgrad
            parts = gradient(replace(env, hop=hop), node, (flat(g[:, mine]),), saved)
            for total, given, at in zip(found, parts, (mine, theirs, theirs), strict=True):
                total[:, at] += given.view(2, len(at), -1)
    for total, right in zip(found, expected, strict=True):
        assert torch.allclose(flat(total), right, rtol=0, atol=1e-12)


def test_ranks_that_share_sequences_lie_inside_a_replica() -> None:
    plan = Plan(2, 2, 2, context=2)
    assert plan.world == 16 and plan.replicas == 4
    assert groups(plan, "tensor")[0] == (0, 1)
    assert groups(plan, "context")[:2] == [(0, 2), (1, 3)]
    assert groups(plan, "data")[0] == (0, 2, 4, 6)
    both = Plan(tensor=2, context=4, context_ring=2)
    assert groups(both, "context")[:2] == [(0, 2), (1, 3)] and groups(both, "ring")[0] == (0, 4)
    parts = [places(both, WORK, part).tolist() for part in range(4)]
    assert parts == [[0, 1], [6, 7], [2, 3], [4, 5]]
    assert coordinates(plan, 13) == (1, 2, 1)


REFUSED = [
    (Plan(context=3), "context must divide sequence_length 8 (found 3; nearest 2)"),
    (Plan(context=8), "context must divide heads of a tensor rank 4 (found 8; nearest 4, or context_ring 2)"),
    (Plan(context=4, tensor=2), "context must divide heads of a tensor rank 2 (found 4; nearest 2, or context_ring 2)"),
    (Plan(context_ring=2), "context_ring must divide context 1 (found 2; nearest 1)"),
    (Plan(context=4, context_ring=3), "context_ring must divide context 4 (found 3; nearest 2)"),
    (Plan(context=8, context_ring=8), "2 x context_ring must divide sequence_length 8 (found 16; nearest 8)"),
    (
        Plan(context=4, context_ring=2, tensor=4),
        "context / context_ring must divide heads of a tensor rank 1 (found 2; nearest 1, or context_ring 4)",
    ),
    (Plan(context=0), "every degree must be at least 1"),
    (
        Plan(context=4, tensor=2, sequence_parallel=True, micro_batch=8),
        "context must divide heads of a tensor rank 2 (found 4; nearest 2, or context_ring 2)",
    ),
]


@pytest.mark.parametrize(("plan", "reason"), REFUSED)
def test_what_cannot_be_shared_is_refused(plan: Plan, reason: str) -> None:
    assert why_not(LLAMA, WORK, plan) == reason


def test_generation_does_not_share_sequences() -> None:
    asked = Workload("generate", prompt_length=8, new_tokens=8, precision="fp64")
    reason = "context has no meaning when generating (found 2; nearest 1)"
    assert why_not(LLAMA, asked, Plan(context=2)) == reason
    assert why_not(LLAMA, asked, Plan(context_ring=2)) == f"context_ring{reason[len('context') :]}"


def test_windows_do_not_go_around() -> None:
    reason = "context_ring needs attention to all tokens before (found window 3; nearest 1)"
    assert why_not(SLIDING, WORK, Plan(context=2, context_ring=2)) == reason
    assert why_not(replace(SLIDING, window=8), WORK, Plan(context=2, context_ring=2)) is None


def test_long_sequences_are_shared_unasked() -> None:
    """And others where the recipe says so. As many of the ranks exchange heads as there are heads, or none."""
    for length, axes, expected in (
        (4096, {}, {1}),
        (8192, {}, {1, 2, 4}),
        (4096, {"context": (2,)}, {2}),
        (4096, {"context": (4,), "context_ring": (2,)}, {4}),
        (8192, {"context": (1,)}, {1}),
    ):
        work = replace(WORK, sequence_length=length, precision="bf16")
        listed = list(Enumeration(Question(LLAMA, work, bare(), 4, axes)))
        assert {plan.context for plan in listed} == expected
        assert {(plan.context, plan.context_ring) for plan in listed} == {
            (context, ring) for context in expected for ring in axes.get("context_ring", (1, context))
        }
        assert all(plan.world == 4 for plan in listed)
