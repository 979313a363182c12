"""The parts of a pass that are timed: each runs, each adds one piece of work, and together they are all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autotune.planners.costs.works import works
from autotune.planners.lower.generate import block_shape, inference_body, pass_lengths
from autotune.planners.lower.shape import Shape
from autotune.runners import bench_pass
from autotune.runners.body import compile_body
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.work import Memory, Work
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
        piece = bench_pass.PassPiece(block, shape)
        layers = bench_pass.layers_of(model, piece, torch.device("cpu"))
        assert len(layers) == 2
        source = block.nodes[0].reads[0]
        x = torch.randint(96, (shape.tokens,)) if source == "tokens" else torch.randn(shape.tokens, model.hidden)
        timed: list[Work] = []
        for calls, added in bench_pass.stages(body, compile_body(block, body.forward), piece):
            for env in layers:
                bench_pass.run_part(calls, env, {source: x})
            timed += set(added)
        whole = {w for i in body.forward.ranks[0] for w in works(block, body, i, shape) if w.kind != "collective"}
        extra = {work.op for work in timed if isinstance(work, Memory) and work not in whole}
        assert whole <= set(timed)
        assert extra == {"layer": {"append"}, "head": {"pick", "sample", "sample_cut"}}.get(block.kind, set())


def test_a_generation_is_timed_at_both_ends() -> None:
    workload = Workload(kind="generate", prompt_length=16, new_tokens=8, batch=1)
    assert pass_lengths(Plan(), workload) == ((16, 16), (1, 17), (1, 23))
    assert pass_lengths(Plan(), replace(workload, new_tokens=2)) == ((16, 16), (1, 17))
