"""Bodies: of every family, block kind, recompute policy and tensor layout: what is kept, made, sent and freed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest

from autotune.planners.lower.body import PROGRAMS, Body, lower_block
from autotune.planners.lower.recompute import RECOMPUTE
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import canonical
from autotune.planners.resolve import resolve
from autotune.planners.simulate import memory
from autotune.planners.validate import validate
from autotune.spec.graph import Block, blocks
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.program import TENSOR, Program

MODELS = {
    "llama": ModelSpec("llama", "LlamaForCausalLM", 16, 2, 4, 4, 4, 24, 32, tied=True),
    "llama-gqa": ModelSpec("gqa", "LlamaForCausalLM", 32, 2, 8, 4, 4, 40, 48),
    "mistral": ModelSpec("mistral", "MistralForCausalLM", 32, 2, 8, 4, 4, 40, 48, window=4),
    "qwen2": ModelSpec("qwen2", "Qwen2ForCausalLM", 16, 2, 4, 4, 4, 24, 32, qkv_bias=True, tied=True),
    "qwen3": ModelSpec("qwen3", "Qwen3ForCausalLM", 24, 2, 8, 4, 8, 32, 40, qk_norm=True),
    "biased": ModelSpec("biased", "LlamaForCausalLM", 16, 2, 4, 4, 4, 24, 32, qkv_bias=True, out_bias=True),
}
# What is proven of every body, and not by a closed form of a dense layer.
MIXED = {
    "mixtral": ModelSpec("mixtral", "MixtralForCausalLM", 32, 2, 8, 4, 4, 40, 48, experts=Experts(8, 2, 12)),
    "deepseek": ModelSpec(
        "deepseek",
        "DeepseekV3ForCausalLM",
        32,
        2,
        8,
        8,
        12,
        40,
        48,
        latent=LatentAttention(12, 16, 8, 4, 6),
        experts=Experts(8, 3, 12, shared_ffn=8, scoring="sigmoid", score_bias=True),
    ),
}
ALL = {**MODELS, **MIXED}
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
sound = pytest.mark.parametrize(
    ("name", "kind"), [*product(MODELS, ("embed", "layer", "head", "logits")), *product(MIXED, ("layer",))]
)
every = pytest.mark.parametrize(("name", "kind"), list(product(MODELS, ("embed", "layer", "head", "logits"))))


class Case(NamedTuple):
    """A block, its shape and its body under a policy."""

    block: Block
    shape: Shape
    policy: str
    body: Body


def cases(name: str, kind: str) -> Iterator[Case]:
    """Every policy, layout and precision of one block; "logits" is the head without its loss."""
    found = {block.kind: block for block in blocks(ALL[name])}
    block = found["head" if kind == "logits" else kind]
    for policy, (tensor, split), dtype in product(RECOMPUTE, LAYOUTS, ("bf16", "fp64")):
        shape = Shape(2, 8, 8, tensor, split, dtype)
        yield Case(block, shape, policy, lower_block(block, shape, policy, loss=kind != "logits"))


def left(program: Program) -> set[str]:
    """What is live when a body has ended, beside what was given."""
    live = set(program.given(0))
    for instruction in program.ranks[0]:
        live |= set(instruction.writes)
        live -= set(instruction.frees)
    return {name for name in live if not program.buffers[0][name].persistent}


def ops(program: Program) -> Counter[str]:
    return Counter(i.op for i in program.ranks[0])


@sound
def test_bodies_are_sound(name: str, kind: str) -> None:
    for _block, _shape, _policy, body in cases(name, kind):
        for program in map(body.program, PROGRAMS):
            kept = replace(program, facts={"leaves": True})
            validate(kept)
            resolve(kept, inline=True)


@sound
def test_what_is_left(name: str, kind: str) -> None:
    """A forward leaves what it saves and its output; a backward frees all of it and leaves its input's gradient."""
    for _block, _shape, _policy, body in cases(name, kind):
        assert left(body.forward) == {*body.saved, body.output}
        starts = set(body.backward.live[0])
        assert starts == {*body.saved, *([f"d.{body.output}"] if kind != "head" else [])}
        assert left(body.backward) == ({body.gradient} if kind != "embed" else set())
        assert body.sizes[body.gradient] == body.sizes["x"] if kind != "embed" else body.gradient == ""
        last = memory(body.backward, lambda rank, instruction: 0)[0]["device"][-1]
        freed = sum(body.sizes[n] for n in body.backward.ranks[0][-1].frees)
        assert last - freed == (body.sizes["x"] if kind != "embed" else 0)


