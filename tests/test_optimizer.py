"""The optimizer's step: clipped by the gradients' global norm, with a barrier or validated afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from autotune.planners.feasible import why_not
from autotune.planners.lower.train import TEMPORARY, completed, lower_training
from autotune.planners.lower.traits import Traits, pipe_of, place_of
from autotune.planners.resolve import resolve
from autotune.planners.schedules import SCHEDULES, Order, Pipe, Step
from autotune.planners.simulate import simulate
from autotune.planners.validate import validate
from autotune.runners.state import Owned, Rates, Segment, StageState
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import DATA, Buffer, Instruction
from autotune.spec.workload import Workload
from tests.equal import Faults, assert_equal, busy, shallow
from tests.pool import Pool

TIED = ModelSpec("deep-llama", "LlamaForCausalLM", 16, 9, 4, 4, 4, 24, 32, tied=True)
OPEN = ModelSpec("deep-qwen", "Qwen3ForCausalLM", 24, 10, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
SOMETIMES = 3.0  # a clip that plain gradients of these models stay under
EARLY, LATE = (1, "attn_norm.weight"), (TIED.layers, "attn_norm.weight")  # in the first stage, and in the last
CASES: dict[str, Faults] = {
    "plain": (),
    "nan at the end": ((1, LATE, float("nan")),),
    "nan at the start": ((1, EARLY, float("nan")),),
    "infinite": ((0, LATE, float("inf")),),
    "huge at the end": ((1, LATE, 1e3),),
    "huge at the start": ((1, EARLY, 1e3),),
    "huge, and in the last step too": ((0, LATE, 1e3), (2, EARLY, 10.0)),
}
# Every case in one run, each fault in a step that others have left their states to; the first and the last step too.
ALL_FAULTS: Faults = (
    (0, LATE, 1e3),
    (1, LATE, float("nan")),
    (2, EARLY, float("nan")),
    (4, LATE, float("inf")),
    (5, EARLY, 1e3),
    (6, EARLY, 10.0),
)
RUNS = {**{name: (faults, 3) for name, faults in CASES.items()}, "all": (ALL_FAULTS, 7)}


def placed(faults: Faults, model: ModelSpec) -> Faults:
    """The faults with the late ones in the last of a model's layers."""
    return tuple((step, (model.layers, key[1]) if key == LATE else key, value) for step, key, value in faults)


def early_plans() -> list[Plan]:
    """One plan of each schedule on 2 and on 4 ranks, where it is legal."""
    found = []
    for name, entry in SCHEDULES.items():
        for pipeline in (2, 4):
            chunks = entry.chunks[-1]
            plan = Plan(1, 1, pipeline, 1, name, chunks, attention="math", optimizer="post-validated")
            if pipeline * chunks <= TIED.layers and not entry.refuse(pipe_of(plan, 2 * pipeline)):
                found.append(plan)
    return found


@pytest.mark.parametrize("clip", [1e-3, SOMETIMES])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(attention="math"),
        Plan(2, 1, 2, zero=1, attention="math"),
        Plan(1, 2, 2, attention="math", sequence_parallel=True),
        Plan(2, 2, 1, zero=1, attention="math"),
        Plan(1, 1, 4, attention="math"),
    ],
    ids=Plan.describe,
)
@pytest.mark.parametrize("model", [TIED, OPEN], ids=lambda m: m.name)
def test_a_clipped_step_equals_the_reference(pool: Pool, model: ModelSpec, plan: Plan, clip: float) -> None:
    assert_equal(pool, shallow(model, plan), plan, busy(replace(WORK, clip=clip), plan))


@pytest.mark.parametrize("faults", CASES.values(), ids=list(CASES))
def test_a_step_with_a_fault_equals_the_reference(pool: Pool, faults: Faults) -> None:
    plan = Plan(1, 1, 2, attention="math")
    model = shallow(TIED, plan)
    assert_equal(pool, model, plan, busy(replace(WORK, clip=SOMETIMES), plan), placed(faults, model), steps=3)


