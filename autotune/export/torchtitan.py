"""torchtitan: a configuration, that is a Python function that gives a `Trainer.Config`, as its config/README.md asks
for (b5bcd76c6): a model's own one, and what the plan says about it.

- Degrees, schedules and micro-batches: `torchtitan/config/configs.py`. A data parallel rank takes
  `num_tokens_per_microbatch_per_dp_rank` tokens at a time, `num_pp_microbatches` of those where there is a pipeline.
- FSDP shards weights, gradients and states alike: weights that stay whole after the forward ("never") are the nearest
  there is to ZeRO-1 and 2. Data ranks that shard nothing are `data_parallel_replicate_degree`.
- Modules of a stage, where layers are not cut evenly: `module_fqns_per_model_part`
  (`torchtitan/distributed/pipeline_parallel.py`).
- Learning rates: `components/optimizer/lr_scheduler.py`; `default_adamw` has the executor's betas and epsilon.
"""

from __future__ import annotations

from typing import NamedTuple

from autotune.export.served import Export, Lost, others
from autotune.export.trained import TrainJob, only, text_alone
from autotune.planners.lower.stage import cut_of
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import LEAST_RATE, Workload

NAME = "torchtitan"
SCHEDULES = {
    "1f1b": "1F1B",
    "gpipe": "GPipe",
    "interleaved-1f1b": "Interleaved1F1B",
    "breadth-first": "LoopedBFS",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}
RECOMPUTE = {"none": "None", "selective": "SelectiveAC.Config()", "full": "FullAC.Config()"}
SAID = (
    *("data", "tensor", "pipeline", "context", "context_ring", "micro_batch", "schedule", "chunks", "layers"),
    *("recompute", "attention", "zero", "sequence_parallel", "gather_each", "gathered", "optimizer_offload"),
    "expert",
)


class Base(NamedTuple):
    """Where torchtitan has a model: the module of its family, a configuration to begin with, and the flavor."""

    family: str
    config: str
    flavor: str


BASES = {
    "meta-llama--Llama-3.2-1B": Base("llama3", "llama3_8b", "1B"),
    "meta-llama--Llama-3.1-8B": Base("llama3", "llama3_8b", "8B"),
    "meta-llama--Llama-3.1-70B": Base("llama3", "llama3_70b", "70B"),
    "Qwen--Qwen3-0.6B": Base("qwen3", "qwen3_0_6b", "0.6B"),
    "Qwen--Qwen3-8B": Base("qwen3", "qwen3_14b", "8B"),
    "Qwen--Qwen3-32B": Base("qwen3", "qwen3_32b", "32B"),
    "Qwen--Qwen3-30B-A3B": Base("qwen3", "qwen3_30b_a3b", "30B-A3B"),
    "deepseek-ai--DeepSeek-V3": Base("deepseek_v3", "deepseek_v3_671b", "671B"),
}
NEAREST = BASES["meta-llama--Llama-3.1-8B"]


def torchtitan(job: TrainJob) -> Export:
    """The module that trains a plan with torchtitan, in a function `plan`."""
    plan, workload, lost = job.plan, job.workload, others(NAME, job.plan, SAID) + text_alone(NAME, job)
    base = BASES.get(job.model.name, NEAREST)
    if job.model.name not in BASES:
        lost.append(Lost("model", job.model.name, f"{NAME} has none of that name: {base.config} stands in its place"))
    if plan.pipeline > 1 and plan.schedule not in SCHEDULES:
        lost.append(Lost("schedule", plan.schedule, f"{NAME} has no such schedule: 1F1B is used"))
    if plan.context_ring != plan.context:
        lost.append(
            Lost("context_ring", str(plan.context_ring), f"{NAME} shares sequences by torch's context_parallel")
        )
    lost += only("attention", plan, f"{NAME}'s model chooses its own backend")
    if plan.recompute == "selective":
        lost.append(Lost("recompute", "selective", f"{NAME} has its own choice of what is kept"))
    if plan.zero in (1, 2):
        lost.append(Lost("zero", str(plan.zero), f"{NAME} shards weights too, and keeps them whole after the forward"))
    lost += only("gathered", plan, f"{NAME} holds a whole stage, or a layer at a time")
    lost += only("gather_each", plan, f"{NAME} decides when weights are gathered")
    lost += only("optimizer_offload", plan, f"{NAME} moves weights, gradients and states together or not at all")
    if workload.precision == "fp64":
        lost.append(Lost("precision", "fp64", f"{NAME} computes in fp32 at most, which is used"))
    lines = (*_begin(base), *_parallel(plan, job, lost), *_training(job), "    return config")
    arguments = (*job.torchrun(), "-m", "torchtitan.train", "--module", "plan", "--config", "plan")
    notes = ("data and tokenizer are those of the configuration that it begins with",)
    return Export(arguments, tuple(lost), notes=notes, file="plan.py", text="\n".join(lines) + "\n")


