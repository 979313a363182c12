"""Megatron-LM: `pretrain_gpt.py`, with the options of its parser at d98e8a64dd (`megatron/training/arguments.py`, and
the config classes that it builds options from, `core/model_parallel_config.py` and `core/transformer/`).

- Data parallel ranks are what the world has beside tensor x pipeline x context ranks; nothing says how many.
- A layout of the pipeline lists stage after stage, chunk by chunk over the ranks, as a plan's `layers` does; E is the
  embedding, t a layer, L the loss (PipelineParallelLayerLayout).
- `--use-distributed-optimizer` is ZeRO-1. ZeRO-2 and 3 are Megatron-FSDP's `optim_grads` and `optim_grads_params`,
  which want checkpoints of their own format.
- Of selective recompute the modules "layernorm" and "moe_act" repeat what a plan's selective policy repeats of norms
  and of experts' gated activations; a dense layer's is kept, and attention is recomputed inside its kernel.
- `--optimizer-cpu-offload` wants `--use-precision-aware-optimizer` (validate_args).
"""

from __future__ import annotations

from itertools import chain

from autotune.export.served import Export, Lost, others
from autotune.export.trained import BETAS, EPSILON, TrainJob, only, text_alone
from autotune.planners.lower.stage import cut_of
from autotune.spec.model import Experts, LatentAttention, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import LEAST_RATE, Workload

NAME = "Megatron-LM"
ATTENTION = {"flash": "flash", "cudnn": "fused", "math": "unfused", "sdpa": "auto"}
SCHEDULES = ("1f1b", "interleaved-1f1b")
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
SAID = (
    *("data", "tensor", "pipeline", "context", "context_ring", "micro_batch", "schedule", "chunks", "layers"),
    *(
        "recompute",
        "attention",
        "zero",
        "sequence_parallel",
        "sync",
        "optimizer_offload",
        "gather_each",
        "gathered",
        "expert",
    ),
)
NOTES = (
    "data and tokenizer are yours to name: --mock-data and the NullTokenizer stand in their place",
    "Hugging Face weights are loaded by Megatron's own converter (tools/checkpoint, or Megatron Bridge)",
)


def megatron(job: TrainJob) -> Export:
    """The command that trains a plan with Megatron-LM."""
    plan, lost = job.plan, others(NAME, job.plan, SAID) + text_alone(NAME, job)
    words = chain(
        job.torchrun(),
        ("pretrain_gpt.py",),
        _model(job.model, job.workload, lost),
        _parallel(plan, job.model, lost),
        _memory(plan, job.model, lost),
        _training(job, lost),
    )
    return Export(tuple(words), tuple(lost), notes=NOTES)