@pytest.mark.parametrize(
    ("plan", "case"),
    [(plan, case) for plan in early_plans() for case in RUNS if case == "all" or plan.schedule == "1f1b"],
    ids=lambda x: x if isinstance(x, str) else x.describe(),
)
def test_validated_afterwards_equals_the_reference(pool: Pool, plan: Plan, case: str) -> None:
    """Every schedule through all faults in one run; 1F1B, for what it tells of a failure, through each alone too."""
    work, model, (faults, steps) = busy(replace(WORK, clip=SOMETIMES), plan), shallow(TIED, plan), RUNS[case]
    assert why_not(model, work, plan, plan.world) is None
    answers = assert_equal(pool, model, plan, work, placed(faults, model), steps)
    # A step begins again just where a rank has updated wrongly before it: not where the first rank saw the NaN itself.
    place = place_of(plan, work.global_batch)
    first = {EARLY: min(place[0]) == 0, LATE: min(place[-1]) == 0}
    wrong = {step for step, key, value in faults if isfinite(value) or not first[key]}
    for answer in answers:
        begun = answer["validated"]  # the last entry is the validation after the last step
        assert {step for step in begun[:-1] if begun[:-1].count(step) > 1} == {s + 1 for s in wrong if s < steps - 1}


def zb_h2(pipe: Pipe) -> Order:
    """The handcrafted schedule of Zero Bubble (2401.10241, section 3.1), whose ranks start and end one F apart."""
    ranks, items = pipe.ranks, pipe.items
    found: Order = []
    for rank in range(ranks):
        warm = min(items, 2 * (ranks - rank) - 1)
        steps = [Step("F", rank, item) for item in range(warm)]
        weights = 0
        for item in range(items):
            steps.append(Step("B", rank, item))
            if warm < items:
                if item + 1 - weights > 2 * rank:
                    steps.append(Step("W", rank, weights))
                    weights += 1
                steps.append(Step("F", rank, warm))
                warm += 1
            else:
                steps.append(Step("W", rank, weights))
                weights += 1
        found.append(steps + [Step("W", rank, item) for item in range(weights, items)])
    return found


@dataclass
class Unit:
    """F, B and W take a second, messages a hundredth, the update one."""

    def seconds(self, rank: int, instruction: Instruction) -> float:
        if instruction.op in ("F", "B", "W", "OPT"):
            return 1.0
        return 0.01 if instruction.peers else 0.0

    def transient(self, rank: int, instruction: Instruction) -> int:
        return 0

    def sent(self, rank: int, instruction: Instruction) -> int:
        return 0


def declared(listing: Sequence[Instruction]) -> dict[str, Buffer]:
    """A buffer without a size for every name of a rank's list."""
    names = dict.fromkeys(name for i in listing for name in (*i.reads, *i.writes))
    return {name: Buffer(persistent=name[0] not in TEMPORARY or "." not in name) for name in names}


def two_steps(optimizer: str, ranks: int = 4, items: int = 12) -> tuple[list[float], list[float], float]:
    """Of each rank, the seconds between its update and its next forward, and when its two steps started; the period."""
    pipe = Pipe(ranks, items)
    key = Traits("1f1b", pipe, 1, 0, False, (False,) * ranks, (True,) * ranks, clip=True, optimizer=optimizer)
    program = completed(zb_h2(pipe), key)
    program = replace(program, buffers=tuple(map(declared, program.ranks)))
    validate(program)
    resolve(program, inline=True)
    line = simulate(program, Unit(), steps=2)
    waits, skews, starts = [], [], []
    for rank in range(ranks):
        forwards = [s.start for s in line.spans if s.rank == rank and line.instruction(s).op == "F"]
        updates = [s.end for s in line.spans if s.rank == rank and line.instruction(s).op == "OPT"]
        waits.append(forwards[items] - updates[0])
        starts.append(forwards[items])
        skews.append(forwards[items] - forwards[0])
    return waits, starts, max(skews)