@sound
def test_every_weight_gets_one_gradient(name: str, kind: str) -> None:
    for block, _shape, _policy, body in cases(name, kind):
        made = Counter(i.part for i in body.backward.ranks[0] if i.op.endswith(".wgrad"))
        assert made == {index: 1 for index, node in enumerate(block.nodes) if node.weights}
        inputs = Counter(i.part for i in body.backward.ranks[0] if i.op.endswith(".dgrad"))
        passing = {"embedding", "add", *(["cross_entropy"] if kind == "logits" else [])}
        assert inputs == {index: 1 for index, node in enumerate(block.nodes) if node.op not in passing}


@sound
def test_a_split_backward_is_a_partition_of_the_whole(name: str, kind: str) -> None:
    """B and W together run the whole backward's instructions once; W has every weight gradient, and what nothing but
    a weight gradient reads. What B leaves is what W starts with, and W leaves nothing."""
    for _block, _shape, _policy, body in cases(name, kind):
        bare = [[i._replace(frees=()) for i in body.program(op).ranks[0]] for op in ("BW", "B", "W")]
        assert Counter(bare[0]) == Counter(bare[1] + bare[2])
        assert not any(i.op.endswith(".wgrad") for i in bare[1])
        read = {name for i in bare[2] for name in i.reads}
        for instruction in bare[2]:
            assert instruction.op.endswith(".wgrad") or read & set(instruction.writes), instruction
        incoming = {f"d.{body.output}"} if body.late_gradient else set()
        assert left(body.input_gradient) == {
            *body.kept,
            *body.made,
            *incoming,
            *([body.gradient] * bool(body.gradient)),
        }
        assert set(body.weight_gradient.live[0]) == {*body.kept, *body.made, *incoming}
        assert left(body.weight_gradient) == set()
        assert set(body.kept) <= set(body.saved) and not set(body.made) & set(body.saved)


