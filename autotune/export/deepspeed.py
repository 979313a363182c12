"""DeepSpeed: the JSON that `--deepspeed_config` names, with the keys of its config classes at edaa72212
(`deepspeed/runtime/config.py`, `runtime/zero/config.py`, `runtime/zero/offload_config.py`,
`runtime/tensor_parallel/config.py`, `runtime/lr_schedules.py`).

- `offload_optimizer.ratio` is the share of states that live on the host, of stage 3 alone; stages 1 and 2 move all.
- Pipelines are made in the program (`PipelineModule(num_stages=…)`), which trains by 1F1B; the config has no key of
  them but the micro-batches. So is the recomputing of activations: the model asks for it.
- Ulysses is a key, `sequence_parallel_size`; there is no ring.
"""

from __future__ import annotations

import json
from typing import Any

from autotune.export.served import Export, Lost, others
from autotune.export.trained import BETAS, EPSILON, TrainJob, only, text_alone
from autotune.spec.plan import Plan
from autotune.spec.workload import LEAST_RATE, Workload

NAME = "DeepSpeed"
SAID = (
    *("data", "tensor", "pipeline", "context", "context_ring", "micro_batch", "schedule", "recompute", "zero"),
    *("attention", "optimizer_offload", "optimizer_stride", "sync", "gather_each", "gathered"),
)


def deepspeed(job: TrainJob) -> Export:
    """The config that trains a plan with DeepSpeed."""
    plan, workload, notes = job.plan, job.workload, list[str]()
    lost = others(NAME, plan, SAID) + text_alone(NAME, job)
    if plan.pipeline > 1 and plan.schedule != "1f1b":
        lost.append(Lost("schedule", plan.schedule, f"{NAME}'s PipelineModule trains by 1F1B"))
    if plan.context_ring > 1:
        lost.append(Lost("context_ring", str(plan.context_ring), f"{NAME} exchanges heads for tokens (Ulysses)"))
    lost += only("attention", plan, "the model chooses its own backend")
    if workload.precision == "fp64":
        lost.append(Lost("precision", "fp64", f"{NAME} computes in fp32 at most, which is used"))
    if plan.pipeline > 1:
        notes.append(f"the program makes the pipeline: PipelineModule(layers=…, num_stages={plan.pipeline})")
    if plan.recompute != "none":
        notes.append(f"the model asks for {plan.recompute} recompute: deepspeed.checkpointing, or its own switch")
    config: dict[str, Any] = {
        "train_batch_size": workload.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": job.micro_batches,
        "bf16": {"enabled": workload.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": workload.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": workload.learning_rate,
                "betas": list(BETAS),
                "eps": EPSILON,
                "weight_decay": workload.weight_decay,
            },
        },
        "zero_optimization": _zero(plan, lost),
    }
    if rates := _rates(workload):
        config["scheduler"] = rates
    if plan.tensor > 1:
        config["tensor_parallel"] = {"autotp_size": plan.tensor}
    if plan.context > 1:
        config["sequence_parallel_size"] = plan.context
    arguments = (*job.torchrun(), "train.py", "--deepspeed", "--deepspeed_config", "deepspeed.json")
    notes.append("train.py is yours: it makes the model and calls deepspeed.initialize")
    text = json.dumps(config, indent=2) + "\n"
    return Export(arguments, tuple(lost), notes=tuple(notes), file="deepspeed.json", text=text)


def _zero(plan: Plan, lost: list[Lost]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": plan.zero}
    if plan.replicas > 1:
        zero["overlap_comm"] = plan.sync == "eager"
    lost += only("gathered", plan, f"{NAME} goes by stage3_max_live_parameters")
    lost += only("gather_each", plan, f"{NAME} decides when weights are gathered")
    if plan.optimizer_offload:
        share = plan.optimizer_offload / 100
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True} | ({"ratio": share} if plan.zero == 3 else {})
        if not plan.zero:
            zero["stage"] = 1
            lost.append(Lost("zero", "0", f"{NAME} moves states to the host from stage 1 on, which is used"))
        if share < 1 and plan.zero != 3:
            lost.append(Lost("optimizer_offload", f"{share:.0%}", f"{NAME} moves all states below stage 3"))
        lost += only("optimizer_stride", plan, f"{NAME} updates what is on the host there")
    return zero


def _rates(workload: Workload) -> dict[str, Any]:
    if workload.decay_steps:
        params = {
            "total_num_steps": workload.decay_steps,
            "warmup_num_steps": max(1, workload.warmup_steps),
            "warmup_min_ratio": 0.0,
            "cos_min_ratio": LEAST_RATE,
        }
        return {"type": "WarmupCosineLR", "params": params}
    if workload.warmup_steps:
        params = {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": workload.learning_rate,
            "warmup_num_steps": workload.warmup_steps,
        }
        return {"type": "WarmupLR", "params": params | {"warmup_type": "linear"}}
    return {}
