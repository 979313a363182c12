"""Model configs: exact parameter counts and tensor names against transformers, and what wrong configs are told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from autotune.spec.errors import UsageError
from autotune.spec.families import FAMILIES, from_config, load_model
from autotune.spec.graph import blocks, kv_bytes_per_token, parameters
from autotune.spec.model import ModelSpec

MODELS = Path(__file__).resolve().parent.parent / "recipes" / "models"
SHIPPED = sorted(MODELS.glob("*.json"))
NAMES = [path.stem for path in SHIPPED]

# Totals that the model cards' safetensors metadata state, where it counts the same tensors.
PUBLISHED = {
    "meta-llama--Llama-3.2-1B": 1_235_814_400,
    "meta-llama--Llama-3.1-8B": 8_030_261_248,
    "meta-llama--Llama-3.1-70B": 70_553_706_496,
    "mistralai--Mistral-7B-v0.1": 7_241_732_096,
    "mistralai--Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen--Qwen2.5-0.5B": 494_032_768,
    "Qwen--Qwen2.5-7B": 7_615_616_512,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "Qwen--Qwen3-32B": 32_762_123_264,
    "Qwen--Qwen3-30B-A3B": 30_532_122_624,
    "deepseek-ai--DeepSeek-V2-Lite": 15_706_484_224,
}


def judge(raw: dict[str, Any]) -> Any:
    """The model that transformers builds from a config, without memory for its weights."""
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tensors(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor that the graph declares, with its shape."""
    weights = (weight for block in blocks(model) for weight in block.weights())
    return {name: (rows, *weight.shape[1:]) for weight in weights for name, rows in weight.parts}


def tiny(**changes: Any) -> dict[str, Any]:
    """A small dense config in the keys of transformers 4."""
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
    }
    return {key: value for key, value in {**base, **changes}.items() if value != "absent"}


def tiny_latent(**changes: Any) -> dict[str, Any]:
    """A small DeepSeek-V3 config: latent attention, one dense layer, then routed ones with shared experts."""
    shape = {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
    }
    return tiny(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", **{**shape, **changes})


def test_the_models_that_must_ship_do() -> None:
    assert set(NAMES) >= {*PUBLISHED, "Qwen--Qwen3-0.6B", "deepseek-ai--DeepSeek-V3"}
    assert {load_model(path).architecture for path in SHIPPED} == set(FAMILIES)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_parameters_equal_those_of_transformers(path: Path) -> None:
    model = load_model(path)
    assert model.name == path.stem
    assert parameters(model) == sum(p.numel() for p in judge(json.loads(path.read_text())).parameters())
    assert parameters(model) == PUBLISHED.get(path.stem, parameters(model))


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_attention_and_norms_are_named_and_shaped_as_in_transformers(path: Path) -> None:
    """All tensors of a dense model; of the others all but the routed experts, which transformers holds fused."""
    model = load_model(path)
    theirs = {name: tuple(p.shape) for name, p in judge(json.loads(path.read_text())).named_parameters()}
    ours = tensors(model)
    if model.experts:
        theirs = {name: shape for name, shape in theirs.items() if ".mlp.experts." not in name}
        ours = {name.replace("block_sparse_moe", "mlp"): s for name, s in ours.items() if ".experts." not in name}
    assert ours == theirs


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_attention_bias_is_on_all_four_projections(architecture: str) -> None:
    kind = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}[architecture]
    raw = tiny(architectures=[architecture], model_type=kind, attention_bias=True, head_dim=32)
    assert tensors(from_config(raw, "x")) == {n: tuple(p.shape) for n, p in judge(raw).named_parameters()}


@pytest.mark.parametrize(
    "raw",
    [
        tiny_latent(),
        tiny_latent(q_lora_rank=None, attention_bias=True),
        tiny_latent(attention_bias=True, tie_word_embeddings=True),
        tiny(
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            num_hidden_layers=5,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
        ),
    ],
    ids=["latent", "direct-queries-and-bias", "latent-with-bias-tied", "qwen-sparse-step"],
)
def test_rare_settings_count_as_in_transformers(raw: dict[str, Any]) -> None:
    assert parameters(from_config(raw, "x")) == sum(p.numel() for p in judge(raw).parameters())


