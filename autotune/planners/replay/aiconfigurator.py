"""Times between tokens that engines reached on H100s (AIConfigurator's measured set).

`data/aiconfigurator.csv` is cut from `aiconfigurator_core/systems/silicon_sample.csv` of the PyPI wheel
aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0: `data/aiconfigurator_LICENSE`); columns are left out and renamed. Of
that set's 1593 aggregated rows on H100 and H200 it has those that our plans can say: dense models whose weights are
not quantised, which are 351, all on H100 (the others are fp8, int4 or fp4, or experts; rows that name no quantisation
are taken to have run the models as published, in bf16). Nothing was fitted to any. Half of them are kept here, by a
hash of their names.

A row is a server under a steady number of requests, each of one prompt length and one answer length. Its time between
tokens is told as a decoded token of so many sequences together, and the prefills of the others that come in between: of
each other request one in as many tokens as an answer has. That holds for engines that take prompts in as they come
(vLLM's and TensorRT-LLM's scheduling of chunks among decodes); one that reads all waiting prompts first shows less.
Not told: the time to the first token, which is mostly how long a request queued.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache, partial

from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.planners.replay.calibration import DATA
from autotune.planners.replay.row import Row, Table
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.errors import InfeasibleError
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload

MODELS = {
    "Qwen/Qwen3-32B": ModelSpec(
        "Qwen3-32B", "Qwen3ForCausalLM", 5120, 64, 64, 8, 128, 25600, 151936, qk_norm=True, tied=False
    ),
    "meta-llama/Llama-3.1-8B-Instruct": ModelSpec(
        "Llama-3.1-8B", "LlamaForCausalLM", 4096, 32, 32, 8, 128, 14336, 128256, tied=False
    ),
}
MACHINES = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm"}


@dataclass(frozen=True)
class Served:
    """A row: lengths in tokens, requests under way at once, tensor ranks, milliseconds between tokens."""

    id: str
    backend: str
    version: str
    model: str
    system: str
    prompt: int
    new_tokens: int
    concurrency: int
    tensor: int
    tpot_ms: float


@cache
def served() -> tuple[Served, ...]:
    """Every row, in the order of the file."""
    kinds = {"int": int, "float": float, "str": str}
    named = {field.name: kinds[str(field.type)] for field in fields(Served)}
    with (DATA / "aiconfigurator.csv").open(newline="") as file:
        return tuple(Served(**{key: named[key](value) for key, value in row.items()}) for row in csv.DictReader(file))


@cache
def predictor(system: str, model: str, workload: Workload) -> Predictor:
    return Predictor(MODELS[model], workload, load_profile(shipped()[MACHINES[system]]))


@cache
def told(system: str, model: str, tensor: int, together: int, prompt: int, new_tokens: int) -> Prediction:
    """One generation of so many sequences together. InfeasibleError where it cannot run."""
    workload = Workload(kind="generate", prompt_length=prompt, new_tokens=new_tokens, batch=together)
    plan = Plan(tensor=tensor, micro_batch=together, attention="flash")
    if reason := why_not(MODELS[model], workload, plan):
        raise InfeasibleError(f"plan {plan.describe()}: {reason}")
    return predictor(system, model, workload).predict(plan, timeline=False)


def decoded(row: Served) -> Prediction:
    return told(row.system, row.model, row.tensor, row.concurrency, row.prompt, row.new_tokens)


def between(row: Served) -> float:
    """Milliseconds between two tokens of a request."""
    # A prefill of one prompt is the same whatever the answer's length: asked for the shortest that has a decoded token.
    one = told(row.system, row.model, row.tensor, 1, row.prompt, 2)
    return 1e3 * (decoded(row).decode_s + (row.concurrency - 1) / row.new_tokens * one.prefill_s)


def rows() -> Iterator[Row]:
    for row in served():
        yield Row(
            "aiconfigurator-core 0.12.0",
            f"{row.model.split('/')[-1]} {row.system} {row.backend} {row.version}",
            f"t={row.tensor} {row.concurrency} at once {row.prompt}+{row.new_tokens}",
            "TPOT ms",
            row.tpot_ms,
            partial(between, row),
            rests=lambda row=row: decoded(row).grades,  # type: ignore[misc]
            traits={"engine": row.backend, "tensor": row.tensor, "requests": row.concurrency},
        )


TABLE = Table("AIConfigurator's measured set, H100", "shipped profile h100-sxm", True, rows, workload="generate")
