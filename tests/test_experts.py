"""Experts by dispatch equal experts computed densely under a mask, forward and backward, and nothing is dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autotune.planners.feasible import why_not
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.recompute import RECOMPUTE
from autotune.planners.lower.shape import Shape
from autotune.planners.search import search
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.runners import reference, rope
from autotune.runners.body import compile_body, run_body
from autotune.runners.ops import OPERATIONS
from autotune.spec.families import load_model
from autotune.spec.graph import Block, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload
from tests.operands import BATCH, MIXED, MODELS, SEQUENCE, close, make_env, random

LATENT = replace(MODELS["latent"], experts=MIXED["mixtral"].experts)
LAYERS = {**MIXED, "latent": MODELS["latent"], "latent with experts": LATENT}


def weights_of(block: Block) -> dict[str, Tensor]:
    return {w.name: random(*w.shape, seed=i + 3) * 0.5 for i, w in enumerate(block.tensors())}


def densely(model: ModelSpec, block: Block, x: Tensor, weights: dict[str, Tensor], g: Tensor) -> list[Tensor]:
    """y and the gradients of x and of every weight, by autograd through the reference."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    source = x.clone().requires_grad_()
    values = {"x": source.view(BATCH, SEQUENCE, -1)}
    own = {(block.index, name): leaf for name, leaf in leaves.items()}
    reference._run(block, values, own, rope.tables(model, SEQUENCE))
    y = values["y"].flatten(0, 1)
    trained = [leaves[w.name] for w in block.weights()]
    return [y.detach(), *torch.autograd.grad((y * g).sum(), [source, *trained])]


