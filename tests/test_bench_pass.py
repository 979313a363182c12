"""The parts of a pass that are timed: each runs, each adds one piece of work, and together they are all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autotune.planners.costs.between import between
from autotune.planners.costs.works import works
from autotune.planners.decoding.strategies import scored, tree_of
from autotune.planners.lower.generate import block_shape, inference_body, pass_lengths
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.runners import bench_parts, bench_pass
from autotune.runners.body import compile_body
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.work import MASKED, Attention, Memory, Work
from autotune.spec.workload import Workload

pytestmark = pytest.mark.alone

MODEL = ModelSpec("small", "LlamaForCausalLM", 64, 2, 4, 2, 16, 128, 96)


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, qk_norm=True, qkv_bias=True)], ids=["llama", "norms and bias"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (1, 9), (1, 12)])
def test_every_part_runs_and_none_is_missing(
    model: ModelSpec, tensor: int, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_pass, "COPIES", (2, 2))
    for block in (blocks(model)[0], blocks(model)[1], blocks(model)[-1]):
        shape = block_shape(block, Shape(3, queries, keys, tensor=tensor, dtype="fp32", attention="math"))
        body = inference_body(block, shape)
        piece = bench_parts.PassPiece(block, shape)
        layers = bench_pass.layers_of(model, piece, torch.device("cpu"))
        assert len(layers) == 2
        source = block.nodes[0].reads[0]
        x = torch.randint(96, (shape.tokens,)) if source == "tokens" else torch.randn(shape.tokens, model.hidden)
        timed: list[Work] = []
        for calls, added in bench_parts.stages(body, compile_body(block, body.forward), piece):
            for env in layers:
                bench_pass.run_part(calls, env, {source: x})
            timed += set(added)
        whole = {w for i in body.forward.ranks[0] for w in works(block, body, i, shape) if w.kind != "collective"}
        extra = {work.op for work in timed if isinstance(work, Memory) and work not in whole}
        assert whole <= set(timed)
        assert extra == {"layer": {"append"}, "head": {"pick", "sample", "sample_cut", "settle"}}.get(block.kind, set())


def test_nothing_is_settled_after_a_pass_of_a_draft() -> None:
    """Which may score several tokens of each sequence, and leaves the texts alone."""
    head = blocks(MODEL)[-1]
    shape = block_shape(head, Shape(2, 3, 9, dtype="fp32", attention="math", scored=3))
    body = inference_body(head, shape)
    parts = bench_parts.stages(body, compile_body(head, body.forward), bench_parts.PassPiece(head, shape))
    timed = {work.op for _, added in parts for work in added if isinstance(work, Memory)}
    assert "pick" in timed and "settle" not in timed


def test_a_processor_is_come_back_to_and_the_median_visit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One visit in a slow spell does not count; of a work that two pieces have, the mean of both."""
    shared, own = Memory("add", 64, "fp32"), Memory("copy", 64, "fp32")
    pieces = [bench_parts.PassPiece(block, Shape(1, 1, 1, dtype="fp32")) for block in blocks(MODEL)[:2]]
    visits = {
        pieces[0]: iter(({shared: 1.0}, {shared: 9.0}, {shared: 2.0})),
        pieces[1]: iter([{shared: 4.0, own: 5.0}] * 3),
    }
    monkeypatch.setattr(bench_pass, "time_pass", lambda model, piece, device: next(visits[piece]))
    samples = {sample.work: sample.seconds for sample in bench_pass.time_passes(MODEL, pieces, "cpu")}
    assert samples == {shared: 3.0, own: 5.0}
    assert all(next(left, None) is None for left in visits.values())


def test_a_generation_is_timed_at_both_ends() -> None:
    workload = Workload(kind="generate", prompt_length=16, new_tokens=8, batch=1)
    assert pass_lengths(Plan(), workload) == ((16, 16), (1, 17), (1, 23))
    assert pass_lengths(Plan(), replace(workload, new_tokens=2)) == ((16, 16), (1, 17))


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (Plan(), {"settle"}),
        (Plan(decoding="ngram", speculate=3, match=2), {"commit", "lookup"}),
        (Plan(decoding="ngram", speculate=2, match=2, branches=2), {"commit_tree", "lookup"}),
        (Plan(decoding="lookahead", speculate=2, branches=2, window=3), {"commit_tree", "pool"}),
        (Plan(decoding="jacobi", speculate=3), {"commit"}),
    ],
    ids=lambda case: case.describe() if isinstance(case, Plan) else "",
)
def test_what_lies_between_rounds_is_timed_as_it_is_priced(
    plan: Plan, named: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention under the strategy's own mask, and the pieces that the cost tables ask for by name and bytes."""
    for constant, value in (("COPIES", (2, 2)), ("WARM", 1), ("REPLAYS", 1), ("ROUNDS", 2)):
        monkeypatch.setattr(bench_pass, constant, value)
    work = Workload("generate", precision="fp32", prompt_length=8, new_tokens=4, batch=2)
    new, columns = scored(plan), 30
    whole = generation_shape(plan.altered(micro_batch=2, attention="math"), work, new, 8 + new)
    found: set[Work] = set()
    for block in (blocks(MODEL)[1], blocks(MODEL)[-1]):
        piece = bench_parts.PassPiece(block, block_shape(block, whole), columns, plan)
        found |= set(bench_pass.time_pass(MODEL, piece, torch.device("cpu")))
    wanted = set(between(plan, 2, columns, "fp32").values())
    assert {work.op for work in wanted} == named and wanted <= found
    masked = {work for work in found if isinstance(work, Attention) and work.backend == MASKED}
    assert bool(masked) == (not tree_of(plan).chain)