def _begin(base: Base) -> tuple[str, ...]:
    family = f"torchtitan.models.{base.family}"
    return (
        "from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw",
        "from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC",
        f"from {family} import model_registry",
        f"from {family}.config_registry import {base.config}",
        "",
        "",
        "def plan():",
        f"    config = {base.config}()",
        f'    config.model_spec = model_registry("{base.flavor}")',
    )


def _parallel(plan: Plan, job: TrainJob, lost: list[Lost]) -> list[str]:
    sharded = plan.zero > 0
    found: dict[str, object] = {
        "data_parallel_replicate_degree": 1 if sharded else plan.data,
        "data_parallel_shard_degree": plan.data if sharded else 1,
        "tensor_parallel_degree": plan.tensor,
        "enable_sequence_parallel": plan.sequence_parallel,
        "context_parallel_degree": plan.context,
        "pipeline_parallel_degree": plan.pipeline,
    }
    if sharded:
        found["fsdp_reshard_after_forward"] = "always" if plan.zero == 3 else "never"
    if plan.expert > 1:
        found["expert_parallel_degree"] = _experts(plan, job.model, lost)
    if plan.pipeline > 1:
        found["pipeline_parallel_schedule"] = SCHEDULES.get(plan.schedule, "1F1B")
        found["num_pp_microbatches"] = job.micro_batches
        found["module_fqns_per_model_part"] = modules(job.model, plan)
    return [f"    config.parallelism.{key} = {value!r}" for key, value in found.items()]


def _experts(plan: Plan, model: ModelSpec, lost: list[Lost]) -> int:
    """The ranks that whole experts are divided over: of those that shard weights, tensor ranks among them."""
    degree = plan.expert * plan.tensor
    if not plan.zero:
        lost.append(Lost("expert", str(plan.expert), f"{NAME} divides experts over ranks that shard weights alone"))
        return 1
    if plan.tensor > 1:
        lost.append(Lost("expert", str(plan.expert), f"{NAME} divides whole experts over tensor ranks too"))
    return degree if model.experts and model.experts.count % degree == 0 else 1


def modules(model: ModelSpec, plan: Plan) -> list[list[str]]:
    """The modules of each stage by torchtitan's names."""
    stages, first = [], 0
    for count in cut_of(plan, model).layers:
        stages.append([f"layers.{layer}" for layer in range(first, first + count)])
        first += count
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "lm_head"]
    return stages


def _training(job: TrainJob) -> list[str]:
    plan, workload = job.plan, job.workload
    together = plan.micro_batch * workload.sequence_length
    found: dict[str, object] = {
        "num_tokens_per_microbatch_per_dp_rank": together,
        "num_tokens_per_train_step": workload.tokens,
        "max_context_length": workload.sequence_length,
        "max_norm": workload.clip,
        "steps": job.steps,
        "mixed_precision_param": "bfloat16" if workload.precision == "bf16" else "float32",
    }
    lines = [f"    config.training.{key} = {value!r}" for key, value in found.items()]
    if not workload.clip:
        lines[3] = '    config.training.max_norm = float("inf")'
    rate, decay = workload.learning_rate, workload.weight_decay
    return [
        *lines,
        f"    config.optimizer = default_adamw(lr={rate!r}, weight_decay={decay!r})",
        f"    config.lr_scheduler = LRSchedulersContainer.Config({_rates(workload)})",
        f"    config.activation_checkpoint = {RECOMPUTE[plan.recompute]}",
    ]


def _rates(workload: Workload) -> str:
    """A warm-up in a line, then half a cosine or nothing."""
    words = [f"warmup_steps={workload.warmup_steps}"]
    if not workload.decay_steps:
        return ", ".join([*words, "decay_ratio=0.0"])
    return ", ".join(
        [*words, f"total_steps={workload.decay_steps}", 'decay_type="cosine"', f"min_lr_factor={LEAST_RATE}"]
    )
