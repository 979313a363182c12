"""Any schedule of whole backwards with B and W in the place of each, and the W's placed as 2BP does (2405.18047)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.planners.schedules import PLACEMENTS, SCHEDULES, Pipe, Step, schedule_of
from autotune.planners.schedules.times import Times
from autotune.planners.schedules.timing import peaks, timed
from autotune.planners.space import Enumeration
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.test_conformance import OPEN, SEARCHED, plans

MODEL = ModelSpec("wide", "LlamaForCausalLM", 1024, 8, 16, 16, 64, 2816, 32000)
WORK = Workload(sequence_length=2048, global_batch=16)
H100 = load_profile(MACHINES / "h100-sxm.json")
WHOLE = [name for name in SEARCHED if not SCHEDULES[name].splits]
PIPES = [(name, Pipe(p, m, SCHEDULES[name].chunks[0])) for name in WHOLE for p, m in ((2, 4), (4, 8))]
CASES = [(name, pipe) for name, pipe in PIPES if SCHEDULES[name].refuse(pipe) is None]


@pytest.mark.parametrize("how", PLACEMENTS)
@pytest.mark.parametrize(("name", "pipe"), CASES)
def test_every_backward_becomes_a_b_and_a_w(name: str, pipe: Pipe, how: str) -> None:
    whole, entry = SCHEDULES[name].order(pipe), schedule_of(name, how)
    order = entry.order(pipe)
    assert entry.splits and entry.place(pipe) == SCHEDULES[name].place(pipe)
    for before, after in zip(whole, order, strict=True):
        first = [step._replace(op="BW") if step.op == "B" else step for step in after if step.op != "W"]
        assert first == before  # nothing else moves
        place = {step: at for at, step in enumerate(after)}
        backs = [step for step in after if step.op == "B"]
        weights = [place[Step("W", stage, item)] for _, stage, item in backs]
        assert Counter(step.op for step in after)["W"] == len(backs)
        assert all(place[b] < w for b, w in zip(backs, weights, strict=True))
        if how == "immediate":
            assert all(w == place[b] + 1 for b, w in zip(backs, weights, strict=True))
        if how == "end":  # after everything else, those of a stage side by side
            tail = after[-len(backs) :]
            assert {step.op for step in tail} == {"W"}
            turns = [stage for at, (_, stage, _) in enumerate(tail) if not at or tail[at - 1].stage != stage]
            assert len(turns) == len(set(turns)) and entry.row is not None
            assert set(Counter(step.stage for step in tail).values()) == {entry.row(pipe)}
    if entry.peak is not None:
        assert peaks(order) == entry.peak(pipe)
    known = {"immediate": SCHEDULES[name].peak is not None, "fill": False, "end": True}
    assert (entry.peak is not None) == known[how]


@pytest.mark.parametrize("how", PLACEMENTS)
@pytest.mark.parametrize(("name", "pipe"), CASES)
def test_a_split_backward_never_ends_later(name: str, pipe: Pipe, how: str) -> None:
    """The stage before waits for B alone, and no W delays an F or a B that was not behind the whole backward."""
    whole = timed(SCHEDULES[name].order(pipe), pipe).makespan
    split = timed(schedule_of(name, how).order(pipe), pipe).makespan
    assert split <= whole


@pytest.mark.parametrize(
    ("name", "how", "same"),
    [
        ("gpipe", "end", "2bp-gpipe"),
        ("1f1b", "end", "2bp-1f1b"),
        ("1f1b", "fill", "2bp-1f1b-fill"),
        ("interleaved-1f1b", "end", "2bp-interleaved"),
        ("interleaved-1f1b", "fill", "2bp-interleaved-fill"),
    ],
)
def test_the_schedules_of_2bp_are_such(name: str, how: str, same: str) -> None:
    pipe = Pipe(4, 8, SCHEDULES[same].chunks[-1], times=Times((3.0,), (2.0,), (1.5,), 0.3))
    assert schedule_of(name, how).order(pipe) == SCHEDULES[same].order(pipe)
    assert schedule_of(name, how).timed == SCHEDULES[same].timed


@pytest.mark.parametrize(
    ("name", "chunks", "how", "products"),
    [("chimera", 1, "end", "joined"), ("bitpipe", 2, "fill", "apart"), ("hanayo", 2, "immediate", "apart")],
)
def test_they_give_the_serial_gradients(pool: Pool, name: str, chunks: int, how: str, products: str) -> None:
    plan = Plan(1, 1, 2, 1, name, chunks, attention="math", split=how, weight_gradients=products)
    assert_equal(pool, OPEN, plan, Workload(sequence_length=8, global_batch=4, precision="fp64", learning_rate=1e-2))


def test_the_conformance_suite_draws_every_placement() -> None:
    assert {case.values[1].split for name in WHOLE for case in plans(name)} == {"own", *PLACEMENTS}


def test_a_recipe_may_ask_for_them() -> None:
    axes: dict[str, tuple[object, ...]] = {
        "pipeline": (2,), "data": (1,), "micro_batch": (1,), "recompute": ("none",), "vocabulary": ("ends",),
        "split": ("own", "fill", "end"), "schedule": ("chimera", "zb-h1"),
    }  # fmt: skip
    space = Enumeration(Question(MODEL, WORK, H100, 2, axes), PricedAdvice(Bounder(Predictor(MODEL, WORK, H100))))
    found = {(p.schedule, p.split, p.weight_gradients, bool(p.times)) for p in space if not p.zero}
    assert found == {
        ("chimera", "own", "apart", False),
        ("chimera", "fill", "apart", True),
        ("chimera", "end", "apart", False),
        ("chimera", "end", "joined", False),
        ("zb-h1", "own", "apart", False),
    }
    assert any("needs a schedule of whole backwards" in reason for reason in space.infeasible)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(pipeline=2, split="late"), "split 'late' is unknown (nearest own)"),
        (Plan(pipeline=2, schedule="zb-h1", split="end"),
         "split end needs a schedule of whole backwards (found zb-h1; nearest split own)"),
        (Plan(pipeline=2, split="end", weight_gradients="joined"), None),
    ],
)  # fmt: skip
def test_what_cannot_be_split(plan: Plan, message: str | None) -> None:
    assert why_not(MODEL, WORK, replace(plan, attention="flash")) == message