def test_saved_expert_checkpoints_hold_the_declared_tensors(tmp_path: Path) -> None:
    """transformers saves experts one by one, under the names that the families publish."""
    mixtral = tiny(
        architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4, num_experts_per_tok=2
    )
    for name, raw in {"mixtral": mixtral, "latent": tiny_latent()}.items():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        model = load_model(tmp_path / name)
        data = (tmp_path / name / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        saved = {key: tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}
        saved = {key: shape for key, shape in saved.items() if not key.endswith("e_score_correction_bias")}
        assert tensors(model) == saved
        assert (model.architecture, model.name) == (raw["architectures"][0], name)


def test_cache_bytes_a_token() -> None:
    """Two vectors a head and layer; for latent attention 512 + 64 elements a layer (DeepSeek-V2, section 2.1.4)."""
    assert kv_bytes_per_token(load_model(MODELS / "meta-llama--Llama-3.1-8B.json")) == 32 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(load_model(MODELS / "deepseek-ai--DeepSeek-V3.json")) == 61 * 576 * 2


def test_head_width_is_what_the_config_says() -> None:
    assert load_model(MODELS / "Qwen--Qwen3-0.6B.json").head_dim == 128
    assert from_config(tiny(), "x").head_dim == 16
    assert from_config(tiny(architectures=["Qwen3ForCausalLM"]), "x").head_dim == 128


@pytest.mark.parametrize(
    ("architecture", "keys", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 8}, 8),
        ("MistralForCausalLM", {"sliding_window": None}, 0),
        ("MistralForCausalLM", {}, 4096),
        ("LlamaForCausalLM", {"sliding_window": 8}, 0),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, 0),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, 0),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            0,
        ),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
            8,
        ),
    ],
)
def test_windows(architecture: str, keys: dict[str, Any], window: int) -> None:
    assert from_config(tiny(architectures=[architecture], **keys), "x").window == window


def test_old_and_new_rotary_keys_say_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = from_config(tiny(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}), "x")
    new = from_config(tiny(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}), "x")
    assert old == new
    assert dict(new.rope_scaling) == {"rope_type": "llama3", **scaling}
    plain = from_config(tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "x")
    assert (plain.rope_theta, plain.rope_scaling) == (1e6, ())
    assert from_config(tiny(), "x").rope_theta == 10000.0


def test_a_table_of_a_recipe_is_read_like_a_file() -> None:
    model = from_config(tiny(name="mine", dtype="float32"), "recipes/small.toml")
    assert (model.name, model.dtype, model.tied) == ("mine", "float32", False)
    assert from_config(tiny(), "recipes/small.toml").name == "small"


