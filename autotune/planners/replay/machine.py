"""What the tables on a real machine share: a shipped profile, a GPT-like shape, predictions that are made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.errors import InfeasibleError
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.workload import Workload

A100 = "a100-sxm-80gb"  # a datasheet profile: nothing in it was measured
A100_FLOPS = 312e12  # dense bf16, NVIDIA's datasheet: what the papers' utilisations are shares of


def gpt(name: str, layers: int, hidden: int, heads: int, vocab: int, tensor: int = 1) -> ModelSpec:
    """The shape of a GPT with a feed-forward of two matrices of 4 h: three of 8/3 h have as many weights and FLOPs.

    The width is rounded to the nearest multiple of the tensor ranks, which moves the weights by less than 0.01 %.
    """
    ffn = round(8 * hidden / 3 / tensor) * tensor
    return ModelSpec(name, "LlamaForCausalLM", hidden, layers, heads, heads, hidden // heads, ffn, vocab)


@cache
def predictor(model: ModelSpec, workload: Workload) -> Predictor:
    return Predictor(model, workload, load_profile(shipped()[A100]))


@cache
def predicted(model: ModelSpec, workload: Workload, plan: Plan) -> Prediction:
    """The prediction from the shipped profile. InfeasibleError where the plan cannot run."""
    if reason := why_not(model, workload, plan):
        raise InfeasibleError(f"plan {plan.describe()}: {reason}")
    return predictor(model, workload).predict(plan, timeline=False)


def telling(
    asked: Callable[[], Prediction], value: Callable[[Prediction], float]
) -> tuple[Callable[[], float], Callable[[], Mapping[str, float]]]:
    """A row's `found` and `rests`: what a prediction says, and which grades of prices that rests on."""
    return lambda: value(asked()), lambda: asked().grades
