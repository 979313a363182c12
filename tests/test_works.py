"""The work of bodies against what torch counts when they run, and against closed forms.

Conventions. `spec.work.Attention` counts the causal half only, S(S+1)/2 pairs of a sequence, with 2 products forward
and 5 backward (the scores are made again); torch's counter counts all S*S pairs of whatever runs. The ratio of the two
is 2S/(S+1), exactly. Linear layers are counted alike. torch's table has no line for the in-place `addmm_` of our weight
gradients nor for the CPU's flash kernel: `LINES` adds them as it counts their likes.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from autotune.planners.costs.works import flops, model_flops, works
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.recompute import RECOMPUTE
from autotune.planners.lower.shape import Shape
from autotune.runners.ops import cross_entropy
from autotune.runners.ops.env import Env
from autotune.runners.reference import init_weight, init_weights, reference_gradients
from autotune.runners.state import DTYPES
from autotune.runners.training import Trainer
from autotune.spec.families import load_model
from autotune.spec.graph import Block, blocks, parameters
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import TENSOR, Program
from autotune.spec.work import Attention, Collective, Matmul, Memory
from autotune.spec.workload import Workload
from tests.tasks import random_batch
from tests.test_body import LAYOUTS, MODELS

aten = torch.ops.aten
LINES = {
    aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
LINEAR = {aten.mm, aten.addmm, aten.addmm_}
ATTENTION = {aten.bmm, *LINES} - LINEAR
PUBLISHED = sorted((Path(__file__).parent.parent / "recipes" / "models").glob("*.json"))
SHAPES = {path.stem: load_model(path) for path in PUBLISHED}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=LINES)


def by_kind(count: FlopCounterMode) -> tuple[int, int]:
    """(linear, attention) FLOPs counted; anything else is an error."""
    found = count.get_flop_counts().get("Global", {})
    assert set(found) <= LINEAR | ATTENTION, found
    return sum(n for op, n in found.items() if op in LINEAR), sum(n for op, n in found.items() if op in ATTENTION)


def declared(block: Block, program: Program, shape: Shape, policy: str) -> tuple[float, float]:
    """(linear, attention) FLOPs that the table of works says."""
    body = lower_block(block, shape, policy)
    done = [work for i in program.ranks[0] for work in works(block, body, i, shape)]
    linear = sum(w.flops for w in done if isinstance(w, Matmul))
    attention = sum(w.flops for w in done if isinstance(w, Attention))
    assert flops(block, program, body, shape) == linear + attention
    return linear, attention


def executed(model: ModelSpec, workload: Workload, plan: Plan) -> tuple[Trainer, dict[tuple[Block, str], Any]]:
    """One training step in this process, every body counted by itself."""
    load = lambda index, weight: init_weight(weight, 0, DTYPES[workload.precision])  # noqa: E731
    trainer = Trainer.build(plan, model, workload, 0, torch.device("cpu"), load)
    counts: dict[tuple[Block, str], Any] = defaultdict(list)
    run = trainer.run

    def counted(block: Block, which: str, *rest: Any) -> Any:
        with counter() as count:
            values = run(block, which, *rest)
        counts[block, which].append(by_kind(count))
        return values

    trainer.run = counted  # type: ignore[method-assign]
    trainer.feed(random_batch(workload, model.vocab))
    trainer.interpreter.step()
    return trainer, counts


@pytest.mark.parametrize("policy", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_bodies_do_the_declared_flops(name: str, policy: str) -> None:
    """fp64 accumulates weight gradients by addmm_, bf16 by a product and a sum; either attention does the same work."""
    for precision, attention in [("fp64", "math"), ("bf16", "math"), ("fp32", "sdpa")]:
        model, sequence = MODELS[name], 12
        if model.window and attention != "math":
            continue
        plan = Plan(micro_batch=2, recompute=policy, attention=attention)
        workload = Workload(sequence_length=sequence, global_batch=4, precision=precision)
        trainer, counts = executed(model, workload, plan)
        assert len(counts) == 2 * len(blocks(model))
        whole = Fraction(2 * sequence, sequence + 1)
        for (block, which), found in counts.items():
            body = lower_block(block, trainer.shape, policy)
            linear, attended = declared(block, body.program(which), trainer.shape, policy)
            assert found == [(linear, attended * whole)] * 2, (block.kind, which, precision, attention)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_does_the_model_flops(name: str) -> None:
    """Autograd keeps the scores, so its backward is 4 products: what model FLOPs count. The reference knows no half."""
    model, batch, sequence = MODELS[name], 3, 10
    tokens = torch.randint(model.vocab, (batch, sequence), generator=torch.Generator().manual_seed(0))
    weights = init_weights(model, 0, torch.float64)
    with counter() as count:
        reference_gradients(model, weights, tokens, tokens)
    linear, attention = by_kind(count)
    pairs = model.layers * batch * model.heads * model.head_dim * sequence * sequence
    assert attention == 2 * 6 * pairs
    assert linear + attention * Fraction(sequence + 1, 2 * sequence) == model_flops(model, batch, sequence)


@pytest.mark.parametrize("sequence", [1, 7, 4096])
@pytest.mark.parametrize("name", SHAPES)
def test_model_flops_of_published_models(name: str, sequence: int) -> None:
    """6 x parameters x tokens + 6 x layers x hidden x sequence^2 x batch, where they differ term by term.

    Not in a matrix product: gains, biases, where it is not also the head the embedding's table, and experts that a
    token does not visit. Queries may be wider or narrower than the hidden size, or than values (latent attention), and
    a causal row sees itself: S(S+1), not S^2.
    """
    model, batch = SHAPES[name], 4
    outside = sum(w.size for b in blocks(model) for w in b.weights() if len(w.shape) == 1)
    outside += 0 if model.tied else model.vocab * model.hidden
    grouped = [node for b in blocks(model) for node in b.nodes if node.op == "grouped"]
    outside += sum(n.weights[0].size // n.attr("experts") * (n.attr("experts") - n.attr("top_k")) for n in grouped)
    values = model.latent.v_dim if model.latent else model.head_dim
    tokens, wide = batch * sequence, Fraction(model.heads * (model.head_dim + values), 2)
    exact = 6 * (parameters(model) - outside) * tokens + 6 * model.layers * wide * sequence * (sequence + 1) * batch
    assert model_flops(model, batch, sequence) == exact
    rule = 6 * parameters(model) * tokens + 6 * model.layers * wide * sequence**2 * batch
    assert rule - exact == 6 * tokens * (outside - model.layers * wide)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tensor", "split"), LAYOUTS)
def test_tensor_ranks_share_the_work(name: str, tensor: int, split: bool) -> None:
    """The ranks of a tensor group do together exactly what one rank does alone, forward and backward."""
    for block in blocks(MODELS[name]):
        for policy in RECOMPUTE:
            alone, shared = Shape(2, 8, 8), Shape(2, 8, 8, tensor, split)
            one, many = lower_block(block, alone, policy), lower_block(block, shared, policy)
            for a, b in ((one.forward, many.forward), (one.backward, many.backward)):
                assert flops(block, a, one, alone) == tensor * flops(block, b, many, shared)


@pytest.mark.parametrize("name", MODELS)
def test_what_recomputing_adds(name: str) -> None:
    """Selective repeats no product; full repeats the forward without its last product, whose result nobody needs."""
    model, shape = MODELS[name], Shape(2, 8, 8)
    layer = blocks(model)[1]
    body = {policy: lower_block(layer, shape, policy) for policy in RECOMPUTE}
    cost = {policy: flops(layer, b.backward, b, shape) for policy, b in body.items()}
    assert cost["selective"] == cost["none"]
    last = 2 * shape.tokens * model.ffn * model.hidden
    assert cost["full"] - cost["none"] == flops(layer, body["none"].forward, body["none"], shape) - last


def collectives(block: Block, program: Program, shape: Shape, policy: str = "none") -> list[Collective]:
    body = lower_block(block, shape, policy)
    done = [w for i in program.ranks[0] for w in works(block, body, i, shape) if isinstance(w, Collective)]
    assert len(done) == sum(i.lane == TENSOR for i in program.ranks[0])
    return done


@pytest.mark.parametrize("tensor", [2, 4])
def test_bytes_of_tensor_collectives(tensor: int) -> None:
    """Every one is of the whole residual stream; scattered and gathered sums cost what one all-reduce does
    (2205.05198, section 4.2.2), but for the two gathers that weight gradients repeat."""
    model = MODELS["llama-gqa"]
    layer = blocks(model)[1]
    plain, split = Shape(2, 8, 8, tensor), Shape(2, 8, 8, tensor, True)
    stream = plain.tokens * model.hidden * plain.width
    ring = 2 * (tensor - 1) / tensor * stream
    total = {}
    for shape in (plain, split):
        body = lower_block(layer, shape)
        for which, program in enumerate((body.forward, body.backward)):
            done = collectives(layer, program, shape)
            assert all(work.size == stream and work.group == tensor for work in done)
            total[shape.sequence_parallel, which] = sum(work.bytes for work in done)
    assert total[False, 0] == total[False, 1] == total[True, 0] == 2 * ring
    assert total[True, 1] == 3 * ring


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 4), ("fp32", 4), ("fp64", 8)])
def test_the_loss_exchanges_three_numbers_a_token(dtype: str, width: int) -> None:
    """What the executed operation hands to the tensor group, in order, is what is priced; alone it sends nothing."""
    model = MODELS["llama-gqa"]
    head = blocks(model)[-1]
    (node,) = [node for node in head.nodes if node.op == "cross_entropy"]
    for tensor in (1, 2):
        shape = Shape(2, 8, 8, tensor, dtype=dtype)
        body = lower_block(head, shape)
        (loss,) = [i for i in body.forward.ranks[0] if i.op == "cross_entropy"]
        priced = [w for w in works(head, body, loss, shape, 1, 2) if isinstance(w, Collective)]
        sent: list[int] = []

        def all_reduce(values: torch.Tensor, how: str, sent: list[int] = sent) -> torch.Tensor:
            sent.append(values.nbytes)
            return values

        logits = torch.randn(shape.tokens, model.vocab // tensor).to(DTYPES[dtype])
        targets = torch.zeros(shape.tokens, dtype=torch.int64)
        nothing = torch.empty(0)
        env = Env(model, 2, 8, nothing, (nothing, nothing), {}, {}, tensor_size=tensor, all_reduce=all_reduce)
        cross_entropy.forward(env, node, logits, targets)
        assert [work.size for work in priced] == sent
        assert sum(sent) == (3 * width * shape.tokens if tensor > 1 else 0)
        assert all((w.op, w.group, w.level, w.inner) == ("all_reduce", 2, 1, 2) for w in priced)
        (rest,) = [w for w in works(head, body, loss, shape) if isinstance(w, Memory)]
        assert rest.op == "cross_entropy" and rest.bytes >= logits.nbytes


def test_memory_bound_work_moves_what_it_names() -> None:
    """A norm reads its input and writes as much and a deviation a token; an addition reads two and writes one."""
    model, shape = MODELS["llama-gqa"], Shape(2, 8, 8)
    layer = blocks(model)[1]
    body = lower_block(layer, shape)
    moved = {
        i.op: work.bytes
        for i in body.forward.ranks[0]
        for work in works(layer, body, i, shape)
        if isinstance(work, Memory)
    }
    stream = 16 * model.hidden * 2
    qkv = 16 * (model.heads + 2 * model.kv_heads) * model.head_dim * 2
    assert moved == {
        "rmsnorm": 2 * stream + 16 * 4,
        "rotary": 2 * qkv,
        "add": 3 * stream,
        "swiglu": 3 * 16 * model.ffn * 2,
    }
