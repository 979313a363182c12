"""The oracle against transformers (logits, gradients, tokens, rotary tables) and against torch (AdamW)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from autotune.runners import rope
from autotune.runners.reference import (
    BETAS,
    EPSILON,
    adamw_step,
    init_weights,
    reference_generate,
    reference_gradients,
    reference_logits,
    reference_loss,
)
from autotune.spec.errors import UsageError
from autotune.spec.families import from_config
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ModelSpec, dict[tuple[int, str], Tensor]]:
    """A random transformers model, our shape of it, and its weights by our names."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **extra}, architectures=[f"{name}ForCausalLM"])
    torch.manual_seed(len(family))
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # gains other than 1, biases other than 0, logits far apart
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model, state = from_config(config.to_dict(), family), theirs.state_dict()
    weights: dict[tuple[int, str], Tensor] = {}
    shared: dict[object, Tensor] = {}
    for block in blocks(model):
        for weight in block.weights():
            if weight.parts not in shared:
                shared[weight.parts] = torch.cat([state[part] for part, _ in weight.parts])
                assert shared[weight.parts].shape == weight.shape
            weights[block.index, weight.name] = shared[weight.parts]
    return theirs, model, weights


def some_tokens(model: ModelSpec, length: int) -> Tensor:
    return torch.randint(0, model.vocab, (2, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str) -> None:
    theirs, model, weights = build(family)
    tokens = some_tokens(model, 50)  # longer than the trained length of the scaled rotary tables, and the window
    with torch.no_grad():
        wanted = theirs(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(reference_logits(model, weights, tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_transformers(family: str) -> None:
    theirs, model, weights = build(family)
    row = some_tokens(model, 21)
    tokens, targets = row[:, :-1], row[:, 1:]
    logits = theirs(tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    wanted.backward()
    loss, grads = reference_gradients(model, weights, tokens, targets)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference_loss(model, weights, tokens, targets), loss)
    named = dict(theirs.named_parameters())
    for block in blocks(model):
        for weight in block.weights():
            parts = torch.cat([named[part].grad for part, _ in weight.parts])
            torch.testing.assert_close(grads[block.index, weight.name], parts, rtol=1e-4, atol=1e-6)
    if model.tied:
        assert grads[0, "embed.weight"] is grads[model.layers + 1, "lm_head.weight"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_greedy_tokens_equal_those_of_transformers(family: str) -> None:
    theirs, model, weights = build(family)
    prompt = some_tokens(model, 6)
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    assert torch.equal(reference_generate(model, weights, prompt, 9), wanted[:, 6:])


def test_a_reference_in_another_precision_converts_its_weights() -> None:
    _, model, weights = build("llama")
    tokens = some_tokens(model, 8)
    logits = reference_logits(model, weights, tokens, torch.float64)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), reference_logits(model, weights, tokens), rtol=1e-4, atol=1e-5)
    assert reference_loss(model, weights, tokens, tokens, torch.bfloat16).dtype == torch.float32


def their_tables(scaling: dict[str, Any], length: int) -> tuple[Tensor, Tensor]:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**{**SHAPE, "head_dim": 64, "rope_parameters": dict(scaling)})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        LLAMA3,
        YARN,
        {**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 1.25, "truncate": False},
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn with mscale", "yarn with attention factor"],
)
def test_rotary_tables_equal_those_of_transformers_to_the_bit(scaling: dict[str, Any]) -> None:
    items = tuple(sorted((k, v) for k, v in scaling.items() if k != "rope_theta"))
    model = ModelSpec("m", "LlamaForCausalLM", 32, 1, 4, 2, 64, 8, 8, max_positions=128)
    model = replace(model, rope_theta=scaling["rope_theta"], rope_scaling=items)
    for ours, theirs in zip(rope.tables(model, 200), their_tables(scaling, 200), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_a_rotary_scaling_that_is_not_known_or_not_complete_is_refused() -> None:
    model = ModelSpec("m", "LlamaForCausalLM", 32, 1, 4, 2, 8, 8, 8)
    with pytest.raises(UsageError, match=r"m: rope_scaling.rope_type: found 'llama4'") as error:
        rope.tables(replace(model, rope_scaling=(("rope_type", "llama4"),)), 4)
    assert error.value.hint == "did you mean llama3?"
    with pytest.raises(UsageError, match=r"rope_scaling.factor: found nothing"):
        rope.tables(replace(model, rope_scaling=(("type", "linear"),)), 4)


def test_initial_weights_depend_on_the_seed_and_the_name_alone() -> None:
    model = ModelSpec("m", "Qwen2ForCausalLM", 64, 2, 4, 2, 16, 96, 300, tied=True, qkv_bias=True)
    weights, again, other = init_weights(model, 1), init_weights(model, 1, torch.bfloat16), init_weights(model, 2)
    assert weights[0, "embed.weight"] is weights[3, "lm_head.weight"]
    for key, weight in weights.items():
        assert torch.equal(weight.bfloat16(), again[key])
        normal = not key[1].endswith("bias") and "norm" not in key[1]
        assert torch.equal(weight, other[key]) != normal
        if normal:
            assert abs(weight.std().item() / 0.02 - 1) < 0.05
            assert abs(weight.mean().item()) < 1e-3
    assert weights[1, "qkv.bias"].abs().max() == 0
    assert torch.equal(weights[1, "attn_norm.weight"], torch.ones(64))
    # A layer's weight is the same in a deeper model, and q's rows do not depend on how many heads k and v have.
    deeper, wider = init_weights(replace(model, layers=3), 1), init_weights(replace(model, kv_heads=4), 1)
    assert torch.equal(deeper[2, "down.weight"], weights[2, "down.weight"])
    assert torch.equal(wider[1, "qkv.weight"][:64], weights[1, "qkv.weight"][:64])
    assert not torch.equal(weights[1, "down.weight"], weights[2, "down.weight"])


def test_adamw_equals_torchs() -> None:
    model = ModelSpec("m", "LlamaForCausalLM", 16, 1, 2, 1, 8, 24, 20, tied=True)
    weights = init_weights(model, 4, torch.float64)
    before = {key: weight.clone() for key, weight in weights.items()}
    unique = {id(weight): weight for weight in weights.values()}
    theirs = [weight.clone().requires_grad_() for weight in unique.values()]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=BETAS, eps=EPSILON, weight_decay=0.1)
    state: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    tokens = some_tokens(model, 9)
    for step in (1, 2, 3):
        _, grads = reference_gradients(model, weights, tokens[:, :-1], tokens[:, 1:])
        by_weight = {id(weight): grads[key] for key, weight in weights.items()}
        for parameter, which in zip(theirs, unique, strict=True):
            parameter.grad = by_weight[which]
        optimizer.step()
        adamw_step(weights, grads, state, step, 0.01, 0.1)
        for parameter, weight in zip(theirs, unique.values(), strict=True):
            torch.testing.assert_close(weight, parameter.detach(), rtol=1e-12, atol=1e-12)
    assert all(not torch.equal(weight, before[key]) for key, weight in weights.items())
