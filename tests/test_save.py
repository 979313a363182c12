"""Trained weights as checkpoints: the reference's from every layout, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autotune.planners.feasible import why_not
from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.corpus import open_corpus
from autotune.runners.data import batch
from autotune.runners.job import Job
from autotune.runners.reference import adamw_step, clip_gradients, init_weights, reference_gradients, reference_logits
from autotune.runners.saved import Saved, check_free, config_of
from autotune.spec.config_file import read_config
from autotune.spec.errors import UsageError
from autotune.spec.families import from_config, load_model
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.pool import Pool
from tests.test_equality import DEEPSEEK, LLAMA, QWEN, SPARSE
from tests.test_families_run import save

STEPS = 3
WORK = Workload(
    sequence_length=8,
    global_batch=4,
    precision="fp64",
    learning_rate=1e-2,
    warmup_steps=2,
    decay_steps=4,
    clip=0.5,
)
LAYOUTS = {
    1: [(DEEPSEEK, Plan())],
    2: [
        (LLAMA, Plan(tensor=2, micro_batch=2, sequence_parallel=True)),
        (LLAMA, Plan(pipeline=2, schedule="interleaved-1f1b", chunks=2)),
        (LLAMA, Plan(pipeline=2, vocabulary="vocab-2")),
        (LLAMA, Plan(pipeline=2, layers="1,3", optimizer="post-validated")),
        (LLAMA, Plan(data=2, zero=1)),
        (QWEN, Plan(data=2, zero=2)),
        (QWEN, Plan(data=2, zero=3, optimizer_offload=60, optimizer_stride=2)),
        (LLAMA, Plan(pipeline=2, schedule="dualpipe")),
        (LLAMA, Plan(context=2, zero=3)),
        (SPARSE, Plan(data=2, zero=3)),
        (SPARSE, Plan(data=2, expert=2)),
        (DEEPSEEK, Plan(data=2, expert=2, zero=3)),
    ],
    4: [
        (LLAMA, Plan(1, 2, 2, vocabulary="vocab-1")),
        (LLAMA, Plan(2, 1, 2, 1, "zeropp", 2, zero=3, gathered=1)),
        (DEEPSEEK, Plan(tensor=2, pipeline=2, schedule="zb-h1")),
        (SPARSE, Plan(2, 2, expert=2, zero=1)),
        (DEEPSEEK, Plan(2, 1, 2, expert=2, zero=2, vocabulary="vocab-2")),
        (SPARSE, Plan(4, expert=2, zero=2, optimizer_offload=50)),
    ],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of tokens that the tiny models have."""
    file = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(file, np.random.default_rng(1).integers(0, 32, 2000, dtype=np.uint8))
    return str(file)


@lru_cache
def trained(model: ModelSpec, work: Workload) -> dict[Any, torch.Tensor]:
    """The one-process reference's weights after the steps of a run."""
    weights, states = init_weights(model, 0, torch.float64), dict[Any, Any]()
    corpus = open_corpus(work.data, model.vocab)
    for step in range(STEPS):
        tokens, targets = batch(corpus, step, work.global_batch, work.sequence_length, 0, work.global_batch)
        _, gradients = reference_gradients(model, weights, tokens, targets)
        assert clip_gradients(gradients, work.clip)
        adamw_step(weights, gradients, states, step + 1, work.rate(step + 1), work.weight_decay)
    return weights


def job(model: ModelSpec, plan: Plan, work: Workload, folder: Path, config: Mapping[str, Any] | None = None) -> Job:
    saved = Saved(str(folder), config or {})
    return Job(plan, model, work, steps=STEPS - 1, warmup=1, saved=saved, trace=False)


@pytest.mark.parametrize("world", LAYOUTS)
def test_what_is_saved_are_the_references_weights(pool: Pool, world: int, text: str, tmp_path: Path) -> None:
    work = replace(WORK, data=text)
    layouts = [(model, replace(plan, attention="math")) for model, plan in LAYOUTS[world]]
    jobs = [job(model, plan, work, tmp_path / str(at)) for at, (model, plan) in enumerate(layouts)]
    for model, plan in layouts:
        assert why_not(model, work, plan, world) is None, plan.describe()
    pool.run("standing", world, jobs=jobs, folder=tmp_path / "logs")
    expected = {model: trained(model, work) for model, _ in layouts}
    for at, (model, plan) in enumerate(layouts):
        checkpoint = open_checkpoint(tmp_path / str(at))
        assert {entry.dtype for entry in checkpoint.entries.values()} == {"F64"}
        for key, weight in checkpoint.whole(model, torch.float64).items():
            assert torch.allclose(weight, expected[model][key], rtol=0, atol=1e-10), (plan.describe(), key)
    assert not list((tmp_path / "logs").glob("*/*.safetensors")), "the ranks' parts are gone"