def test_ranks_start_their_next_step_without_waiting() -> None:
    """The start skew is kept: each rank goes from its update to its next forward, as if no norm were taken.

    With a barrier every rank waits for the last one, which ends one F a rank later than the first.
    """
    waits, starts, period = two_steps("post-validated")
    assert max(waits) < 0.1
    assert all(0.9 < later - earlier < 1.1 for earlier, later in pairwise(starts))
    assert period == pytest.approx(3 * 12 + 1, abs=0.2)  # all its work and the update: no bubble
    waits, _, slower = two_steps("barrier")
    assert slower == pytest.approx(period + 3, abs=0.2)  # the (p - 1) F of the skew are lost


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_is_slower_for_it(name: str) -> None:
    """With any schedule the second step's end comes no later than with a barrier, but for the messages of the norm."""
    entry = SCHEDULES[name]
    ends = []
    for optimizer in ("barrier", "post-validated"):
        plan = Plan(1, 1, 4, 1, name, entry.chunks[-1], attention="math", optimizer=optimizer)
        if plan.stages > TIED.layers:
            plan = replace(plan, pipeline=2)
        if entry.refuse(pipe_of(plan, 8)):
            pytest.skip(f"{name} is not legal with 8 micro-batches on {plan.pipeline} ranks")
        program = lower_training(plan, TIED, replace(WORK, clip=1.0))
        ends.append(simulate(program, Unit(), steps=2).makespan)
    assert ends[1] <= ends[0] + 16 * 0.01


RISING = replace(
    WORK, clip=SOMETIMES, warmup_steps=2, decay_steps=4
)  # three steps at a half, the whole, and about a half again


@pytest.mark.parametrize(
    ("plan", "case"),
    [
        (Plan(2, zero=1), "plain"),
        (Plan(1, 1, 2, optimizer_offload=70, optimizer_stride=3), "nan at the end"),
        (Plan(1, 1, 2, optimizer="post-validated"), "nan at the end"),
        (Plan(1, 1, 2, optimizer="post-validated"), "huge at the start"),
    ],
    ids=lambda x: x.describe() if isinstance(x, Plan) else x,
)
def test_the_learning_rate_rises_and_falls(pool: Pool, plan: Plan, case: str) -> None:
    """Also where a step is skipped, which does not count, or taken back and done again."""
    assert len({RISING.rate(step) for step in (1, 2, 3)}) == 3
    plan, model = replace(plan, attention="math"), shallow(TIED, plan)
    assert_equal(pool, model, plan, busy(RISING, plan), placed(CASES[case], model), steps=3)


def test_the_learning_rate_is_that_of_torchs_schedulers() -> None:
    """A line and half a cosine, joined; then a tenth for good."""
    work = Workload(learning_rate=0.5, warmup_steps=5, decay_steps=25)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    rise = LinearLR(optimizer, 1 / 5, 1.0, total_iters=4)
    fall = CosineAnnealingLR(optimizer, 20, eta_min=0.05)
    both = SequentialLR(optimizer, [rise, fall], [4])
    for step in range(1, 26):
        assert work.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        optimizer.step()
        both.step()
    assert work.rate(26) == work.rate(10**9) == pytest.approx(0.05)
    flat = Workload(learning_rate=0.5)
    assert flat.rate(1) == flat.rate(10**9) == 0.5
    assert replace(flat, warmup_steps=4).rate(3) == 0.375 and replace(flat, warmup_steps=4).rate(99) == 0.5


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_update_is_taken_back(steps: int) -> None:
    """revert undoes the last update up to rounding, moments included; the first one's moments exactly."""
    generator = torch.Generator().manual_seed(steps)
    flat = torch.randn(64, dtype=torch.float64, generator=generator)
    grad, zeros, whole = torch.zeros_like(flat), torch.zeros_like(flat), slice(0, 64)
    segments, owned = (Segment(DATA, whole, whole, whole),), (Owned(whole, whole),)
    state = StageState((), flat, grad, (flat,), zeros.clone(), zeros.clone(), torch.zeros(()), {}, {}, segments, owned)
    rates = Rates(1e-2, 0.1)
    for _ in range(steps):
        before = [t.clone() for t in (*state.masters, state.exp_avg, state.exp_avg_sq, state.step)]
        grad.copy_(torch.randn(64, dtype=torch.float64, generator=generator))
        state.update(rates)
    state.revert(rates)
    for now, then in zip((*state.masters, state.exp_avg, state.exp_avg_sq, state.step), before, strict=True):
        assert torch.allclose(now, then, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("plan", "clip", "reason"),
    [
        (Plan(1, 1, 2, optimizer="post-validated"), 0.0, "clip above 0"),
        (Plan(optimizer="post-validated"), 1.0, "needs pipeline > 1"),
        (Plan(1, 1, 2, optimizer="postvalidated"), 1.0, "nearest post-validated"),
    ],
)
def test_what_cannot_be_validated_is_refused(plan: Plan, clip: float, reason: str) -> None:
    assert reason in str(why_not(TIED, replace(WORK, clip=clip), plan))
