"""What a long context costs a served model: its prefill, the users that fit, a token's latency, a switch between users.

After Fu (2405.08944), who traces all four to the size of the key-value cache: it is made by the prefill, it fills the
memory that weights leave, it is read for every token, and it goes to the host and back where more users come than fit.
Beside what the cost model predicts stand the times at peak rates, as there: FLOPs over the peak, bytes over the
bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from autotune.planners.costs.generate import PassCosts
from autotune.planners.costs.works import flops
from autotune.planners.decoding.strategies import scored
from autotune.planners.feasible import PAGES, why_not
from autotune.planners.lower.generate import (
    block_shape,
    cache_bytes,
    counted_blocks,
    inference_body,
    lower_generation,
)
from autotune.planners.lower.shape import generation_shape
from autotune.planners.lower.stage import FORMS, cut_of
from autotune.planners.predict import Predictor
from autotune.planners.search import limit_bytes
from autotune.planners.simulate import memory
from autotune.planners.steps import steps
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question
from autotune.spec.program import DEVICE
from autotune.spec.work import Copy

SHORT = 4096  # tokens of a context that is no long one
MOST = 2**16  # users of a replica that are looked for


@dataclass(frozen=True)
class Peak:
    """The same at peak rates, in seconds; `users` by memory over what one takes, weights left aside."""

    prefill_s: float
    users: int
    decode_s: float


@dataclass(frozen=True)
class ContextCosts:
    """Of prompts of `context` tokens. `kv_bytes`: a user's cache on all ranks of a replica. `users`: whose caches fit,
    over all replicas. `decode_s`: a token of one user alone, `full_s`: of all that fit (0 where none does).
    `switch_s`: one user's cache to the host and another's back; None where the device's memory is the host's."""

    context: int
    kv_bytes: int
    prefill_s: float
    users: int
    decode_s: float
    full_s: float
    switch_s: float | None
    sessions_h: float  # prompts read one after the other, answered together
    peak: Peak


def context_costs(question: Question, plan: Plan) -> ContextCosts:
    """The four costs of a question's generation under a plan, whose `micro_batch` does not matter: as many go together
    as fit."""
    plan, profile = plan.altered(micro_batch=1), question.profile
    alone = _serving(question, 1, plan.data)
    predictor = Predictor(question.model, alone.workload, profile)
    one, users = predictor.predict(plan, timeline=False), _most(question, plan)
    full_s = one.decode_s if users else 0.0
    if users > 1:
        work = _serving(question, users, plan.data).workload
        full_s = Predictor(question.model, work, profile).predict(_of(plan, users), timeline=False).decode_s
    seconds, each = predictor.pricer(plan.world).seconds, _cache(question, plan)
    reading = users * one.prefill_s
    return ContextCosts(
        question.workload.prompt_length,
        _whole_cache(question, plan),
        one.prefill_s,
        users * plan.data,
        one.decode_s,
        full_s,
        None if profile.inline else seconds(Copy("d2h", each)) + seconds(Copy("h2d", each)),
        3600 * users * plan.data / (reading + question.workload.new_tokens * full_s) if users else 0.0,
        _peak(question, plan, one),
    )


def _serving(question: Question, users: int, data: int) -> Question:
    """The question with so many users of each replica."""
    return replace(question, workload=replace(question.workload, batch=users * data, prompt_lengths=()))


def _cache(question: Question, plan: Plan) -> int:
    """Bytes of one user's cache on the rank that has most layers."""
    layers = -(-question.model.layers // plan.pipeline)
    return cache_bytes(plan, question.model, _serving(question, 1, plan.data).workload, layers)


def _whole_cache(question: Question, plan: Plan) -> int:
    """The same on all ranks of a replica."""
    work = _serving(question, 1, plan.data).workload
    return cache_bytes(plan.altered(tensor=1), question.model, work, question.model.layers)


def _most(question: Question, plan: Plan) -> int:
    """The most users of a replica whose caches fit, where prompts are read one at a time and answered together."""
    allowed = limit_bytes(question)
    first = _peaks(question, plan, 1, prompt=True)
    each = _cache(question, plan)

    def fits(users: int) -> bool:
        if users > MOST or why_not(question.model, _serving(question, users, plan.data).workload, _of(plan, users)):
            return False
        read = max(first) + (users - 1) * each  # as if the fullest rank had most layers, which it mostly has
        return max(read, *_peaks(question, plan, users, prompt=False)) <= allowed

    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _of(plan: Plan, users: int) -> Plan:
    return plan.altered(micro_batch=users)


def _peaks(question: Question, plan: Plan, users: int, prompt: bool) -> list[int]:
    """Device bytes of each rank at its peak in a prefill, or in the last round, of so many users of a replica."""
    work, model = _serving(question, users, plan.data).workload, question.model
    new, last = scored(plan), work.prompt_length + max(1, work.new_tokens - 1)
    lengths = (work.prompt_length, work.prompt_length) if prompt else (new, last - 1 + new)
    moved, predictor = _of(plan, users), Predictor(model, work, question.profile)
    costs = PassCosts(moved, model, work, predictor.bodies(moved), *lengths)
    held = memory(lower_generation(moved, model, work, *lengths), costs.transient)
    return [max(series[DEVICE], default=0) for series in held]


def _peak(question: Question, plan: Plan, one: Prediction) -> Peak:
    """As Fu has it, from the peak, the bandwidth and the memory alone. A replica's tensor ranks share the work, its
    pipeline ranks do theirs one after the other; a processor's workers share its rates. `one`: of a user alone."""
    model, work, device = question.model, _serving(question, 1, plan.data).workload, question.profile.device
    share = plan.world if question.profile.inline else 1
    shape = generation_shape(plan, work, work.prompt_length, work.prompt_length)
    cut = cut_of(plan, model)
    prefill = sum(
        count * flops(block, body.forward, body, block_shape(block, shape))
        for stage in range(plan.pipeline)
        for block, count in counted_blocks(model, cut, stage).items()
        for body in (inference_body(block, shape),)
    )
    weights = sum(rank.get("weights", 0) for rank in one.memory)  # of one tensor rank
    kv = _whole_cache(question, plan)
    room = plan.pipeline * limit_bytes(question) - weights
    rate = device.peak_flops.get(work.precision, 0.0)
    return Peak(
        share * prefill / rate if rate else 0.0,
        plan.data * max(0, plan.tensor * room // kv),
        share * (weights + kv / plan.tensor) / device.memory_bandwidth,
    )


def lengths(question: Question) -> tuple[int, ...]:
    """The question's own context, and others by doubling as far as the model's positions go."""
    own, new = question.workload.prompt_length, question.workload.new_tokens
    last = max(own, (question.model.max_positions or SHORT) - new)
    found, length = {own}, SHORT
    while length <= last:
        found.add(length)
        length *= 2
    return tuple(sorted(found))


def at_length(question: Question, plan: Plan, length: int) -> ContextCosts:
    """The costs at another context; a prompt is read in parts only if it is longer than one."""
    work = replace(question.workload, prompt_length=length, prompt_lengths=())
    chunk = plan.prompt_chunk if plan.prompt_chunk < length else 0
    return context_costs(replace(question, workload=work), plan.altered(prompt_chunk=chunk))


@dataclass(frozen=True)
class Option:
    """Something else than the plan or the model at hand, and what it costs then."""

    changes: str
    model: bool  # whether it is another model, which a search cannot choose
    costs: ContextCosts


def options(question: Question, plan: Plan) -> Iterator[Option]:
    """Every step along an axis of the plan, with rounded weights and pages among them, and models with fewer or more
    key-value heads or a sliding window."""
    named = {"weights": tuple(FORMS), "page": PAGES}
    asked = replace(question, axes={**named, **question.axes})
    seen = {plan.altered(micro_batch=1)}
    for step in steps(asked, plan):
        moved = step.plan.altered(micro_batch=1)
        if moved not in seen and not step.reason:
            seen.add(moved)
            yield Option(_told(plan, moved), False, context_costs(question, moved))
    for told, model in variants(question.model, question.workload.prompt_length):
        work = replace(question.workload, batch=plan.data)
        if not why_not(model, work, plan.altered(micro_batch=1), question.devices):
            yield Option(told, True, context_costs(replace(question, model=model), plan))


def _told(plan: Plan, moved: Plan) -> str:
    axes, others = plan.to_dict(), moved.to_dict()
    named = [axis for axis in axes if axes[axis] != others[axis] and axis != "micro_batch"]
    return ", ".join(f"{axis} {axes[axis]} -> {others[axis]}" for axis in named)


def variants(model: ModelSpec, context: int) -> Iterator[tuple[str, ModelSpec]]:
    """The model with a key-value head for every head, with half as many as it has, and with a window of a short
    context."""
    if model.kv_heads < model.heads:
        yield f"kv_heads {model.kv_heads} -> {model.heads}", replace(model, kv_heads=model.heads)
    if model.kv_heads % 2 == 0:
        yield f"kv_heads {model.kv_heads} -> {model.kv_heads // 2}", replace(model, kv_heads=model.kv_heads // 2)
    if context > SHORT and not 0 < model.window <= SHORT:
        yield f"window {model.window or 'none'} -> {SHORT}", replace(model, window=SHORT)
