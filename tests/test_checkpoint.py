"""Checkpoints that transformers wrote: what is read, what is refused, and that shards make the whole again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from autotune.runners.checkpoint import (
    INDEX,
    SINGLE,
    open_checkpoint,
    save_checkpoint,
    shard,
    split_parts,
    unshard,
)
from autotune.spec.errors import UsageError
from autotune.spec.families import load_model
from autotune.spec.graph import Weight, blocks
from autotune.spec.model import ModelSpec

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}


def saved(kind: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save a random tiny model of transformers; its parameters by name."""
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind](**SHAPE, **DENSE[kind])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # norms and biases too: what is constant proves no order
    model.save_pretrained(folder, **options)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def weights(model: ModelSpec) -> list[Weight]:
    return [weight for block in blocks(model) for weight in block.weights()]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    saved("qwen2", tmp_path / "qwen", max_shard_size="8KB")
    return tmp_path / "qwen"


@pytest.mark.parametrize("sizes", [{}, {"max_shard_size": "8KB"}], ids=["one-file", "several-files"])
@pytest.mark.parametrize("kind", DENSE)
def test_every_weight_is_that_of_transformers(kind: str, sizes: dict[str, str], tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path / "m", **sizes)
    assert (tmp_path / "m" / INDEX).is_file() == bool(sizes)
    checkpoint, ours = open_checkpoint(tmp_path / "m"), weights(load_model(tmp_path / "m"))
    checkpoint.verify(ours)
    seen = set()
    for weight in ours:
        whole = checkpoint.load(weight, 0, 1, torch.float32, "cpu")
        assert tuple(whole.shape) == weight.shape
        for name, tensor in split_parts(weight, whole).items():
            assert torch.equal(tensor, theirs[name])
            seen.add(name)
    assert seen == set(theirs)
    assert ("lm_head.weight" in checkpoint.entries) == (kind != "qwen2")


@pytest.mark.parametrize("ranks", [1, 2])
def test_loaded_shards_are_the_shards_of_the_whole(ranks: int, qwen: Path) -> None:
    checkpoint = open_checkpoint(qwen)
    divided = 0
    for weight in weights(load_model(qwen)):
        whole = checkpoint.load(weight, 0, 1, torch.float64, "cpu")
        shards = [checkpoint.load(weight, rank, ranks, torch.float64, "cpu") for rank in range(ranks)]
        for rank, mine in enumerate(shards):
            assert torch.equal(mine, shard(weight, whole, rank, ranks))
        assert torch.equal(unshard(weight, shards), whole)
        divided += shards[0].shape != whole.shape
    assert (divided > 0) == (ranks > 1)


def test_a_fused_shard_holds_its_heads_of_each_part() -> None:
    """Four query heads and two of keys and values, on two ranks: the second holds heads 2, 3, then 1, then 1."""
    weight = Weight("qkv.weight", (8, 3), (("q", 4), ("k", 2), ("v", 2)), shard=0)
    whole = torch.arange(24.0).reshape(8, 3)
    assert torch.equal(shard(weight, whole, 1, 2), whole[[2, 3, 5, 7]])
    assert torch.equal(unshard(weight, [shard(weight, whole, r, 2) for r in range(2)]), whole)
    narrow = Weight("out.weight", (2, 4), (("o", 2),), shard=1)
    assert torch.equal(shard(narrow, whole[:2, :].repeat(1, 2)[:, :4], 1, 2), torch.tensor([[2.0, 0.0], [5.0, 3.0]]))
    bias = Weight("out.bias", (2,), (("b", 2),))
    assert torch.equal(shard(bias, torch.ones(2), 1, 2), torch.ones(2))


def test_ranks_that_do_not_divide(qwen: Path) -> None:
    checkpoint = open_checkpoint(qwen)
    embed = weights(load_model(qwen))[0]
    with pytest.raises(UsageError, match="nearest: 2"):
        checkpoint.load(embed, 0, 3, torch.float32, "cpu")


