"""Training plans handed over to Megatron-LM, torchtitan and DeepSpeed: words that they know, nothing that is silently
dropped. The engines' own parsers and classes are asked by `tests/beside_engines.py`."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from autotune.export import deepspeed, megatron, torchtitan
from autotune.export.engines import TRAINERS
from autotune.export.served import Export
from autotune.export.trained import TrainJob
from autotune.planners.feasible import why_not
from autotune.spec.families import load_model
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.recipes import ROOT, Autotune

MODELS = ROOT / "recipes" / "models"
WORK = Workload(sequence_length=4096, global_batch=64, clip=1.0, warmup_steps=10, decay_steps=100)
PLANS = {
    "one": Plan(micro_batch=4),
    "data": Plan(data=8, micro_batch=2, zero=1, recompute="selective", attention="cudnn"),
    "late": Plan(data=2, zero=1, sync="late"),
    "sharded": Plan(data=8, zero=3, gathered=1, attention="flash", recompute="full"),
    "gradients": Plan(data=4, zero=2),
    "shared": Plan(tensor=4, sequence_parallel=True, pipeline=2, data=2, micro_batch=2),
    "chunks": Plan(pipeline=4, chunks=2, schedule="interleaved-1f1b"),
    "uneven": Plan(pipeline=4, layers="9,8,8,7"),
    "bubbles": Plan(pipeline=2, chunks=2, schedule="zb-v"),
    "ring": Plan(context=2, context_ring=2, data=2),
    "heads": Plan(context=2),
    "both": Plan(context=4, context_ring=2),
    "states": Plan(data=2, zero=1, optimizer_offload=100, optimizer_stride=4),
    "moved": Plan(pipeline=2, offload=50),
    "vocabulary": Plan(pipeline=2, vocabulary="vocab-1"),
}
NAMES = {path.stem: path for path in sorted(MODELS.glob("*.json"))}
LLAMA = load_model(NAMES["meta-llama--Llama-3.1-8B"])
JOBS = {name: TrainJob(plan, WORK, LLAMA, steps=100) for name, plan in PLANS.items()}
JOBS |= {
    f"plain {name}": TrainJob(
        Plan(data=2), replace(WORK, clip=0.0, warmup_steps=0, decay_steps=0), load_model(path), steps=9
    )
    for name, path in NAMES.items()
}
QWEN = load_model(NAMES["Qwen--Qwen3-30B-A3B"])
JOBS |= {
    "experts": TrainJob(Plan(8, expert=8, zero=1), WORK, QWEN, steps=9),
    "experts and width": TrainJob(Plan(4, 2, expert=2, zero=1), WORK, QWEN, steps=9),
    "experts of replicas": TrainJob(Plan(2, expert=2), WORK, QWEN, steps=9),
}
GOLDEN = json.loads((ROOT / "tests" / "golden" / "megatron_options.json").read_text())
SAID = {"megatron": megatron.SAID, "torchtitan": torchtitan.SAID, "deepspeed": deepspeed.SAID}


@pytest.mark.parametrize("name", sorted(PLANS))
def test_the_plans_can_run(name: str) -> None:
    assert why_not(LLAMA, WORK, PLANS[name]) is None


@pytest.mark.parametrize("engine", sorted(TRAINERS))
def test_masks_are_not_silently_dropped(engine: str) -> None:
    model, work = replace(LLAMA, drafts=4, masks=1), replace(WORK, masks=(9, 6, 4))
    (lost,) = (one for one in TRAINERS[engine](TrainJob(PLANS["one"], work, model)).lost if one.axis == "masks")
    assert lost.found == "19 rows beside each sequence" and "text alone" in lost.instead


@pytest.mark.parametrize("engine", sorted(TRAINERS))
@pytest.mark.parametrize("name", sorted(PLANS))
def test_no_axis_is_silently_dropped(name: str, engine: str) -> None:
    """An axis that differs from a plan's defaults is said, or among those that an engine's words have a place for."""
    plan, export = PLANS[name], TRAINERS[engine](JOBS[name])
    lost = {one.axis for one in export.lost}
    for axis in (f.name for f in fields(Plan)):
        if getattr(plan, axis) != getattr(Plan(), axis):
            assert axis in lost or axis in SAID[engine], axis


@pytest.mark.parametrize("name", sorted(JOBS))
def test_megatron_knows_every_option(name: str) -> None:
    words = TRAINERS["megatron"](JOBS[name]).arguments
    begin = words.index("pretrain_gpt.py")
    options = [word for word in words[begin:] if word.startswith("--")]
    assert set(options) <= set(GOLDEN["options"])
    assert len(options) == len(set(options)), "each once"


def option(export: Export, name: str) -> str:
    return export.arguments[export.arguments.index(name) + 1]


def test_megatron_of_a_pipeline() -> None:
    uneven, chunks = (TRAINERS["megatron"](JOBS[name]) for name in ("uneven", "chunks"))
    assert option(uneven, "--pipeline-model-parallel-layout") == "Et*9|t*8|t*8|t*7L"
    assert option(chunks, "--num-virtual-stages-per-pipeline-rank") == "2"
    assert not uneven.lost and not chunks.lost
    bubbles = TRAINERS["megatron"](JOBS["bubbles"])
    assert [lost.axis for lost in bubbles.lost] == ["schedule"]


def test_megatron_of_shards() -> None:
    one, three, late = (TRAINERS["megatron"](JOBS[name]) for name in ("data", "sharded", "late"))
    assert {"--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"} <= set(one.arguments)
    assert option(three, "--data-parallel-sharding-strategy") == "optim_grads_params"
    assert "--overlap-grad-reduce" not in late.arguments
    both = TRAINERS["megatron"](JOBS["both"])
    assert option(both, "--cp-comm-type") == "a2a+p2p"


def test_megatron_of_experts() -> None:
    deepseek = TRAINERS["megatron"](JOBS["plain deepseek-ai--DeepSeek-V3"])
    assert option(deepseek, "--moe-layer-freq") == str([0] * 3 + [1] * 58).replace(" ", "")
    assert option(deepseek, "--q-lora-rank") == "1536"
    assert "--moe-router-enable-expert-bias" in deepseek.arguments
    mixtral = TRAINERS["megatron"](JOBS["plain mistralai--Mixtral-8x7B-v0.1"])
    assert option(mixtral, "--num-experts") == "8" and "--moe-layer-freq" not in mixtral.arguments


def test_divided_experts() -> None:
    """Megatron-LM has a degree for them and for their width; torchtitan one for both; DeepSpeed says they are lost."""
    own = [TRAINERS["megatron"](JOBS[name]) for name in ("experts", "experts and width")]
    assert [option(export, "--expert-model-parallel-size") for export in own] == ["8", "2"]
    assert [option(export, "--expert-tensor-parallel-size") for export in own] == ["1", "2"]
    assert not any(lost.axis == "expert" for export in own for lost in export.lost)
    whole, width, replicas = (
        TRAINERS["torchtitan"](JOBS[name]) for name in ("experts", "experts and width", "experts of replicas")
    )
    assert "expert_parallel_degree = 8" in whole.text and "expert_parallel_degree = 4" in width.text
    assert [any(lost.axis == "expert" for lost in e.lost) for e in (whole, width, replicas)] == [False, True, True]
    assert "expert" in {lost.axis for lost in TRAINERS["deepspeed"](JOBS["experts"]).lost}


@pytest.mark.parametrize("name", sorted(PLANS))
def test_deepspeed_agrees_on_the_batch(name: str) -> None:
    config, plan = json.loads(TRAINERS["deepspeed"](JOBS[name]).text), PLANS[name]
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * plan.data
    assert product == config["train_batch_size"] == WORK.global_batch
    assert config["zero_optimization"]["stage"] == plan.zero


def test_deepspeed_of_states_on_the_host() -> None:
    export = TRAINERS["deepspeed"](JOBS["states"])
    assert json.loads(export.text)["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert [lost.axis for lost in export.lost] == ["optimizer_stride"]


@pytest.mark.parametrize("name", sorted(JOBS))
def test_torchtitan_gets_a_module(name: str) -> None:
    """It is run with stand-ins for what it imports: what it sets is what the plan says."""
    job = JOBS[name]
    text = TRAINERS["torchtitan"](job).text
    module = ast.parse(text)
    module.body = [node for node in module.body if not isinstance(node, ast.ImportFrom)]
    made = Anything()
    names: dict[str, Any] = {"made": made, "model_registry": str}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names |= {one.name: names.get(one.name, Anything()) for one in node.names}
    names[torchtitan.BASES.get(job.model.name, torchtitan.NEAREST).config] = lambda: made
    exec(compile(module, "plan.py", "exec"), names)
    assert names["plan"]() is made
    parallel, plan = made.parallelism, job.plan
    world = (
        parallel.data_parallel_replicate_degree * parallel.data_parallel_shard_degree * parallel.context_parallel_degree
    )
    assert world * parallel.tensor_parallel_degree * parallel.pipeline_parallel_degree == plan.world
    assert made.training.num_tokens_per_train_step == job.workload.tokens
    if plan.pipeline > 1:
        stages = parallel.module_fqns_per_model_part
        assert len(stages) == plan.stages
        assert [m for stage in stages for m in stage] == [
            "tok_embeddings",
            *(f"layers.{n}" for n in range(LLAMA.layers)),
            "norm",
            "lm_head",
        ]


class Anything:
    """Takes any attribute and any call."""

    def __getattr__(self, name: str) -> Any:
        self.__dict__[name] = found = Anything()
        return found

    def __call__(self, *given: Any, **named: Any) -> Any:
        return Anything()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_shipped_model_has_a_word(name: str) -> None:
    export = TRAINERS["torchtitan"](JOBS[f"plain {name}"])
    assert (name in torchtitan.BASES) != any(lost.axis == "model" for lost in export.lost)


def test_the_command(autotune: Autotune, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "llama-70b-64xh100.toml"
    pins = [word for pin in ("data=4", "tensor=4", "pipeline=4", "zero=1") for word in ("--pin", pin)]
    made = autotune("export", str(recipe), *pins, "--to", "megatron", "--json")
    found = json.loads(made.stdout)
    assert made.code == 0 and found["engine"] == "megatron"
    assert found["arguments"][:5] == ["torchrun", "--nnodes", "8", "--nproc-per-node", "8"]
    text = autotune("export", str(recipe), *pins, "--to", "deepspeed")
    assert json.loads(text.stdout)["tensor_parallel"] == {"autotp_size": 4}
    assert "the text is deepspeed.json" in text.stderr


def test_engines_of_the_other_kind(autotune: Autotune) -> None:
    recipe = ROOT / "recipes" / "llama-70b-64xh100.toml"
    made = autotune("export", str(recipe), "--pin", "data=64", "--to", "vllm")
    assert made.code == 2
    assert "this plan trains" in made.stderr and "megatron" in made.stderr
