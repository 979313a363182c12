"""The suites: stated lists of plans of one model and workload each, which are predicted and then measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random

from autotune.planners.feasible import why_not
from autotune.planners.space import canonical
from autotune.spec.families import load_model
from autotune.spec.model import ModelSpec
from autotune.spec.plan import FUSED, INT8, LIBRARY, Plan
from autotune.spec.workload import Workload

Mesh = dict[str, int]  # degrees by axis


@dataclass(frozen=True)
class Suite:
    """Plans of one model and workload."""

    model: ModelSpec
    workload: Workload
    plans: tuple[Plan, ...]
    device: str
    steps: int = 5
    warmup: int = 2
    check: bool = False  # whether each run is compared with the one-process reference too


def _small() -> ModelSpec:
    return ModelSpec("llama-7m", "LlamaForCausalLM", 256, 6, 8, 4, 32, 768, 256, tied=True)


def _other() -> ModelSpec:
    return ModelSpec("qwen-4m", "Qwen3ForCausalLM", 192, 8, 6, 2, 32, 640, 512, qk_norm=True)


def _models() -> Path:
    return Path(__file__).resolve().parents[2] / "recipes" / "models"


def _llama_8b() -> ModelSpec:
    return load_model(_models() / "meta-llama--Llama-3.1-8B.json")


def _llama_1b() -> ModelSpec:
    return load_model(_models() / "meta-llama--Llama-3.2-1B.json")


def _untied_1b() -> ModelSpec:
    """Llama-3.2-1B's shape with a head of its own."""
    return replace(_llama_1b(), name="llama-1b-untied", tied=False)


def _deep() -> ModelSpec:
    """Sixteen layers that outweigh a vocabulary of 256, for pipelines of CPU workers."""
    return ModelSpec("llama-51m", "LlamaForCausalLM", 512, 16, 8, 8, 64, 1408, 256)


def _schedules() -> Suite:
    """Pipeline schedules on two GPUs, then where layers, vocabulary and activations of some of them may lie.

    The head is worth four of the sixteen layers: cuts as even as can be leave the rank that has it with more to do
    (but for schedules that go both ways), others and sharded vocabularies mend that.
    """
    orders = (
        ("1f1b", 1),
        ("gpipe", 1),
        ("interleaved-1f1b", 2),
        ("zb-h1", 1),
        ("zb-h2", 1),
        ("zb-v", 2),
        ("v-half", 2),
        ("v-min", 2),
        ("dualpipe-v", 2),
        ("dualpipe", 1),
        ("chimera", 1),
        ("hanayo", 2),
        ("2bp-1f1b", 1),
        ("breadth-first", 2),
        ("bitpipe", 2),
        ("zeropp", 2),
    )
    base = Plan(pipeline=2, micro_batch=1, attention="cudnn")
    plans = (
        *(replace(base, schedule=schedule, chunks=chunks) for schedule, chunks in orders),
        replace(base, layers="10,6"),
        replace(base, layers="10,6", schedule="zb-h1"),
        replace(base, layers="4,5,5,2", schedule="zb-v", chunks=2),
        *(replace(base, vocabulary=where) for where in ("vocab-1", "vocab-2", "naive")),
        replace(base, schedule="interleaved-1f1b", chunks=2, offload=100),
        *(replace(base, schedule="gpipe", offload=percent) for percent in (50, 100)),
    )
    workload = Workload(sequence_length=4096, global_batch=16, precision="bf16")
    return Suite(_untied_1b(), workload, plans, "cuda", steps=3, warmup=1)