def _model(model: ModelSpec, workload: Workload, lost: list[Lost]) -> list[str]:
    words = [
        *("--num-layers", str(model.layers)),
        *("--hidden-size", str(model.hidden)),
        *("--ffn-hidden-size", str(model.ffn)),
        *("--num-attention-heads", str(model.heads)),
        *("--kv-channels", str(model.head_dim)),
        *("--seq-length", str(workload.sequence_length)),
        *("--max-position-embeddings", str(max(model.max_positions, workload.sequence_length))),
        *("--vocab-size", str(model.vocab)),
        *("--normalization", "RMSNorm"),
        *("--norm-epsilon", f"{model.norm_eps:g}"),
        *("--position-embedding-type", "rope"),
        *("--rotary-base", f"{model.rope_theta:.0f}"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--swiglu", "--disable-bias-linear"),
    ]
    if model.kv_heads != model.heads:
        words += ["--group-query-attention", "--num-query-groups", str(model.kv_heads)]
    words += [] if model.tied else ["--untie-embeddings-and-output-weights"]
    words += ["--add-qkv-bias"] if model.qkv_bias else []
    words += ["--qk-layernorm"] if model.qk_norm else []
    words += ["--window-size", f"({model.window - 1},0)"] if model.window else []
    scaling = dict(model.rope_scaling)
    if scaling.get("rope_type", scaling.get("type")) == "llama3":
        words += ["--use-rope-scaling", "--rope-scaling-factor", f"{float(scaling['factor']):g}"]
    elif scaling:
        lost.append(Lost("rope_scaling", str(scaling), f"{NAME} has no option for it in this model"))
    if model.latent:
        words += _latent(model.latent)
    return words + (_experts(model, model.experts) if model.experts else [])


def _latent(latent: LatentAttention) -> list[str]:
    return [
        "--multi-latent-attention",
        *(("--q-lora-rank", str(latent.q_rank)) if latent.q_rank else ()),
        *("--kv-lora-rank", str(latent.kv_rank)),
        *("--qk-head-dim", str(latent.nope_dim)),
        *("--qk-pos-emb-head-dim", str(latent.rope_dim)),
        *("--v-head-dim", str(latent.v_dim)),
    ]


def _experts(model: ModelSpec, experts: Experts) -> list[str]:
    routed = [int(experts.routed(layer)) for layer in range(model.layers)]
    words = [
        *("--num-experts", str(experts.count)),
        *("--moe-ffn-hidden-size", str(experts.ffn)),
        *("--moe-router-topk", str(experts.top_k)),
        *("--moe-router-score-function", experts.scoring),
        *("--moe-router-load-balancing-type", "none"),  # a plan's step has no auxiliary loss
        *("--moe-token-dispatcher-type", "alltoall", "--moe-grouped-gemm"),
    ]
    words += [] if all(routed) else ["--moe-layer-freq", str(routed).replace(" ", "")]
    words += ["--moe-shared-expert-intermediate-size", str(experts.shared_ffn)] if experts.shared_ffn else []
    if experts.groups > 1:
        words += ["--moe-router-num-groups", str(experts.groups), "--moe-router-group-topk", str(experts.top_groups)]
    words += ["--moe-router-topk-scaling-factor", f"{experts.scale:g}"] if experts.scale != 1 else []
    words += ["--moe-router-enable-expert-bias"] if experts.score_bias else []
    # Without it the shares of the chosen are normalised, which is a softmax over the chosen scores.
    words += ["--moe-router-pre-softmax"] if experts.scoring == "softmax" and not experts.normalise else []
    return words


def _parallel(plan: Plan, model: ModelSpec, lost: list[Lost]) -> list[str]:
    words = [
        *("--tensor-model-parallel-size", str(plan.tensor)),
        *("--pipeline-model-parallel-size", str(plan.pipeline)),
        *("--context-parallel-size", str(plan.context)),
    ]
    if plan.expert > 1:  # of the ranks of data x context; tensor ranks divide each expert's width
        words += ["--expert-model-parallel-size", str(plan.expert), "--expert-tensor-parallel-size", str(plan.tensor)]
    if plan.context > 1:
        heads = plan.context // plan.context_ring
        words += ["--cp-comm-type", "p2p" if heads == 1 else "a2a" if plan.context_ring == 1 else "a2a+p2p"]
        if heads > 1 and plan.context_ring > 1:
            words += ["--hierarchical-context-parallel-sizes", str(heads), str(plan.context_ring)]
    words += ["--sequence-parallel"] if plan.sequence_parallel else []
    if plan.pipeline > 1 and plan.schedule not in SCHEDULES:
        lost.append(Lost("schedule", plan.schedule, f"{NAME} runs 1F1B, interleaved with several chunks a rank"))
    layers = cut_of(plan, model).layers
    if plan.pipeline > 1 and len(set(layers)) > 1:
        stages = [f"t*{count}" if count else "" for count in layers]
        stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
        words += ["--pipeline-model-parallel-layout", "|".join(stages)]
    elif plan.pipeline > 1 and plan.chunks > 1:
        words += ["--num-virtual-stages-per-pipeline-rank", str(plan.chunks)]
    return words


def _memory(plan: Plan, model: ModelSpec, lost: list[Lost]) -> list[str]:
    words = ["--attention-backend", ATTENTION.get(plan.attention, "auto")]
    if plan.attention not in ATTENTION:
        lost.append(Lost("attention", plan.attention, f"{NAME} chooses its own backend"))
    if plan.recompute == "full":
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    elif plan.recompute == "selective":
        words += ["--recompute-granularity", "selective", "--recompute-modules", "layernorm"]
        words += ["moe_act"] if model.experts else []
        lost.append(Lost("recompute", "selective", f"{NAME} keeps what a dense layer's gated activation gives"))
    if plan.zero == 1:
        words += ["--use-distributed-optimizer"]
    elif plan.zero:
        words += ["--use-megatron-fsdp", "--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor"]
        words += ["--data-parallel-sharding-strategy", SHARDING[plan.zero], "--no-gradient-accumulation-fusion"]
        lost += only("gathered", plan, f"{NAME} decides how many weights are whole at once")
        lost += only("gather_each", plan, f"{NAME} decides when weights are gathered")
    if plan.replicas > 1 and (plan.sync == "eager" or plan.zero > 1):
        words += ["--overlap-grad-reduce", *(("--overlap-param-gather",) if plan.zero else ())]
    elif plan.replicas > 1 and plan.zero == 1:
        lost += only("sync", plan, f"{NAME} sums gradients after the last backward")
    if plan.optimizer_offload:
        words += ["--optimizer-cpu-offload", "--optimizer-offload-fraction", f"{plan.optimizer_offload / 100:g}"]
        words += ["--use-precision-aware-optimizer", *(() if plan.zero else ("--use-distributed-optimizer",))]
    return words


def _training(job: TrainJob, lost: list[Lost]) -> list[str]:
    workload, plan = job.workload, job.plan
    if workload.precision == "fp64":
        lost.append(Lost("precision", "fp64", f"{NAME} computes in fp32 at most, which is used"))
    rate, least = workload.learning_rate, workload.learning_rate * LEAST_RATE
    words = [
        *("--micro-batch-size", str(plan.micro_batch)),
        *("--global-batch-size", str(workload.global_batch)),
        *("--train-iters", str(job.steps)),
        *("--lr", f"{rate:g}"),
        *("--weight-decay", f"{workload.weight_decay:g}"),
        *("--adam-beta1", f"{BETAS[0]:g}", "--adam-beta2", f"{BETAS[1]:g}", "--adam-eps", f"{EPSILON:g}"),
        *("--clip-grad", f"{workload.clip:g}"),
    ]
    if workload.decay_steps:
        words += ["--lr-decay-style", "cosine", "--min-lr", f"{least:g}", "--lr-decay-iters", str(workload.decay_steps)]
    else:
        words += ["--lr-decay-style", "constant"]
    words += ["--lr-warmup-iters", str(workload.warmup_steps)] if workload.warmup_steps else []
    words += ["--bf16"] if workload.precision == "bf16" else []
    return [*words, "--mock-data", "--tokenizer-type", "NullTokenizer"]
