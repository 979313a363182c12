"""What is handed over to an engine, and what comes of it; pure data, and what all engines have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from autotune.planners.by_batch import AtBatch, plain
from autotune.planners.decoding.strategies import STRATEGIES
from autotune.spec.model import ModelSpec
from autotune.spec.plan import EXACT, LIBRARY, MATCH, PLAIN, Plan
from autotune.spec.workload import Workload

DECODINGS = (PLAIN, "ngram", "draft")  # the strategies that serving engines have
DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float32"}  # fp64: the nearest there is

SAID: tuple[str, ...] = (  # axes of a plan that engines have flags for, or name where they lose them
    *("data", "tensor", "pipeline", "micro_batch", "attention", "kernels", "prompt_chunk", "weights", "page"),
    *("decoding", "speculate", "branches", "match", "window", "tree", "refine", "commit"),
)


@dataclass(frozen=True)
class Job:
    """A plan of a generation, with the weights that it is for. `model` and `draft` are folders or Hugging Face names;
    `table` says how many tokens to propose by how many sequences go together, or nothing."""

    plan: Plan
    workload: Workload
    model: str
    draft: str = ""
    table: tuple[AtBatch, ...] = ()


@dataclass(frozen=True)
class Lost:
    """An axis of the plan, or a key of its workload, that the engine cannot express, and what it does instead."""

    axis: str
    found: str
    instead: str

    def __str__(self) -> str:
        return f"{self.axis} {self.found}: {self.instead}"


@dataclass(frozen=True)
class Export:
    """`arguments`: the command, a word each. `table`: whether the job's table is among them. `notes`: what the engine's
    own pages warn of. `text`: of the `file` that the command names, for an engine that reads one."""

    arguments: tuple[str, ...]
    lost: tuple[Lost, ...]
    table: bool = False
    notes: tuple[str, ...] = ()
    file: str = ""
    text: str = ""


def served(plan: Plan) -> Plan:
    """What engines make of a plan: one row of proposed tokens by their own kernels, or none where they lack the
    strategy."""
    plan = plan.altered(kernels=LIBRARY, branches=1, window=0)
    return plan if plan.decoding in DECODINGS else plain(plan)


def name_of(model: ModelSpec, checkpoint: str) -> str:
    """What an engine loads: the checkpoint's folder, else the name that configs here are filed under,
    `meta-llama--Llama-3.1-8B`, as Hugging Face writes it."""
    return checkpoint or model.name.replace("--", "/", 1)


def lost_by_all(engine: str, job: Job, matches: bool = False) -> list[Lost]:
    """What none of these engines expresses. `matches`: whether it keeps what the target itself draws."""
    plan, workload, found = job.plan, job.workload, list[Lost]()
    if workload.precision == "fp64":
        found.append(Lost("precision", "fp64", f"{engine} computes in float32 at most, which is used"))
    choice = {"temperature": workload.temperature, "top_k": workload.top_k, "top_p": workload.top_p}
    usual = Workload()
    for key, value in choice.items():
        if key == "temperature" or value != getattr(usual, key):
            found.append(Lost(key, f"{value:g}", f"{engine} takes it from each request: send {key}={value:g}"))
    if plan.kernels != LIBRARY:
        found.append(Lost("kernels", plan.kernels, f"{engine} has kernels of its own, which are used"))
    if plan.weights != EXACT:
        how = f"{engine} rounds weights of checkpoints that are made for it: those of the one that is named are used"
        found.append(Lost("weights", plan.weights, how))
    if plan.page:
        found.append(Lost("page", str(plan.page), f"{engine} has pages of a size of its own, which are used"))
    if plan.decoding not in DECODINGS:
        found.append(Lost("decoding", plan.decoding, f"{engine} has no such strategy: plain decoding is used"))
        axes = [axis for axis in STRATEGIES[plan.decoding].axes if axis != "commit" or plan.commit != MATCH]
        return found + [Lost(axis, str(getattr(plan, axis)), f"of decoding {plan.decoding}") for axis in axes]
    if plan.branches > 1:
        found.append(Lost("branches", str(plan.branches), "one row of proposed tokens is used"))
    if plan.decoding != PLAIN and plan.commit == MATCH and workload.temperature and not matches:
        how = f"{engine} keeps a proposal by rejection sampling: the same distribution, other tokens, other acceptance"
        found.append(Lost("commit", plan.commit, how))
    if STRATEGIES[plan.decoding].draft and plan.tensor > 1:
        found.append(Lost("draft", "whole on each rank", f"{engine} shares it over the {plan.tensor} tensor ranks"))
    return found


def attention(engine: str, plan: Plan, names: Mapping[str, str], lost: list[Lost]) -> list[str]:
    """The flag for a plan's attention, by the engine's `names`; without one it is `lost`."""
    if plan.attention in names:
        return ["--attention-backend", names[plan.attention]]
    lost.append(Lost("attention", plan.attention, f"{engine} chooses its own backend"))
    return []


def others(engine: str, plan: Plan, said: Collection[str]) -> list[Lost]:
    """The axes that differ from a plan's defaults and that nobody has `said` anything about: none is ever dropped."""
    usual = Plan()
    return [
        Lost(f.name, str(value), f"{engine} has nothing like it")
        for f in fields(plan)
        if f.name not in said and (value := getattr(plan, f.name)) != getattr(usual, f.name)
    ]