def _drawn(model: ModelSpec, workload: Workload, count: int, seed: int) -> tuple[Plan, ...]:
    """So many different plans that can run, for one worker and for two, drawn from what these axes may be."""
    axes: dict[str, tuple[str | int | bool, ...]] = {
        "micro_batch": (1, 2, 4, 8, 16, 32),
        "recompute": ("none", "selective", "full"),
        "zero": (0, 1, 2, 3),
        "sequence_parallel": (False, True),
        "vocabulary": ("ends", "vocab-1", "vocab-2"),
    }
    chunks_of = {"1f1b": 1, "gpipe": 1, "interleaved-1f1b": 2, "zb-h1": 1, "zb-v": 2, "v-half": 2, "2bp-1f1b": 1}
    meshes: tuple[Mesh, ...] = ({}, {"data": 2}, {"tensor": 2}, {"pipeline": 2})
    random, found = Random(seed), dict[Plan, None]()
    while len(found) < count:
        schedule, chunks = random.choice([*chunks_of.items()])
        inner = {name: random.choice(values) for name, values in axes.items()}
        plan = Plan().altered(**random.choice(meshes), **inner, schedule=schedule, chunks=chunks)
        if not why_not(model, workload, plan) and canonical(plan):
            found[plan] = None
    return tuple(found)


def _every(
    model: ModelSpec, workload: Workload, meshes: Sequence[Mesh], **axes: Sequence[str | int]
) -> tuple[Plan, ...]:
    """All plans of a small space that can run: what a search chooses among, so that its choice can be judged."""
    inner = [dict(zip(axes, chosen, strict=True)) for chosen in product(*axes.values())]
    plans = (Plan().altered(**mesh, **choice) for mesh in meshes for choice in inner)
    return tuple(plan for plan in plans if not why_not(model, workload, plan) and canonical(plan))


def _whole() -> dict[str, Suite]:
    """Two spaces of 24 plans each, every one of which is measured."""
    long = Workload(sequence_length=4096, global_batch=8, precision="bf16")
    short = Workload(sequence_length=128, global_batch=32, precision="fp32")
    kinds = ("none", "selective", "full")
    gpu = _every(_llama_1b(), long, [{}], micro_batch=(1, 2, 4, 8), recompute=kinds, attention=("cudnn", "flash"))
    meshes: tuple[Mesh, ...] = ({}, {"data": 2}, {"pipeline": 2}, {"tensor": 2})
    cpu = _every(_other(), short, meshes, micro_batch=(4, 8, 16), recompute=("none", "full"))
    return {
        "h200-whole": Suite(_llama_1b(), long, gpu, "cuda", steps=3, warmup=1),
        "cpu-whole": Suite(_other(), short, cpu, "cpu", steps=3, warmup=1),
    }


def _schedules_on_cpu() -> Suite:
    """Pipeline schedules on four CPU workers: in how many micro-batches the eight sequences go keeps them apart."""
    orders = (
        ("gpipe", 1, 4),
        ("1f1b", 1, 2),
        ("v-min", 2, 2),
        ("chimera", 1, 2),
        ("zb-h1", 1, 2),
        ("2bp-1f1b", 1, 1),
        ("hanayo", 2, 1),
        ("interleaved-1f1b", 2, 1),
        ("v-half", 2, 1),
        ("zb-h2", 1, 1),
        ("dualpipe-v", 2, 1),
        ("bitpipe", 2, 1),
        ("zb-v", 2, 1),
    )
    plans = tuple(Plan(pipeline=4, schedule=s, chunks=c, micro_batch=m) for s, c, m in orders)
    return Suite(_deep(), Workload(sequence_length=256, global_batch=8, precision="fp32"), plans, "cpu", 3, warmup=1)


def _contexts() -> dict[str, Suite]:
    """Llama-3.1-8B decoding 32 tokens after prompts of 1k to 32k, as many sequences at a time as have room."""
    found = {}
    for context, batches in ((1024, (1, 8, 32, 128)), (8192, (1, 8, 32)), (32768, (1, 8))):
        for batch in batches:
            work = Workload(kind="generate", prompt_length=context, new_tokens=32, batch=batch, precision="bf16")
            whole = Plan(micro_batch=batch, prompt_chunk=8192 if context > 8192 else 0)
            plans = (whole, replace(whole, kernels=FUSED)) if batch <= 8 else (whole,)
            found[f"h200-8b-{context // 1024}k-{batch}"] = Suite(_llama_8b(), work, plans, "cuda", 1, 1)
    return found