def test_experts_of_deepseek() -> None:
    experts = load_model(MODELS / "deepseek-ai--DeepSeek-V3.json").experts
    assert experts is not None
    assert [experts.routed(layer) for layer in range(5)] == [False, False, False, True, True]
    assert (experts.groups, experts.top_groups, experts.scale, experts.score_bias) == (8, 4, 2.5, True)
    lite = load_model(MODELS / "deepseek-ai--DeepSeek-V2-Lite.json").experts
    assert lite is not None
    assert (lite.shared_ffn, lite.scoring, lite.normalise) == (2816, "softmax", False)


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("missing", tiny(hidden_size="absent"), "hidden_size", "no such key"),
    ("misspelled", tiny(hidden_size="absent", hiden_size=64), "hidden_size", "nearest: hiden_size"),
    ("misspelled option", tiny(tie_word_embedings=True), "tie_word_embedings", "nearest: tie_word_embeddings"),
    ("text for a number", tiny(vocab_size="256"), "vocab_size", "a whole number"),
    ("fraction", tiny(num_hidden_layers=2.5), "num_hidden_layers", "2.5 (float)"),
    ("true for a number", tiny(num_hidden_layers=True), "num_hidden_layers", "true (bool)"),
    ("zero", tiny(intermediate_size=0), "intermediate_size", ">= 1"),
    ("number for a flag", tiny(tie_word_embeddings=1), "tie_word_embeddings", "true or false"),
    ("kv heads", tiny(num_key_value_heads=3), "num_key_value_heads", "nearest: 2"),
    ("heads do not divide", tiny(hidden_size=66), "head_dim", "no multiple"),
    ("odd head", tiny(head_dim=15), "head_dim", "nearest: 16"),
    ("architecture", tiny(architectures=["GemmaForCausalLM"]), "architectures", "nearest: LlamaForCausalLM"),
    ("no architecture", tiny(architectures="absent"), "architectures", "no such key"),
    ("two architectures", tiny(architectures=["LlamaForCausalLM"] * 2), "architectures", "one of"),
    ("activation", tiny(hidden_act="gelu"), "hidden_act", "silu"),
    ("feed-forward bias", tiny(mlp_bias=True), "mlp_bias", "not supported"),
    ("dropout", tiny(attention_dropout=0.1), "attention_dropout", "0.0"),
    ("rotary kind", tiny(rope_scaling={"rope_type": "lama3"}), "rope_scaling.rope_type", "nearest: llama3"),
    ("rotary key", tiny(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor", "no such key"),
    ("rotary table", tiny(rope_scaling=[1]), "rope_scaling", "a table"),
    ("rotary list", tiny(rope_parameters={"rope_type": "yarn", "factor": 2, "x": [1]}), "rope_parameters.x", "[1]"),
    ("dtype", tiny(torch_dtype="bf16"), "torch_dtype", "nearest: bfloat16"),
    (
        "mixed windows",
        tiny(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, max_window_layers=1),
        "max_window_layers",
        "1 of 2 layers",
    ),
    ("silent q_lora_rank", tiny_latent(q_lora_rank="absent"), "q_lora_rank", "no such key"),
    ("groups", tiny_latent(n_group=3), "n_group", "a divisor of n_routed_experts = 8"),
    ("top groups", tiny_latent(topk_group=5), "topk_group", "at most n_group = 4"),
    ("top experts", tiny_latent(num_experts_per_tok=9), "num_experts_per_tok", "nearest: 8"),
    ("expert stride", tiny_latent(moe_layer_freq=2), "moe_layer_freq", "expected 1"),
    ("scoring", tiny_latent(scoring_func="softmax"), "scoring_func", "sigmoid"),
]


@pytest.mark.parametrize(("raw", "key", "says"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_configs_say_what_would_be_right(raw: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_config(raw, "models/some.json")
    assert caught.value.exit_code == 2
    assert [problem.key for problem in caught.value.problems] == [key]
    assert says in str(caught.value) and "models/some.json" in str(caught.value)


def told(raw: dict[str, Any]) -> dict[str, str]:
    """Key to what is said of it, of a table in a recipe that must be refused."""
    with pytest.raises(UsageError) as caught:
        from_config(raw, "r.toml: model", inline=True)
    assert all(problem.file == "r.toml: model" for problem in caught.value.problems)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_a_table_in_a_recipe_holds_no_unknown_key() -> None:
    """Near a key of the architecture or not; a config.json may hold any but the first."""
    raw = tiny(tie_word_embedings=True, flux_capacitor=1, sliding_window=4096, num_experts=8, window=3)
    found = told(raw)
    assert set(found) == {"tie_word_embedings", "flux_capacitor", "sliding_window", "num_experts", "window"}
    assert "nearest: tie_word_embeddings" in found["tie_word_embedings"]
    assert "an unknown key" in found["flux_capacitor"] and "one of architectures, attention_bias" in found["window"]
    assert "nearest" not in found["flux_capacitor"]
    assert "nearest: rope_theta" in told(tiny(rope_base=1e6))["rope_base"]
    assert from_config({**raw, "tie_word_embedings": None} | {"tie_word_embeddings": True}, "some.json").tied


def test_a_rotary_table_in_a_recipe_holds_no_unknown_key() -> None:
    rotary = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slo": 1, "truncate": False}
    assert from_config(tiny(rope_scaling=rotary), "some.json").rope_scaling
    found = told(tiny(rope_scaling=rotary))
    assert set(found) == {"rope_scaling.beta_slo"} and "nearest: beta_slow" in found["rope_scaling.beta_slo"]


def test_a_misspelled_key_that_is_required_is_told_once() -> None:
    assert "nearest: hiden_size" in told(tiny(hidden_size="absent", hiden_size=64))["hidden_size"]
    assert set(told(tiny(hidden_size="absent", hiden_size=64))) == {"hidden_size"}


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_a_published_config_may_be_pasted_into_a_recipe(path: Path) -> None:
    raw = json.loads(path.read_text())
    assert from_config(raw, "r.toml", "same", inline=True) == from_config(raw, "some.json", "same")


@pytest.mark.parametrize("kind", sorted({json.loads(path.read_text())["model_type"] for path in SHIPPED}))
def test_every_key_of_transformers_configs_is_known(kind: str) -> None:
    """What transformers itself writes for an architecture, defaults and all, holds nothing that would be refused."""
    raw = CONFIG_MAPPING[kind]().to_dict()
    name = next(json.loads(p.read_text())["architectures"] for p in SHIPPED if f'"{kind}"' in p.read_text())
    with pytest.raises(UsageError) as caught:
        from_config({**raw, "architectures": name, "flux_capacitor": 1}, "r.toml", inline=True)
    unknown = [problem.key for problem in caught.value.problems if "unknown" in problem.found]
    assert unknown == ["flux_capacitor"]


def test_all_problems_are_told_at_once() -> None:
    raw = tiny(architectures=["LlamaForCausaLM"], vocab_size="x", num_key_value_heads=3, hidden_act="relu")
    with pytest.raises(UsageError) as caught:
        from_config(raw, "x")
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"architectures", "vocab_size", "num_key_value_heads", "hidden_act"}


def broken(write: Callable[[Path], object], folder: Path) -> str:
    write(folder / "some.json")
    with pytest.raises(UsageError) as caught:
        load_model(folder / "some.json")
    return str(caught.value)


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    assert "line 1, column 13" in broken(lambda file: file.write_text('{"a": 1, "b"'), tmp_path)
    assert "expected a table" in broken(lambda file: file.write_text("[1]"), tmp_path)
    assert "cannot be read" in broken(lambda file: file.write_bytes(b"\xff\xfe"), tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "llama.json").write_text("{}")
    with pytest.raises(UsageError, match=r"nearest: llama\.json"):
        load_model(tmp_path / "lama.json")
    with pytest.raises(UsageError, match="no-folder"):
        load_model(tmp_path / "no-folder" / "lama.json")


def test_a_folder_means_its_config(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(tiny()))
    assert load_model(tmp_path / "mine").name == "mine"


def test_reading_a_model_needs_no_torch() -> None:
    code = "import sys, autotune.spec.families, autotune.spec.graph; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
