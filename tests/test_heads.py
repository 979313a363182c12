"""Decoding heads: their description, and their training on a frozen target under any plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autotune.planners.costs.works import model_flops
from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.predict import predict
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.runners.reference import head_values, init_weights, reference_gradients, with_target
from autotune.spec.errors import UsageError
from autotune.spec.families import from_config
from autotune.spec.graph import blocks, parameters
from autotune.spec.heads import HeadsSpec
from autotune.spec.plan import Plan
from tests.equal import assert_equal
from tests.pool import Pool
from tests.recipes import RECIPE, Autotune
from tests.tasks import random_batch
from tests.test_equality import LLAMA, QWEN, WORK

MEDUSA = HeadsSpec(
    "tiny-medusa", "MedusaHeads", 16, 0, 1, 1, 2, 0, 32, count=3, depth=2, activation="silu", decay=0.8, target=LLAMA
)
BLOCKWISE = HeadsSpec(
    "tiny-blockwise", "BlockwiseHeads", 24, 0, 1, 1, 2, 20, 40, count=2, activation="relu", target=QWEN
)
CASES = [
    (MEDUSA, Plan()),
    (MEDUSA, Plan(micro_batch=4)),
    (MEDUSA, Plan(data=2, zero=1)),
    (MEDUSA, Plan(data=2, zero=3, micro_batch=2)),
    (BLOCKWISE, Plan(data=2, micro_batch=2)),
    (BLOCKWISE, Plan(data=4, zero=1, attention="math")),
]


@pytest.mark.parametrize(("model", "plan"), CASES, ids=lambda x: getattr(x, "name", "") or x.describe())
def test_training_equals_the_reference(pool: Pool, model: HeadsSpec, plan: Plan) -> None:
    assert_equal(pool, model, plan, WORK)


@pytest.mark.parametrize("model", [MEDUSA, BLOCKWISE], ids=lambda model: model.name)
def test_the_reference_is_the_papers_loss(model: HeadsSpec) -> None:
    """Written out with autograd: of every row the token k places after its target, the mean over heads weighted by
    decay^k, and no gradient beyond the rows."""
    assert model.target
    weights = init_weights(model, 3, torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights = {key: w + 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for key, w in weights.items()}
    tokens, targets = random_batch(WORK, model.vocab)
    loss, gradients = reference_gradients(model, weights, tokens, targets)
    own = {(-1 - index, name): w for (index, name), w in weights.items() if index < 0}
    h = head_values(model.target, own, tokens)["h"]
    named = {w.parts[0][0]: weights[1, w.name].clone().requires_grad_() for w in blocks(model)[1].weights()}
    total = torch.zeros((), dtype=torch.float64)
    for k in range(model.count):
        x = h
        for place in range(model.depth):
            prefix = f"heads.{k}.blocks.{place}"
            u = x @ named[f"{prefix}.up.weight"].T + named[f"{prefix}.up.bias"]
            s = u * torch.sigmoid(u) if model.activation == "silu" else u.clamp_min(0)
            if model.ffn:
                s = s @ named[f"{prefix}.down.weight"].T + named[f"{prefix}.down.bias"]
            x = x + s
        logits = x @ named[f"heads.{k}.lm_head.weight"].T
        log_p = logits.log_softmax(-1)
        for row in range(len(tokens)):
            for at in range(WORK.sequence_length - k - 1):
                chance = log_p[row, at, targets[row, at + k + 1]]
                total = total - model.decay ** (k + 1) / model.count * chance / tokens.numel()
    assert float(loss) == pytest.approx(float(total.detach()), abs=1e-12)
    for name, found in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        (key,) = [(1, own.name) for own in blocks(model)[1].weights() if own.parts[0][0] == name]
        assert torch.allclose(gradients[key], found, rtol=0, atol=1e-12), name
    assert all(key[0] == 1 for key in gradients), "nothing of the target has one"


def test_heads_begin_as_what_the_target_says() -> None:
    weights = init_weights(MEDUSA, 0, torch.float64)
    target = init_weights(LLAMA, 0, torch.float64)
    for k in range(3):
        assert torch.equal(weights[1, f"{k}.lm_head.weight"], target[LLAMA.layers + 1, "lm_head.weight"])
        assert not weights[1, f"{k}.0.up.weight"].any()
    kept = with_target(MEDUSA, weights, target, begin=False)
    assert kept[-1, "embed.weight"] is target[0, "embed.weight"]


def test_a_frozen_target_costs_its_forward_and_its_weights() -> None:
    profile = load_profile(shipped()["h200-sxm"])
    work = replace(WORK, sequence_length=512, precision="bf16")
    wide = replace(LLAMA, hidden=512, layers=8, heads=8, kv_heads=8, head_dim=64, ffn=1024, vocab=256)
    small, large = (replace(MEDUSA, hidden=512, vocab=256, target=replace(wide, layers=layers)) for layers in (2, 8))
    few, many = (predict(model, work, profile, Plan(), 1) for model in (small, large))
    of_layers = [2 * (parameters(model.target) - 2 * 512 * 256) for model in (small, large) if model.target is not None]
    grown = many.memory[0]["weights"] - few.memory[0]["weights"]
    assert grown == of_layers[1] - of_layers[0], "only the target's layers are more"
    assert many.step_s > 1.5 * few.step_s
    assert many.memory[0]["optimizer"] == few.memory[0]["optimizer"]
    more = model_flops(large, 1, 512) - model_flops(small, 1, 512)
    assert more > 2 * 512 * (of_layers[1] - of_layers[0]) / 2, "a forward's products, and attention"
    assert more < 2 * 512 * (of_layers[1] - of_layers[0]), "no backward's"
    program = lower_training(Plan(), large, work)
    assert all("tw" in i.reads for i in program.ranks[0] if i.op == "F")


@pytest.mark.parametrize(
    ("model", "plan", "said"),
    [
        (replace(MEDUSA, target=None), Plan(), "a [target] section in the recipe"),
        (MEDUSA, Plan(tensor=2), "tensor must be 1 for decoding heads"),
        (MEDUSA, Plan(pipeline=2), "pipeline must be 1 for decoding heads"),
        (
            replace(MEDUSA, hidden=20),
            Plan(),
            "the heads' hidden_size must be the target's 16 (found 20 of tiny-medusa)",
        ),
        (replace(MEDUSA, vocab=40), Plan(), "the heads' vocab_size must be the target's 32 (found 40 of tiny-medusa)"),
        (replace(MEDUSA, count=8), Plan(), "sequence_length must be more than the 8 heads (found 8)"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: HeadsSpec, plan: Plan, said: str) -> None:
    reason = why_not(model, WORK, plan)
    assert reason is not None and said in reason


def test_heads_generate_nothing_alone() -> None:
    work = replace(WORK, kind="generate", prompt_length=4, new_tokens=4, batch=1)
    reason = why_not(replace(MEDUSA, target=None), work, Plan())
    assert reason is not None and "[model] names their target" in reason


def test_a_config_says_what_heads_are() -> None:
    said = {"architectures": ["MedusaHeads"], "hidden_size": 16, "vocab_size": 32, "num_heads": 4}
    found = from_config(said, "heads/config.json")
    assert isinstance(found, HeadsSpec)
    assert (found.count, found.depth, found.decay, found.activation, found.ffn) == (4, 1, 0.8, "silu", 0)
    wide = from_config({**said, "architectures": ["BlockwiseHeads"], "intermediate_size": 64}, "c.json", inline=True)
    assert isinstance(wide, HeadsSpec) and (wide.ffn, wide.decay, wide.activation) == (64, 1.0, "relu")
    with pytest.raises(UsageError) as failed:
        from_config({**said, "num_head": 4, "loss_decay": -1, "num_heads": 0}, "c.json", inline=True)
    assert {problem.key for problem in failed.value.problems} == {"num_head", "loss_decay", "num_heads"}


TRAIN = f"""
[model]
architectures = ["MedusaHeads"]
hidden_size = 64
vocab_size = 256
num_heads = 3
[target]
{RECIPE.split("[model]")[1].split("[machine]")[0]}
[machine]
use = "h100-sxm"
devices = 2
[workload]
kind = "train"
sequence_length = 64
global_batch = 8
"""


def test_a_recipe_of_heads_is_searched_like_any(autotune: Autotune, tmp_path: Path) -> None:
    (tmp_path / "heads.toml").write_text(TRAIN)
    found = autotune("search", str(tmp_path / "heads.toml"), "--no-lock", "--json").json
    assert found["plan"]["data"] == 2 and found["plan"]["tensor"] == 1 and found["bound"]["closed"]
    assert any("tensor must be 1 for decoding heads" in reason for reason in found["space"]["infeasible"])


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("hidden_size = 64\nvocab", "hidden_size = 60\nvocab"), 3, "hidden_size must be the target's 64 (found 60"),
        (("[target]", "[draft]"), 2, "none: nothing is drafted when training"),
        (("MedusaHeads", "MedusaHead"), 2, "nearest: MedusaHeads"),
        (("num_heads = 3", "num_head = 3"), 2, "num_heads"),
    ],
)
def test_wrong_recipes_of_heads_are_refused(
    autotune: Autotune, tmp_path: Path, change: tuple[str, str], code: int, said: str
) -> None:
    assert change[0] in TRAIN
    (tmp_path / "heads.toml").write_text(TRAIN.replace(*change))
    ran = autotune("search", str(tmp_path / "heads.toml"), "--no-lock")
    assert ran.code == code and said in ran.stderr, ran.stderr


def test_a_target_is_for_heads_alone(autotune: Autotune, tmp_path: Path) -> None:
    whole = RECIPE + "[target]\n" + RECIPE.split("[model]")[1].split("[machine]")[0]
    (tmp_path / "model.toml").write_text(whole)
    ran = autotune("search", str(tmp_path / "model.toml"), "--no-lock")
    assert ran.code == 2 and "decoding heads as [model]" in ran.stderr, ran.stderr
    (tmp_path / "heads.toml").write_text(TRAIN)
    ran = autotune("export", str(tmp_path / "heads.toml"), "--to", "megatron", "--pin", "data=2")
    assert ran.code == 2 and "no engine trains decoding heads" in ran.stderr, ran.stderr