def suites() -> dict[str, Suite]:
    """The suites by name: small models on two CPU workers, the Llama-3.2-1B shape on one and two GPUs."""
    cpu = Workload(sequence_length=256, global_batch=16, precision="fp32")
    gpu = Workload(sequence_length=4096, global_batch=16, precision="bf16")
    one = tuple(
        Plan(micro_batch=m, recompute=r, attention=a)
        for m, r, a in (
            (1, "none", "cudnn"),
            (2, "none", "cudnn"),
            (4, "none", "cudnn"),
            (8, "none", "cudnn"),
            (4, "selective", "cudnn"),
            (8, "selective", "cudnn"),
            (16, "selective", "cudnn"),
            (4, "full", "cudnn"),
            (16, "full", "cudnn"),
            (4, "none", "flash"),
            (2, "full", "flash"),
            (4, "none", "efficient"),
        )
    )
    two = (
        Plan(data=2, micro_batch=4, attention="cudnn"),
        Plan(data=2, micro_batch=4, attention="cudnn", zero=1),
        Plan(data=2, micro_batch=2, attention="cudnn", recompute="selective", zero=1),
        Plan(tensor=2, micro_batch=4, attention="cudnn"),
        Plan(tensor=2, micro_batch=4, attention="cudnn", sequence_parallel=True),
        Plan(tensor=2, micro_batch=8, attention="cudnn", sequence_parallel=True, recompute="selective"),
        Plan(pipeline=2, micro_batch=2, attention="cudnn"),
        Plan(pipeline=2, micro_batch=1, attention="cudnn"),
        Plan(pipeline=2, micro_batch=2, attention="cudnn", schedule="gpipe"),
        Plan(pipeline=2, micro_batch=2, attention="cudnn", schedule="interleaved-1f1b", chunks=2),
        Plan(pipeline=2, micro_batch=1, attention="cudnn", schedule="interleaved-1f1b", chunks=4),
        Plan(pipeline=2, micro_batch=2, attention="cudnn", recompute="full"),
    )
    here = (
        Plan(micro_batch=2),
        Plan(micro_batch=4),
        Plan(micro_batch=8),
        Plan(micro_batch=16),
        Plan(micro_batch=4, recompute="selective"),
        Plan(micro_batch=8, recompute="full"),
        Plan(data=2, micro_batch=2),
        Plan(data=2, micro_batch=8, zero=1),
        Plan(data=2, micro_batch=4, recompute="full"),
        Plan(tensor=2, micro_batch=4),
        Plan(tensor=2, micro_batch=8, sequence_parallel=True),
        Plan(pipeline=2, micro_batch=2),
        Plan(pipeline=2, micro_batch=4, schedule="gpipe"),
        Plan(pipeline=2, micro_batch=2, schedule="interleaved-1f1b", chunks=2),
    )
    held_out = (
        Plan(micro_batch=4),
        Plan(micro_batch=16, recompute="selective"),
        Plan(micro_batch=8, recompute="full"),
        Plan(data=2, micro_batch=4, zero=1),
        Plan(data=2, micro_batch=16),
        Plan(tensor=2, micro_batch=8, recompute="selective"),
        Plan(tensor=2, micro_batch=16, sequence_parallel=True),
        Plan(pipeline=2, micro_batch=4),
        Plan(pipeline=2, micro_batch=4, schedule="interleaved-1f1b", chunks=4),
        Plan(pipeline=2, micro_batch=8, schedule="gpipe", recompute="full"),
    )
    other = Workload(sequence_length=128, global_batch=32, precision="fp32")
    alike = (Plan(micro_batch=4, attention="cudnn"), Plan(micro_batch=8, attention="cudnn", recompute="selective"))
    shorter = Workload(sequence_length=2048, global_batch=32, precision="bf16")
    longer = Workload(sequence_length=8192, global_batch=8, precision="bf16")
    apart = (Plan(micro_batch=2, attention="cudnn"), Plan(micro_batch=4, attention="flash", recompute="full"))
    # Eight sequences one after another, and together: the suite measures one round of each.
    answers = Workload(kind="generate", prompt_length=512, new_tokens=64, batch=8, precision="bf16")
    rounds = (Plan(micro_batch=1), Plan(micro_batch=8))
    ours = (Plan(micro_batch=1, kernels=FUSED), Plan(micro_batch=4, kernels=FUSED))
    shares = tuple(Plan(tensor=2, micro_batch=m, kernels=k) for m, k in ((1, FUSED), (1, LIBRARY), (8, LIBRARY)))
    narrow = tuple(replace(plan, weights=INT8) for plan in (rounds[0], *ours))  # half the bytes a token
    # One device holds every stage: what splitting the backward and moving activations to the host cost and give.
    alone = tuple(
        Plan(micro_batch=1, attention="cudnn", schedule=s, chunks=c, offload=o)
        for s, c, o in (
            ("1f1b", 1, 0),
            ("zb-h1", 1, 0),
            ("gpipe", 1, 0),
            ("gpipe", 1, 50),
            ("gpipe", 1, 100),
            ("breadth-first", 4, 0),
            ("breadth-first", 4, 100),
        )
    )
    eight = Workload(sequence_length=4096, global_batch=8, precision="bf16")
    # Several ranks share a device, whose messages go through the host: correct, and as large as predicted; no speed.
    wide = ModelSpec("llama-128k", "LlamaForCausalLM", 1024, 8, 16, 8, 64, 2816, 131072)
    shared = tuple(
        Plan(pipeline=p, schedule=s, chunks=c, vocabulary=v, offload=o, attention="cudnn")
        for p, s, c, v, o in (
            (2, "1f1b", 1, "ends", 0),
            (2, "zb-h1", 1, "ends", 0),
            (2, "v-half", 2, "ends", 0),
            (2, "dualpipe-v", 2, "ends", 100),
            (2, "chimera", 1, "ends", 0),
            (2, "1f1b", 1, "vocab-2", 0),
            (4, "zb-v", 2, "ends", 0),
            (4, "1f1b", 1, "vocab-1", 0),
            (2, "v-half", 2, "vocab-2", 0),
            (2, "dualpipe", 1, "vocab-2", 0),
            (2, "1f1b", 1, "interlaced", 0),
        )
    )
    shared += tuple(
        Plan(tensor=2, pipeline=2, vocabulary="vocab-2", sequence_parallel=s, attention="cudnn") for s in (False, True)
    )
    short = Workload(sequence_length=1024, global_batch=8, precision="bf16")
    # Two ranks share each sequence: heads for tokens (Ulysses), or keys and values passed around (ring).
    together = tuple(Plan(context=2, context_ring=r, micro_batch=m, attention="cudnn") for r in (1, 2) for m in (1, 2))
    return {
        "h200-alone": Suite(_llama_1b(), eight, alone, "cuda"),
        "h200-shared": Suite(wide, short, shared, "cuda", steps=2, check=True),
        "cpu": Suite(_small(), cpu, here, "cpu"),
        "cpu-drawn": Suite(_other(), other, _drawn(_other(), other, 30, 0), "cpu", steps=3, warmup=1),
        "cpu-held-out": Suite(_other(), other, held_out, "cpu"),
        "h200": Suite(_llama_1b(), gpu, one, "cuda"),
        "h200-qwen3": Suite(load_model(_models() / "Qwen--Qwen3-0.6B.json"), shorter, alike, "cuda"),
        "h200-qwen2.5": Suite(load_model(_models() / "Qwen--Qwen2.5-0.5B.json"), longer, apart, "cuda"),
        "h200-generate-1b": Suite(_llama_1b(), answers, (*rounds, *ours), "cuda", steps=1),
        "h200-generate-8b": Suite(_llama_8b(), answers, (*rounds, *ours, *narrow), "cuda", 1),
        "cpu-generate": Suite(
            _small(), replace(answers, prompt_length=64, new_tokens=16, precision="fp32"), rounds, "cpu"
        ),
        "h200x2": Suite(_llama_1b(), gpu, two, "cuda"),
        "h200x2-context": Suite(_llama_1b(), gpu, together, "cuda"),
        "h200x2-context-check": Suite(wide, short, together, "cuda", steps=2, check=True),
        "h200x2-generate-8b": Suite(_llama_8b(), answers, shares, "cuda", 1),
        **_contexts(),
        **_whole(),
        "h200x2-schedules": _schedules(),
        "cpu-schedules": _schedules_on_cpu(),
    }