def test_narrow_weights_are_saved_as_they_are(pool: Pool, text: str, tmp_path: Path) -> None:
    """bf16 with fp32 masters: a file of bf16, near the reference in double precision, whoever holds what."""
    work = replace(WORK, data=text, precision="bf16", learning_rate=1e-3)
    plans = [Plan(tensor=2, attention="math"), Plan(data=2, zero=3, attention="math")]
    jobs = [job(LLAMA, plan, work, tmp_path / str(at)) for at, plan in enumerate(plans)]
    pool.run("standing", 2, jobs=jobs, folder=tmp_path / "logs")
    expected = trained(LLAMA, replace(work, precision="fp64"))
    for at in range(len(plans)):
        checkpoint = open_checkpoint(tmp_path / str(at))
        assert {entry.dtype for entry in checkpoint.entries.values()} == {"BF16"}
        for key, weight in checkpoint.whole(LLAMA, torch.float64).items():
            assert torch.allclose(weight, expected[key], rtol=2**-7, atol=STEPS * work.learning_rate), key


ALONE, DIVIDED = Plan(attention="math"), Plan(2, expert=2, zero=1, attention="math")
TRAINED = [(name, ALONE) for name in ("llama3-tied", "qwen2", "qwen3-moe", "deepseek-v3")]
TRAINED += [(name, DIVIDED) for name in ("mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3")]


@pytest.mark.parametrize(("name", "plan"), TRAINED, ids=lambda x: x if isinstance(x, str) else x.describe())
def test_transformers_loads_what_was_trained(pool: Pool, name: str, plan: Plan, tmp_path: Path) -> None:
    """From a checkpoint of its own, trained on: our logits, in the type that was written."""
    save(name, tmp_path / "before")
    raw = {**read_config(tmp_path / "before" / "config.json"), "dtype": "bfloat16"}
    del raw["model_type"]
    model = load_model(tmp_path / "before")
    work = replace(WORK, precision="fp32", global_batch=2, sequence_length=16)
    begun = job(model, plan, work, tmp_path / "after", config_of(raw, model, "fp32"))
    jobs = [replace(begun, checkpoint=str(tmp_path / "before"))]
    pool.run("standing", plan.world, jobs=jobs, folder=tmp_path / "logs")
    assert replace(load_model(tmp_path / "after"), name=model.name, dtype=model.dtype) == replace(model, extra_layers=0)
    weights = open_checkpoint(tmp_path / "after").whole(model, torch.float32)
    tokens = torch.randint(model.vocab, (2, 24), generator=torch.Generator().manual_seed(2))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert torch.allclose(reference_logits(model, weights, tokens), logits, rtol=1e-5, atol=1e-5)
    old = open_checkpoint(tmp_path / "before").whole(model, torch.float32)
    same = {key[1] for key, weight in weights.items() if torch.equal(weight, old[key])}
    assert same == ({"route.bias"} if name == "deepseek-v3" else set()), "all but constants moved"


def test_a_config_says_what_was_written() -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    raw = {"architectures": "LlamaForCausalLM", "vocab_size": 16, **shape, "rope_theta": 5e5, "torch_dtype": "float16"}
    model = from_config(raw, "test")
    config = config_of({**raw, "quantization_config": {}}, model, "bf16")
    changed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    assert config == {**raw, **changed}
    assert config_of({**raw, "dtype": "float16"}, model, "fp32")["dtype"] == "float32"
    assert replace(from_config(config, "test"), dtype=model.dtype) == model


def test_a_folder_must_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_free(tmp_path / "deep" / "er")
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, said in (
        ("full", "found something there already; expected a folder that does not exist or is empty"),
        ("full/file", "not overwritten"),
        ("full/file/below", "which is no folder; expected a folder that can be written"),
        ("link", "not overwritten"),
        ("x" * 300, "cannot be looked at"),
    ):
        with pytest.raises(UsageError) as caught:
            check_free(tmp_path / place)
        assert said in str(caught.value) and caught.value.exit_code == 2
    monkeypatch.setattr("os.path.ismount", lambda place: True)
    with pytest.raises(UsageError, match="mounted; expected a folder below it"):
        check_free(tmp_path / "empty")
