"""What a generation would have to be to fit a machine on which it does not: the nearest length of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.planners.space import Enumeration
from autotune.spec.errors import InfeasibleError
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question
from autotune.spec.workload import Workload

TRIED = 256  # plans among which the one that takes least is looked for
GIB = 2**30


def _peak(model: ModelSpec, workload: Workload, profile: Profile, plan: Plan) -> Prediction:
    return Predictor(model, workload, profile).predict(plan, timeline=False)


def _size(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB / 100 else f"{size / 2**20:.3g} MiB"


def nearest_prompt(model: ModelSpec, workload: Workload, profile: Profile, plans: Sequence[Plan], allowed: int) -> str:
    """Which prompt_length some of the plans would have room for in so many bytes a device, and what takes it; "" where
    there are no plans. Of the plans the one counts that takes least."""
    found = [_peak(model, workload, profile, plan) for plan in plans]
    if not found:
        return ""
    least = min(found, key=lambda prediction: max(prediction.peak_bytes))
    plan, fullest = least.plan, max(least.memory, key=lambda rank: sum(rank.values()))
    takes = ", ".join(f"{kind} {_size(size)}" for kind, size in sorted(fullest.items(), key=lambda i: -i[1]) if size)
    told = f"{plan.describe()} takes least, {takes}"

    def fits(length: int) -> bool:
        shorter = replace(workload, prompt_length=length, prompt_lengths=())
        tried = plan.altered(prompt_chunk=plan.prompt_chunk if plan.prompt_chunk < length else 0)
        return max(_peak(model, shorter, profile, tried).peak_bytes) <= allowed

    low, high = 0, workload.prompt_length  # the most that is known to fit, and the least that does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low:
        return f"{told}; nearest: prompt_length = {low}"
    alone = fullest.get("weights", 0) > allowed
    why = "its weights alone do not fit" if alone else "not even prompts of one token fit"
    return f"{told}; {why} into {_size(allowed)} of a device"


def nearest_of(question: Question, allowed: int) -> str:
    """The same of a question for which nothing fits: of its plans with the fewest sequences at a time."""
    if question.workload.kind == "train":
        return ""
    plans = list(islice(Enumeration(question), TRIED))
    least = min((plan.data * plan.micro_batch for plan in plans), default=0)
    few = [plan for plan in plans if plan.data * plan.micro_batch == least]
    return nearest_prompt(question.model, question.workload, question.profile, few, allowed)


def check_room(model: ModelSpec, workload: Workload, profile: Profile, predicted: Prediction) -> None:
    """Raises InfeasibleError where a generation takes more than all of a device's memory: before a weight is read."""
    plan, device = predicted.plan, profile.device
    allowed = int(device.memory_bytes / profile.sharing(plan.world) - device.context_bytes)
    peak = max(predicted.peak_bytes, default=0)
    if workload.kind != "generate" or peak <= allowed or why_not(model, workload, plan):
        return
    found = f"needs {_size(peak)} on a device, and {device.name} has {_size(allowed)} for each"
    raise InfeasibleError(
        f"plan {plan.describe()}: {found}", hint=nearest_prompt(model, workload, profile, [plan], allowed)
    )