def test_a_checkpoint_that_we_save_is_read_by_transformers(tmp_path: Path) -> None:
    theirs = saved("qwen3", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for name, options in {"one": {}, "several": {"file_bytes": 8000}}.items():
        checkpoint, tensors = open_checkpoint(tmp_path / "a"), {}
        for weight in weights(load_model(tmp_path / "a")):
            tensors.update(split_parts(weight, checkpoint.load(weight, 0, 1, torch.float32, "cpu")))
        save_checkpoint(tmp_path / name, tensors, config, **options)
        assert (tmp_path / name / INDEX).is_file() == (name == "several")
        assert len({file.stat().st_mode for file in (tmp_path / name).iterdir()}) == 1, "who may read one may read all"
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(torch.equal(p, theirs[n]) for n, p in again.named_parameters())
        open_checkpoint(tmp_path / name).verify(weights(load_model(tmp_path / name)))
    with pytest.raises(UsageError, match="not overwritten"):
        save_checkpoint(tmp_path / "one", tensors, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "one", "several"]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "x", {"a": torch.ones(2)}, {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_types_are_cast(tmp_path: Path) -> None:
    weight = Weight("a", (2, 2), (("a", 2),))
    save_checkpoint(tmp_path / "x", {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)}, {})
    loaded = open_checkpoint(tmp_path / "x").load(weight, 0, 1, torch.float64, "cpu")
    assert loaded.dtype == torch.float64 and loaded.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_all_missing_and_misshapen_tensors_at_once(tmp_path: Path) -> None:
    saved("llama", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(4, 32)
    tensors["lm_head.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    model = load_model(tmp_path / "m")
    save_checkpoint(tmp_path / "n", tensors, {})
    with pytest.raises(UsageError) as caught:
        open_checkpoint(tmp_path / "n").verify(weights(model))
    found = {problem.key: (problem.found, problem.expected) for problem in caught.value.problems}
    assert found == {
        "model.layers.1.mlp.up_proj.weight": ("no such tensor", "a tensor of shape [48, 32]"),
        "model.norm.weight": ("no such tensor", "a tensor of shape [32]"),
        "model.layers.0.self_attn.k_proj.weight": ("shape [4, 32]", "a tensor of shape [16, 32]"),
        "lm_head.weight": ("I8", "one of F64, F32, F16, BF16"),
    }
    assert caught.value.exit_code == 2


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert "nearest: llama" in refused(tmp_path / "lama")
    assert "no weights" in refused(tmp_path / "llama")
    (tmp_path / "llama" / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights are never read" in refused(tmp_path / "llama")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../away.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "model.bin"])
def test_an_index_cannot_point_elsewhere(name: str, qwen: Path) -> None:
    (qwen.parent / "away.safetensors").write_bytes(b"")
    edit_index(qwen, lambda content: content["weight_map"].update({"model.norm.weight": name}))
    assert "a .safetensors file inside the folder" in refused(qwen)


def test_an_index_that_does_not_hold_together(qwen: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        files = sorted(set(content["weight_map"].values()))
        content["weight_map"]["model.norm.weight"] = "model-00099-of-00002.safetensors"
        content["weight_map"]["model.nom.weight"] = files[0]

    edit_index(qwen, change)
    told = refused(qwen)
    assert "model-00099-of-00002.safetensors, which is not there" in told and "model.nom.weight" in told
    edit_index(qwen, lambda content: content.pop("weight_map"))
    assert "weight_map" in refused(qwen)
    (qwen / INDEX).write_text("{")
    assert "JSON" in refused(qwen)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:4], "a length of"),
        (lambda data: b"", "a length of"),
        (lambda data: (1 << 60).to_bytes(8, "little") + data[8:], "a length of"),
        (lambda data: data[:8] + b"x" + data[9:], "no JSON"),
        (lambda data: data.replace(b'"shape":[32]', b'"shape":[31]', 1), "expected 124 bytes"),
        (lambda data: data.replace(b'"data_offsets"', b'"data_offzets"', 1), "without dtype, shape and data_offsets"),
    ],
)
def test_spoiled_files(spoil: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    saved("llama", tmp_path / "m")
    file = tmp_path / "m" / SINGLE
    file.write_bytes(spoil(file.read_bytes()))
    assert says in refused(tmp_path / "m")


def test_opening_reads_no_weights(qwen: Path) -> None:
    """Zeroed data changes nothing of what opening and verifying find."""
    before = open_checkpoint(qwen)
    for file in qwen.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:start] + bytes(len(data) - start))
    assert open_checkpoint(qwen) == before