@pytest.mark.parametrize("policy", RECOMPUTE)
@pytest.mark.parametrize("name", LAYERS)
def test_dispatch_equals_dense_masked_computation(name: str, policy: str) -> None:
    """A whole layer, its backward in one and in two halves."""
    model = LAYERS[name]
    block = blocks(model)[1]
    weights = weights_of(block)
    x, g = (random(BATCH * SEQUENCE, model.hidden, seed=seed) for seed in (1, 2))
    wanted = densely(model, block, x, weights, g)
    body = lower_block(block, Shape(BATCH, SEQUENCE, SEQUENCE, dtype="fp64"), policy)
    for parts in (("BW",), ("B", "W")):
        grads = {w.name: torch.zeros(w.shape, dtype=torch.float64) for w in block.weights()}
        env = make_env(model, weights, grads=grads)
        with torch.no_grad():
            values = run_body(compile_body(block, body.forward), env, {"x": x})
            found = [values.pop("y").clone()]
            values["d.y"] = g
            for part in parts:
                values = run_body(compile_body(block, body.program(part)), env, values)
                if part != "W":
                    found.append(values[body.gradient].clone())
        found += [grads[w.name] for w in block.weights()]
        for ours, theirs in zip(found, wanted, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("skew", ["spread", "one expert", "few experts"])
def test_nothing_is_dropped(skew: str) -> None:
    """Every choice of every token has a row, rows of an expert are neighbours, experts without rows are empty."""
    model = MIXED["qwen3"]
    node = next(n for n in blocks(model)[1].nodes if n.op == "dispatch")
    tokens, each, count = 50, node.attr("top_k"), node.attr("experts")
    generator = torch.Generator().manual_seed(1)
    choices = {"spread": range(count), "one expert": (5,), "few experts": (1, 2, 6)}[skew]
    pool = torch.tensor(list(choices))
    ids = pool[torch.randint(len(pool), (tokens, each), generator=generator)]
    x, p = random(tokens, model.hidden, seed=1), random(tokens, each, seed=2)
    rows, weights, order, place, ends = OPERATIONS["dispatch"].forward(make_env(model, {}), node, x, p, ids)
    assert torch.equal(order.sort().values, torch.arange(tokens * each))
    assert torch.equal(order[place], torch.arange(tokens * each))
    assert torch.equal(rows, x[order // each]) and torch.equal(weights, p.flatten()[order])
    owner = ids.flatten()[order]
    assert torch.equal(owner, owner.sort().values)
    assert ends.tolist() == torch.bincount(owner, minlength=count).cumsum(0).tolist() and ends[-1] == tokens * each
    down = next(n for n in blocks(model)[1].nodes if n.name == "experts_gate_up")
    weight = {down.weights[0].name: random(*down.weights[0].shape, seed=4)}
    (made,) = OPERATIONS["grouped"].forward(make_env(model, weight), down, rows, ends)
    stacked = weight[down.weights[0].name].view(count, -1, model.hidden)
    close(made, torch.einsum("ri,roi->ro", rows, stacked[owner]))
    combine = next(n for n in blocks(model)[1].nodes if n.op == "combine")
    (back,) = OPERATIONS["combine"].forward(make_env(model, {}), combine, rows, order, place)
    close(back, each * x)


def test_narrow_experts_add_their_gradients_up_in_fp32() -> None:
    model = MIXED["mixtral"]
    node = next(n for n in blocks(model)[1].nodes if n.name == "experts_down")
    count, inputs, outputs = node.attr("experts"), node.attr("inputs"), node.attr("outputs")
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32)
    g, x = random(10, outputs, seed=3, dtype=torch.bfloat16), random(10, inputs, seed=4, dtype=torch.bfloat16)
    total = torch.full((count * outputs, inputs), 1.0)
    env = make_env(model, {}, grads={node.weights[0].name: total})
    wgrad = OPERATIONS["grouped"].wgrad
    assert wgrad is not None
    wgrad(env, node, (g,), (x, ends))
    wanted = [g[a:b].double().t() @ x[a:b].double() + 1 for a, b in ((0, 3), (3, 3), (3, 9), (9, 10))]
    close(total.double(), torch.cat(wanted), 2e-2)


TRAIN = Workload(sequence_length=8, global_batch=4)
GENERATE = Workload("generate", 8, 4, batch=4, prompt_length=4, new_tokens=2)


@pytest.mark.parametrize(
    ("model", "work", "plan", "reason"),
    [
        (
            MIXED["qwen3"],
            TRAIN,
            Plan(tensor=4),
            "tensor must divide kv_heads 2 (found 4; nearest 2)",
        ),
        (
            replace(MIXED["mixtral"], kv_heads=4, ffn=16, vocab=32),
            TRAIN,
            Plan(tensor=4),
            "tensor must divide experts' ffn 6 (found 4; nearest 3)",
        ),
        (
            LATENT,
            GENERATE,
            Plan(),
            "DeepseekV2ForCausalLM's latent attention has no key-value cache in this version: it trains only",
        ),
        (
            MIXED["qwen3"],
            TRAIN,
            Plan(pipeline=2, schedule="2bp-1f1b", weight_gradients="joined"),
            "weight_gradients joined needs a model without experts: their rows are sorted by micro-batch",
        ),
    ],
    ids=["key heads", "expert width", "no cache", "joined"],
)
def test_what_cannot_run_says_why(model: ModelSpec, work: Workload, plan: Plan, reason: str) -> None:
    assert why_not(model, work, plan) == reason


@pytest.mark.parametrize(("name", "devices"), [("Qwen--Qwen3-30B-A3B", 8), ("mistralai--Mixtral-8x7B-v0.1", 32)])
def test_published_experts_are_searched(name: str, devices: int) -> None:
    """On a datasheet's H100s: some plan fits, and none is faster than the bound."""
    model = load_model(Path(__file__).parent.parent / "recipes" / "models" / f"{name}.json")
    work = Workload(sequence_length=4096, global_batch=32)
    axes: dict[str, tuple[object, ...]] = {"schedule": ("1f1b",), "tensor": (1,), "micro_batch": (1,)}
    axes |= {"vocabulary": ("ends",), "zero": (0, 3), "data": (1, 4), "recompute": ("none", "full")}
    profile = load_profile(MACHINES / "h100-sxm.json")
    found = search(Question(model, work, profile, devices, axes, seconds=60))
    best = found.ranking[0]
    assert max(best.peak_bytes) <= 0.92 * profile.device.memory_bytes
    assert found.bound.step_s <= best.step_s
