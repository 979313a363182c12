"""Which neighbours of a decoded token's body are joined, and what a joined instruction is priced as."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.costs.works import works
from autotune.planners.lower.fuse import JOIN, RUNS, parts
from autotune.planners.lower.generate import block_shape, inference_body
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.runners.ops.fused import FUSED as FUSED_BY
from autotune.spec.graph import blocks
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.plan import FUSED, Plan
from autotune.spec.work import Memory
from autotune.spec.workload import Workload

LLAMA = ModelSpec("dense", "LlamaForCausalLM", 64, 2, 4, 2, 16, 96, 128)
MOE = replace(LLAMA, architecture="Qwen3MoeForCausalLM", qk_norm=True, experts=Experts(4, 2, 24))
ONE = Shape(1, 1, 12, dtype="bf16", fused=True)


def ops(model: ModelSpec, shape: Shape, block: int = 1) -> list[str]:
    return [i.op for i in inference_body(blocks(model)[block], shape).forward.ranks[0]]


def test_a_dense_layer_is_five_instructions() -> None:
    layer = ["rmsnorm+linear", "rotary+attention", "linear+add", "rmsnorm+linear+swiglu", "linear+add"]
    assert ops(LLAMA, ONE) == layer
    assert ops(LLAMA, block_shape(blocks(LLAMA)[-1], ONE), -1) == ["rmsnorm+linear"]
    assert JOIN not in "".join(ops(LLAMA, replace(ONE, fused=False)))


def test_what_others_read_too_is_not_joined() -> None:
    """The router and the experts both read what is normalised; tensor ranks add up between a product and its sum."""
    found = ops(MOE, ONE)
    assert "rotary_norm+attention" in found and "rmsnorm" in found and "route" in "".join(found)
    split = ops(LLAMA, replace(ONE, tensor=2))
    assert split.count("all_reduce") == 2 and "linear+add" not in split and "rmsnorm+linear" in split


@pytest.mark.parametrize("model", [LLAMA, MOE], ids=["dense", "experts"])
def test_nothing_is_lost(model: ModelSpec) -> None:
    plain, joined = ops(model, replace(ONE, fused=False)), ops(model, ONE)
    assert [op for name in joined for op in parts(name)] == plain


def test_every_run_is_computed_by_a_line() -> None:
    assert set(FUSED_BY) == {JOIN.join(run) for run in RUNS}


def test_only_decoded_tokens_are_joined() -> None:
    work = Workload("generate", prompt_length=8, new_tokens=4, batch=2)
    assert generation_shape(Plan(kernels=FUSED), work, 1, 9).fused
    assert not generation_shape(Plan(kernels=FUSED), work, 8, 8).fused
    assert not generation_shape(Plan(), work, 1, 9).fused


def test_a_run_moves_its_operands_weights_and_cache_once() -> None:
    block = blocks(LLAMA)[1]
    body = inference_body(block, ONE)
    priced = {i.op: works(block, body, i, ONE) for i in body.forward.ranks[0]}
    qkv = (4 + 2 * 2) * 16
    assert priced["rmsnorm+linear"] == (Memory("rmsnorm+linear x1", 2 * (64 + 64 * qkv + 64 + qkv), "bf16"),)
    cache = 2 * 2 * 16 * (12 + 1)  # keys and values of twelve positions, and the new ones
    assert priced["rotary+attention"] == (Memory("rotary+attention x1", 2 * (qkv + 64 + cache), "bf16"),)
