"""A draft that has learned to propose a block: trained on real text by the executor, its proposals kept on text that no
training reads."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from autotune.runners.checkpoint import open_checkpoint
from autotune.runners.generation import Generator
from autotune.runners.job import Job
from autotune.runners.prompts import prompt_tokens
from autotune.runners.reference import init_weight
from autotune.runners.saved import Saved, config_of
from autotune.runners.state import Loader
from autotune.spec.families import load_model
from autotune.spec.graph import Weight, parameters
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload, kept, mask_rows
from tests.pool import Pool

PLAIN = ModelSpec("byte", "LlamaForCausalLM", 96, 2, 4, 4, 24, 256, 256, max_positions=256)
BLOCK = replace(PLAIN, drafts=4, masks=1)
TRAIN = Workload(sequence_length=96, global_batch=16, precision="fp32", learning_rate=4e-3, clip=1.0)
TRAIN = replace(TRAIN, warmup_steps=10, decay_steps=100)
MASKED = replace(TRAIN, masks=mask_rows(96, 4, 0.7, 0.2))
TALK = Workload("generate", precision="fp32", prompt_length=48, new_tokens=40, batch=16)
PLAN, STEPS = Plan(micro_batch=16), 100


def config(model: ModelSpec) -> dict[str, object]:
    raw: dict[str, object] = {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "rms_norm_eps": model.norm_eps,
        "name": model.name,
        "max_position_embeddings": model.max_positions,
    }
    return config_of(raw | ({"parallel_draft": model.drafts} if model.drafts else {}), model, "fp32")


def loader(folder: Path) -> Loader:
    """A checkpoint's weights; random ones for what it lacks."""
    checkpoint = open_checkpoint(folder)

    def load(index: int, weight: Weight) -> torch.Tensor:
        if checkpoint.lacks(weight):
            return init_weight(weight, 0)
        return checkpoint.load(weight, 0, 1, torch.float32, "cpu")

    return load


def reached(folder: Path, decoding: str, speculate: int) -> tuple[list[float], list[list[int]]]:
    """Of rounds in which a model drafts for itself, on held-out text, the share that keep the first 1, 2, ... tokens:
    after real tokens it says what it says, after masks what it has learned to. And its answers."""
    plan, work = Plan(decoding=decoding, speculate=speculate, micro_batch=16), replace(TALK, draft=BLOCK)
    model, load = replace(load_model(folder), drafts=4, masks=BLOCK.masks), loader(folder)
    made = Generator.build(plan, model, work, 0, torch.device("cpu"), load, load_draft=load)
    found = made.generate(prompt_tokens(model, work, (), True))
    assert found.taken is not None
    rates = kept([[count for count in row if count] for row in found.taken.tolist()], 1 + speculate)
    return [prod(rates[: place + 1]) for place in range(speculate)], found.answers


@pytest.fixture(scope="module")
def plain(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned some text, and of no masks."""
    folder = tmp_path_factory.mktemp("plain") / "trained"
    begun = Job(PLAN, PLAIN, TRAIN, STEPS, 0, saved=Saved(str(folder), config(PLAIN)), trace=False)
    ((losses,),) = pool.run("standing", 1, jobs=[begun], folder=folder.parent / "logs")
    assert losses[0] > 5 > 3 > losses[-1]
    return folder


def adapted(pool: Pool, plain: Path, model: ModelSpec, work: Workload, folder: Path) -> tuple[float, ...]:
    """Trained on with masks, from the same weights; its losses."""
    saved = Saved(str(folder / "trained"), config(model))
    job = Job(PLAN, model, work, STEPS, 0, checkpoint=str(plain), saved=saved, trace=False)
    ((losses,),) = pool.run("standing", 1, jobs=[job], folder=folder / "logs")
    return tuple(losses)


def test_a_draft_adapted_with_masks_is_kept_further_ahead(pool: Pool, plain: Path, tmp_path: Path) -> None:
    """Adapted from a model that drafts nothing (PARD): that one with masks that it has never seen is right about the
    next token, and seldom further."""
    assert 1.5e5 < parameters(BLOCK) < 5e5
    losses = adapted(pool, plain, BLOCK, replace(MASKED, learning_rate=2e-3), tmp_path)
    assert losses[-1] < losses[0]
    block = tmp_path / "trained"
    assert load_model(block) == replace(BLOCK, dtype="float32")
    (untrained, _), (trained, _) = (reached(folder, "parallel", 4) for folder in (plain, block))
    assert untrained[0] == trained[0] == 1.0
    assert all(more > 2 * less for less, more in zip(untrained[1:], trained[1:], strict=True)), (untrained, trained)


def test_masks_of_a_frozen_model_learn_to_propose(pool: Pool, plain: Path, tmp_path: Path) -> None:
    """PaSS: its masks alone are trained, and it proposes to itself; its answers are those it gave before, and all of
    its other weights, bit for bit."""
    work = replace(MASKED, learning_rate=3e-2, weight_decay=0.0)
    losses, masks = adapted(pool, plain, replace(BLOCK, frozen=True), work, tmp_path), tmp_path / "trained"
    assert losses[-1] < losses[0]
    before, after = (open_checkpoint(folder).whole(PLAIN, torch.float32) for folder in (plain, masks))
    assert all(before[key].equal(after[key]) for key in before)
    (untrained, said), (trained, same) = (reached(folder, "masks", 2) for folder in (plain, masks))
    assert said == same
    assert all(more > 2 * less for less, more in zip(untrained, trained, strict=True)), (untrained, trained)
