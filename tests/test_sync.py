"""When replicas sum their gradients: eager and late give the same numbers, and eager is never later."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.predict import Predictor
from autotune.planners.schedules import SCHEDULES
from autotune.planners.search import search
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.runners.flying import Once
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.program import Instruction
from autotune.spec.work import Collective
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.test_conformance import SEARCHED, TIED, plans

MODEL = ModelSpec("wide", "LlamaForCausalLM", 1024, 8, 16, 16, 64, 2816, 32000)
WORK = Workload(sequence_length=2048, global_batch=16)
H100 = load_profile(MACHINES / "h100-sxm.json")
SUMS = ("SYNC", "ALL_REDUCE", "REDUCE_SCATTER", "SUM_PARTIAL")


def slowed(times: float) -> Profile:
    """An H100 machine whose links are so many times slower."""
    assert not any(isinstance(s.work, Collective) for s in H100.samples)  # which would be priced by themselves
    return replace(H100, links=tuple(replace(k, bandwidth=k.bandwidth / times) for k in H100.links))


def sums(listing: tuple[Instruction, ...]) -> list[tuple[int, Instruction]]:
    return [(at, i) for at, i in enumerate(listing) if i.op in SUMS]


@pytest.mark.parametrize("schedule", ["chimera", "bitpipe"])
@pytest.mark.parametrize("data", [1, 2])
def test_late_sums_are_behind_the_last_backward_and_eager_ones_behind_their_own(schedule: str, data: int) -> None:
    plan = Plan(data, 1, 4, 1, schedule, SCHEDULES[schedule].chunks[0])
    listings = {sync: lower_training(replace(plan, sync=sync), MODEL, WORK).ranks for sync in ("eager", "late")}
    for early, late in zip(listings["eager"], listings["late"], strict=True):
        backwards = {i.stage: at for at, i in enumerate(early) if i.op == "BW"}
        syncs = [(at, i.stage) for at, i in sums(early) if i.op == "SYNC"]
        behind = [(at, stage) for at, stage in syncs if at == 1 + max(n for n in backwards.values() if n < at)]
        assert len(syncs) == len(backwards) and behind  # behind a backward, and not all behind the last one
        assert min(at for at, _ in syncs) < max(backwards.values())
        end = max(at for at, i in enumerate(late) if i.op == "BW")
        assert min(at for at, _ in sums(late)) > end
        assert [i.label for _, i in sums(late)] == [i.label for _, i in sums(early)]  # the same, in the same order


@pytest.mark.parametrize("times", [1.0, 30.0])
def test_eager_is_never_later_and_takes_the_same_memory(times: float) -> None:
    """The lists differ in where sums stand and what they wait for, so no event of the eager one can be later."""
    draw, predictor, seen, gained = random.Random(3), Predictor(MODEL, WORK, slowed(times)), 0, 0
    names = [name for name in SEARCHED if name != "solved"]
    while seen < 24:
        late = Plan(
            draw.choice((1, 2, 4)),
            1,
            draw.choice((1, 2, 4)),
            draw.choice((1, 2)),
            draw.choice(("chimera", "bitpipe", "dualpipe", *names)),
            chunks=draw.choice((1, 2)),
            attention="flash",
            zero=draw.choice((0, 1, 2)),
            offload=draw.choice((0, 50)),
            vocabulary=draw.choice(("ends", "vocab-2")),
            sync="late",
        )
        if why_not(MODEL, WORK, late):
            continue
        seen += 1
        later, sooner = (predictor.predict(p, timeline=False) for p in (late, replace(late, sync="eager")))
        assert sooner.step_s <= later.step_s * (1 + 1e-12), late
        assert sooner.peak_bytes == later.peak_bytes, late
        gained += sooner.step_s < later.step_s
    assert gained


def test_eager_sums_hide_behind_the_backwards_of_other_stages() -> None:
    """BitPipe on four ranks and slow links: the first stage that ends is summed while the others go on."""
    plan = Plan(1, 1, 4, 1, "bitpipe", 2, attention="flash")
    predictor = Predictor(MODEL, WORK, slowed(10.0))
    eager, late = (predictor.predict(replace(plan, sync=sync)) for sync in ("eager", "late"))
    assert eager.step_s < 0.99 * late.step_s
    assert eager.breakdown["exposed communication"] < late.breakdown["exposed communication"]


def test_two_directions_hold_the_weights_twice_and_idle_less() -> None:
    """BitPipe beside interleaved 1F1B of as many chunks: the added weight memory, and the fewer bubbles."""
    predictor = Predictor(MODEL, WORK, H100)
    two, one = (predictor.predict(Plan(1, 1, 4, 1, n, 2, attention="flash")) for n in ("bitpipe", "interleaved-1f1b"))
    for kind in ("weights", "gradients", "optimizer"):
        assert sum(m[kind] for m in two.memory) == 2 * sum(m[kind] for m in one.memory)
    assert two.breakdown["idle"] < one.breakdown["idle"]


def test_a_search_that_may_choose_takes_eager() -> None:
    axes: dict[str, tuple[object, ...]] = {
        "schedule": ("bitpipe",), "pipeline": (4,), "micro_batch": (1,), "recompute": ("none",),
        "sync": ("late", "eager"),
    }  # fmt: skip
    found = search(Question(MODEL, WORK, slowed(10.0), 4, axes)).ranking
    assert {p.plan.sync for p in found} == {"eager", "late"} and found[0].plan.sync == "eager"


@pytest.mark.parametrize("schedule", ["chimera", "bitpipe"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_late_equals_the_serial_reference(pool: Pool, schedule: str, ranks: int) -> None:
    """The conformance suite draws both; here each of two-way schedules with late sums on two and four ranks."""
    chunks = SCHEDULES[schedule].chunks[0]
    plan = Plan(1, 1, ranks, 1, schedule, chunks, attention="math", sync="late")
    work = Workload(sequence_length=8, global_batch=ranks, precision="fp64", learning_rate=1e-2)
    assert_equal(pool, TIED, plan, work)


def test_the_conformance_suite_draws_both() -> None:
    drawn = {case.values[1].sync for name in SEARCHED for case in plans(name)}
    assert drawn == {"eager", "late"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(2, sync="lazy"), "sync 'lazy' is unknown (nearest late)"),
        (Plan(pipeline=2, sync="late"),
         "sync late needs gradients to sum at the end: data > 1 with zero 0 or 1, or a schedule of two directions "
         "(found data 1, zero 0; nearest eager)"),
        (Plan(2, zero=3, sync="late"),
         "sync late needs gradients to sum at the end: data > 1 with zero 0 or 1, or a schedule of two directions "
         "(found data 2, zero 3; nearest eager)"),
    ],
)  # fmt: skip
def test_late_needs_something_to_sum(plan: Plan, message: str) -> None:
    assert why_not(MODEL, WORK, plan) == message


def test_a_sum_that_many_wait_for_is_waited_for_once() -> None:
    """gloo copies a scattered sum's result again at every wait: over gradients that were emptied since (found as wrong
    weights in one of five runs of late sums with ZeRO-1)."""

    class Copies:
        def __init__(self) -> None:
            self.times = 0

        def wait(self) -> None:
            time.sleep(0.01)
            self.times += 1

    copies = Copies()
    once = Once(copies)
    threads = [threading.Thread(target=once.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once.wait()
    assert copies.times == 1
