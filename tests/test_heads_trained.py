"""Heads that were really trained on a model that was: what they propose is kept far more often than by chance, in rows
and in the tree that their ranks ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from autotune.planners.decoding.chains import expected
from autotune.planners.decoding.ranks import replayed, table
from autotune.planners.decoding.strategies import variants
from autotune.planners.decoding.trees import Tree
from autotune.planners.predict_generation import rates
from autotune.runners.job import Job, RunResult
from autotune.runners.saved import Saved, config_of
from autotune.spec.families import load_model
from autotune.spec.heads import HeadsSpec
from autotune.spec.model import ModelSpec
from autotune.spec.plan import TYPICAL, Plan
from autotune.spec.workload import Acceptance, Workload
from tests.pool import Pool

TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
HEADS = {"architectures": ["MedusaHeads"], "hidden_size": 64, "vocab_size": 256, "num_heads": 3}
STEPS = 150
TRAIN = Workload(
    sequence_length=64,
    global_batch=16,
    precision="fp32",
    learning_rate=6e-3,
    warmup_steps=10,
    decay_steps=STEPS,
    clip=1.0,
)
GENERATE = Workload("generate", precision="fp32", prompt_length=48, new_tokens=40, batch=8)
ROW = Plan(micro_batch=8, decoding="heads", speculate=3)


class Trained(NamedTuple):
    """Folders of checkpoints and what they are of; the losses of the heads' training."""

    target: Path
    heads: Path
    losses: tuple[float, ...]

    @property
    def models(self) -> tuple[ModelSpec, HeadsSpec]:
        heads = load_model(self.heads)
        assert isinstance(heads, HeadsSpec)
        return load_model(self.target), heads


@pytest.fixture(scope="module")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A target, then heads on it, each trained for some seconds on the standard library."""
    folder = tmp_path_factory.mktemp("trained")

    def train(name: str, config: dict[str, Any], **more: Any) -> tuple[float, ...]:
        from autotune.spec.families import from_config

        model = from_config(config, name)
        if isinstance(model, HeadsSpec):
            model = replace(model, target=load_model(folder / "target"))
            more["target_checkpoint"] = str(folder / "target")
        saved = Saved(str(folder / name), config_of(config, model, "fp32"))
        job = Job(Plan(micro_batch=16), model, TRAIN, steps=STEPS, warmup=0, saved=saved, trace=False, **more)
        ((losses,),) = pool.run("standing", 1, jobs=[job], folder=folder / "logs")
        return tuple(losses)

    first = train("target", TARGET)
    assert first[-1] < first[0] - 2
    return Trained(folder / "target", folder / "heads", train("heads", HEADS))


def generated(pool: Pool, trained: Trained, plan: Plan, folder: Path, **more: Any) -> RunResult:
    model, heads = trained.models
    work = replace(GENERATE, draft=heads)
    places = {"checkpoint": str(trained.target), "draft_checkpoint": str(trained.heads)}
    job = Job(plan, model, work, steps=1, warmup=0, trace=False, apart=True, **places, **more)
    result: RunResult = pool.run("results", 1, jobs=[job], folder=folder)[0][0]
    return result


def test_what_trained_heads_propose_is_kept(pool: Pool, trained: Trained, tmp_path: Path) -> None:
    assert trained.losses[-1] < trained.losses[0] - 0.2, "beyond what the target's own projection says"
    plain = generated(pool, trained, Plan(micro_batch=8), tmp_path)
    row = generated(pool, trained, ROW, tmp_path, ranks=True)
    assert row.tokens == plain.tokens
    assert row.rounds is not None and len(row.rounds.ranks) == 8
    by_rank = table(row.rounds.ranks, 3)
    for head in by_rank:
        assert head[0] > 0.2, "one of 256 tokens by chance"
        assert head[0] > head[1] > 0.02
    assert row.rounds.mean > 1.3

    # The tree that these ranks ask for, predicted from them and then run.
    _, heads = trained.models
    told = Acceptance("heads", row.rounds.rates, "measured", row.rounds.taken, row.rounds.ranks)
    work = replace(GENERATE, draft=heads, acceptance=(told,))
    texts = [choice for choice in variants("heads", work, {}) if Tree.parse(str(choice["tree"])).size == 8]
    tree = max((ROW.altered(**choice) for choice in texts), key=lambda plan: expected(rates(plan, work)))
    ran = generated(pool, trained, tree, tmp_path)
    assert ran.tokens == plain.tokens and ran.rounds is not None
    assert ran.rounds.mean > row.rounds.mean
    assert expected(rates(tree, work)) == pytest.approx(ran.rounds.mean, rel=0.1)
    for text, real in zip(row.rounds.ranks, ran.rounds.taken, strict=True):
        said = replayed(text, 3, Tree.parse(tree.tree))
        assert said == real[: len(said)], "round by round, as on any text that is the same"


def test_a_checked_run_of_typical_acceptance_reports_its_drift(pool: Pool, trained: Trained, tmp_path: Path) -> None:
    plan = ROW.altered(micro_batch=4, speculate=2, tree="0,0,1,2", commit=TYPICAL)
    ran = generated(pool, trained, plan, tmp_path, check=True)
    assert ran.equal and ran.max_difference is not None
    assert ran.drift["answers"] == 8 and 0 < ran.drift["differing"] <= 8 and 0 < ran.drift["equal"] < 1
    assert -4 < ran.drift["log_p"] < 0 and -4 < ran.drift["plain_log_p"] < 0
    assert generated(pool, trained, ROW, tmp_path, check=True).drift == {}


def test_training_heads_goes_on_from_a_checkpoint(pool: Pool, trained: Trained, tmp_path: Path) -> None:
    """What is continued begins where the saved heads were, not as the target's projection; checked by the oracle."""
    _, heads = trained.models
    model = replace(heads, target=load_model(trained.target))
    places = {"checkpoint": str(trained.heads), "target_checkpoint": str(trained.target)}
    job = Job(Plan(micro_batch=8), model, TRAIN, steps=1, warmup=0, check=True, trace=False, **places)
    (ran,) = pool.run("results", 1, jobs=[job], folder=tmp_path)[0]
    assert ran.equal and ran.losses[0] < trained.losses[0] - 0.2