def saved_bytes(model: ModelSpec, kind: str, policy: str, shape: Shape) -> int:
    """Closed form, worked out from the mathematics of each layer and not from the table.

    rows: tokens of the residual stream on this rank; wide: bytes of a kept statistic. Of a layer:
    none: h, x1, h2 (rows x hidden); q, k, v, o, the gated pair and its product, and, where q and k are normalised,
    their product before (all sharded by heads or width); a deviation a norm, a log-sum-exp a head.
    selective: x1; the products qkv, o and the gated pair; the log-sum-exps. full: nothing but the input.
    """
    t, tokens, w = shape.tensor, shape.tokens, shape.width
    rows, wide = shape.rows(shape.sequence_parallel), max(4, w)
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if kind == "embed":
        return 0
    if kind in ("head", "logits"):
        held = rows * model.hidden * w + rows * wide
        return held + (tokens * model.vocab // t * w + tokens * wide if kind == "head" else 0)
    heads = tokens * model.heads // t * wide
    if policy == "none":
        again = q + 2 * kv if model.qk_norm else 0
        sharded = 2 * q + 2 * kv + again + 3 * model.ffn
        return (3 * rows * model.hidden + tokens * sharded // t) * w + 2 * rows * wide + heads
    if policy == "selective":
        return (rows * model.hidden + tokens * (2 * q + 2 * kv + 2 * model.ffn) // t) * w + heads
    return 0


@every
def test_saved_bytes(name: str, kind: str) -> None:
    for _block, shape, policy, body in cases(name, kind):
        assert body.saved_bytes == saved_bytes(MODELS[name], kind, policy, shape)
        assert body.saved_bytes == sum(body.sizes[n] for n in body.saved)


def test_saved_bytes_of_a_published_shape() -> None:
    """Llama-3.1-8B's layer in bf16 on one sequence of 4096, term by term in units of sequence x batch x hidden."""
    model = ModelSpec("8b", "LlamaForCausalLM", 4096, 32, 32, 8, 128, 14336, 128256)
    layer = blocks(model)[1]
    shape = Shape(1, 4096, 4096)
    sbh = 4096 * 4096
    none = lower_block(layer, shape, "none").saved_bytes
    # h, x1, h2: 6; q and o: 4; k, v: 1; gate, up, product: 21; statistics: (2 + 32) x 4 bytes a token.
    assert none == (6 + 4 + 1 + 21) * sbh + 34 * 4 * 4096
    # x1: 2; qkv: 3; o: 2; gate, up: 14; log-sum-exps.
    assert lower_block(layer, shape, "selective").saved_bytes == (2 + 3 + 2 + 14) * sbh + 32 * 4 * 4096


def test_saved_bytes_of_published_experts() -> None:
    """Qwen3-30B-A3B's layer in bf16 on one sequence of 4096: 128 experts, 8 a token, each 768 wide; hidden 2048, 32
    heads and 4 key heads of 128. Bytes a token."""
    model = ModelSpec(
        "30b", "Qwen3MoeForCausalLM", 2048, 48, 32, 4, 128, 6144, 151936, qk_norm=True, experts=Experts(128, 8, 768)
    )
    layer, shape = blocks(model)[1], Shape(1, 4096, 4096)
    # h, x1, h2; qkv before and after its norms, o; statistics of two norms and 32 heads.
    attention = 2 * (3 * 2048 + 2 * (32 + 8) * 128 + 32 * 128) + 4 * (2 + 32)
    # Scores; rows in, gate and up, their weighted product; numbers of the experts, of slots and rows; rows' weights.
    experts = 2 * (128 + 8 * (2048 + 2 * 768 + 768)) + 8 * (8 + 8 + 8) + 4 * 8
    assert lower_block(layer, shape, "none").saved_bytes == 4096 * (attention + experts) + 4 * 128
    # x1; qkv, o and 32 log-sum-exps; scores, gate and up: rows, weights and order are made again.
    kept = 2 * (2048 + (32 + 8) * 128 + 32 * 128) + 4 * 32 + 2 * (128 + 8 * 2 * 768)
    assert lower_block(layer, shape, "selective").saved_bytes == 4096 * kept


def counted(program: Program) -> dict[str, int]:
    return dict(Counter(i.op for i in program.ranks[0] if i.lane == TENSOR))


def expected(kind: str, policy: str, tensor: int, split: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of the forward and of the backward (Megatron-LM 1909.08053, section 3; 2205.05198, section 4.2).

    A full recompute sums the attention's output once more; the feed-forward's nobody needs. With sequence parallelism
    what was gathered is not kept, so the weight gradients gather again.
    """
    if tensor == 1:
        return {}, {}
    again = int(policy == "full")
    if not split:
        if kind == "layer":
            return {"all_reduce": 2}, {"all_reduce": 2 + again}
        return ({"all_reduce": 1}, {}) if kind == "embed" else ({}, {"all_reduce": 1})
    if kind == "layer":
        return {"all_gather": 2, "reduce_scatter": 2}, {"all_gather": 4, "reduce_scatter": 2 + again}
    if kind == "embed":
        return {"reduce_scatter": 1}, {"all_gather": 1}
    return {"all_gather": 1}, {"reduce_scatter": 1, "all_gather": 1}


@every
def test_collectives(name: str, kind: str) -> None:
    for _block, shape, policy, body in cases(name, kind):
        assert (counted(body.forward), counted(body.backward)) == expected(
            kind, policy, shape.tensor, shape.sequence_parallel
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tensor", "split"), LAYOUTS)
def test_what_runs_again(name: str, tensor: int, split: bool) -> None:
    """A backward repeats exactly what its policy says, and nothing after the last value that is needed."""
    layer = blocks(MODELS[name])[1]
    shape = Shape(2, 8, 8, tensor, split)
    rotary = "rotary_norm" if MODELS[name].qk_norm else "rotary"
    forward = {policy: lower_block(layer, shape, policy).forward for policy in RECOMPUTE}
    again = {
        policy: {
            op: n
            for op, n in ops(lower_block(layer, shape, policy).backward).items()
            if op in ops(forward[policy]) and op not in ("all_reduce", "all_gather", "reduce_scatter")
        }
        for policy in RECOMPUTE
    }
    assert again["none"] == {}
    assert again["selective"] == {"rmsnorm": 2, rotary: 1, "swiglu": 1}
    # The first three products; the last product and the last addition only make the output.
    assert again["full"] == {"rmsnorm": 2, "linear": 3, rotary: 1, "attention": 1, "add": 1, "swiglu": 1}
    assert len({tuple(i.op for i in p.ranks[0]) for p in forward.values()}) == 1


def test_blocks_that_cost_the_same_are_one() -> None:
    layers = blocks(MODELS["qwen3"])[1:-1]
    assert layers[0] != layers[1] and canonical(layers[0]) == canonical(layers[1])
    shape = Shape(2, 8, 8)
    assert lower_block(canonical(layers[0]), shape) is lower_block(canonical(layers[1]), shape)
    named, bare = lower_block(layers[0], shape), lower_block(canonical(layers[0]), shape)
    assert named.forward == bare.forward and named.backward == bare.backward


@pytest.mark.parametrize(("tensor", "split"), LAYOUTS)
def test_a_forward_that_is_not_trained_keeps_nothing(tensor: int, split: bool) -> None:
    for block in blocks(MODELS["llama-gqa"]):
        body = lower_block(block, Shape(2, 8, 8, tensor, split), loss=False, train=False)
        assert left(body.forward) == {body.output} and not body.saved and body.saved_bytes == 0
        assert len(body.backward) == 0
        validate(replace(body.forward, facts={"leaves": True}))
