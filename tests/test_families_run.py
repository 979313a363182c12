"""Every family, saved by transformers and run by us: the same logits at every position, the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import Shape
from autotune.runners.body import compile_body, run_body
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.ops import Env
from autotune.runners.reference import reference_logits
from autotune.runners.rope import tables
from autotune.runners.state import StageState
from autotune.spec.families import load_model
from autotune.spec.graph import Weight, blocks
from tests.commands import Inside

SHAPE = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SPARSE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 12}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2}
ROUTED |= {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", SPARSE | {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "deepseek-v2-lite": ("deepseek_v2", LATENT | ROUTED | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v2": (
        "deepseek_v2",
        LATENT | ROUTED | GROUPS | {"topk_method": "group_limited_greedy", "rope_parameters": YARN},
    ),
    "deepseek-v3": ("deepseek_v3", LATENT | ROUTED | GROUPS | {"norm_topk_prob": True, "rope_parameters": YARN}),
}


def save(name: str, folder: Path, **options: Any) -> Any:
    """Saves a random model of the family and gives transformers' own, as it loads it again in fp32."""
    kind, changes = FAMILIES[name]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPE, **changes}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # norms and biases too: what is constant proves nothing
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in key else noise * (0.3 if parameter.dim() == 1 else 0.12))
        for key, constant in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                constant.copy_(torch.rand_like(constant) * 0.2)
    model.save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def our_logits(folder: Path, tokens: Tensor, attention: str) -> Tensor:
    """fp32 logits [batch, length, vocab] of the bodies that a plan runs, with the checkpoint's weights."""
    model, checkpoint = load_model(folder), open_checkpoint(folder)
    batch, length = tokens.shape
    shape = Shape(batch, length, length, dtype="fp32", attention=attention)

    def load(index: int, weight: Weight) -> Tensor:
        return checkpoint.load(weight, 0, 1, torch.float32, "cpu")

    whole = tuple(blocks(model))
    state = StageState.untrained(whole, load, "fp32", torch.device("cpu"))
    x = tokens.reshape(-1)
    for block in whole:
        body = lower_block(block, shape, loss=False, train=False)
        env = Env(
            model, batch, length, torch.arange(length), tables(model, length), state.of(block)[0], attention=attention
        )
        values = {block.nodes[0].reads[0]: x}
        x = run_body(compile_body(block, body.forward), env, values)[body.output]
    return x.view(batch, length, model.vocab)


@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, attention: str, tmp_path: Path) -> None:
    theirs = save(name, tmp_path / "m")
    tokens = torch.randint(SHAPE["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens).logits
        ours = our_logits(tmp_path / "m", tokens, attention)
        spec = load_model(tmp_path / "m")
        oracle = reference_logits(spec, open_checkpoint(tmp_path / "m").whole(spec, torch.float32), tokens)
    assert 0.5 < float(expected.std()) < 5 and expected.dtype == torch.float32
    for found in (ours, oracle):
        assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


RECIPE = """
model = {{ checkpoint = "{folder}" }}
machine = {{ use = "./two.json", devices = {devices} }}
[workload]
kind = "generate"
prompt = ["Beautiful is better than", "Flat is better than nest"]
prompt_length = 24
new_tokens = 16
batch = 2
precision = "fp32"
steps = 1
"""
PLANS = {
    "llama3-tied": (2, ("--pin", "tensor=2")),
    "qwen2": (2, ("--pin", "pipeline=2")),
    "mixtral": (2, ("--pin", "tensor=2")),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_run_continues_a_prompt_as_transformers_does(name: str, inside: Inside) -> None:
    theirs = save(name, inside.folder / "m", **({"max_shard_size": "64KB"} if name == "qwen2" else {}))
    assert (inside.folder / "m" / "model.safetensors.index.json").exists() == (name == "qwen2")
    devices, pins = PLANS[name]
    recipe = inside.write("r.toml", RECIPE.format(folder="m", devices=devices))
    said = inside.run("run", recipe, *(pins or ("--pin", "tensor=1")), "--pin", "micro_batch=2", "--check", "--json")
    assert said.code == 0, said.stderr
    prompts = torch.tensor([list(b"Beautiful is better than"), list(b"Flat is better than nest")])
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = theirs.generate(prompts, do_sample=False, max_new_tokens=16, attention_mask=torch.ones_like(prompts))
    assert said.json["tokens"] == expected[:, 24:].tolist()
    assert len({token for row in said.json["tokens"] for token in row}) > 8  # what came before counts
    assert said.json["equal"] is True
