"""Activations on the host: which move, when that is free, and what it leaves on the device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.passes.offload import SELECTIVE, UNIFORM, Moves, chosen, waits
from autotune.planners.predict import Predictor
from autotune.planners.schedules import SCHEDULES, Pipe
from autotune.planners.simulate import memory
from autotune.planners.space import Enumeration
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question
from autotune.spec.program import HOST
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.test_conformance import OPEN, TIED

BIG = ModelSpec("big", "LlamaForCausalLM", 8192, 16, 64, 8, 128, 28672, 1024)
WORK = Workload(sequence_length=4096, global_batch=32)
H100 = load_profile(MACHINES / "h100-sxm.json")
PLAIN = Plan(1, 1, 4, 1, "interleaved-1f1b", 4, attention="flash")
ORDERS = [("interleaved-1f1b", 2), ("interleaved-1f1b", 4), ("gis", 2), ("v-half", 2), ("hanayo", 2)]


def linked(times: float) -> Profile:
    """An H100 whose link to the host is so many times as fast."""
    rates = {k: v * times if k.startswith("host_link") else v for k, v in H100.coefficients.items()}
    return replace(H100, coefficients=rates)


def held(found: Prediction) -> int:
    """Bytes of activations on the fullest rank."""
    return max(m.get("activations", 0) + m.get("boundaries", 0) for m in found.memory)


@pytest.mark.parametrize(("name", "chunks"), ORDERS)
@pytest.mark.parametrize("percent", [25, 50, 100])
def test_selective_takes_what_waits_longest_and_uniform_of_each_stage_a_share(
    name: str, chunks: int, percent: int
) -> None:
    pipe = Pipe(4, 16, chunks)
    for listing in SCHEDULES[name].order(pipe):
        everything = waits(listing)
        long = [wait for wait in everything if wait.span > Moves(0).shortest]
        mean = {
            stage: sum(w.span for w in everything if w.stage == stage) / pipe.items
            for stage in {wait.stage for wait in everything}
        }
        moved = chosen(listing, Moves(percent, SELECTIVE))
        assert set(moved) <= set(long) and len(moved) == min(len(long), len(everything) * percent // 100)
        stays = set(long) - set(moved)
        if stays and moved:  # no stage that waits longer than another keeps something while the other moves
            assert max(mean[w.stage] for w in stays) <= min(mean[w.stage] for w in moved)
        share = Counter(wait.stage for wait in chosen(listing, Moves(percent, UNIFORM)))
        assert all(count <= pipe.items * percent // 100 for count in share.values())
        whole = {stage for stage in mean if all(w in long for w in everything if w.stage == stage)}
        assert all(share[stage] == pipe.items * percent // 100 for stage in whole)


@pytest.mark.parametrize(("name", "chunks"), ORDERS)
def test_full_offload_is_free_where_copies_take_no_longer_than_compute(name: str, chunks: int) -> None:
    predictor, plan = Predictor(BIG, WORK, linked(2)), replace(PLAIN, schedule=name, chunks=chunks)
    assert PricedAdvice(Bounder(predictor)).moved(plan) == (100, 2)
    without, full = predictor.predict(plan), predictor.predict(replace(plan, offload=100))
    assert full.step_s == pytest.approx(without.step_s, rel=1e-6) and held(full) < 0.85 * held(without)


def test_a_slow_link_carries_the_share_that_is_advised_and_selective_leaves_least() -> None:
    """k = 2.7: 100 / k percent are as good as free with a window that lets them, all of them cost a third or more."""
    predictor = Predictor(BIG, WORK, linked(0.5))
    share, window = PricedAdvice(Bounder(predictor)).moved(PLAIN)
    assert 30 < share < 50 and window > 2
    without, hasty, selective, uniform, full = (
        predictor.predict(replace(PLAIN, **axes))
        for axes in (
            {},
            {"offload": share},
            {"offload": share, "offload_window": window},
            {"offload": share, "offload_window": window, "offload_choice": "uniform"},
            {"offload": 100, "offload_window": window},
        )
    )
    assert selective.step_s < 1.02 * without.step_s < 1.15 * without.step_s < hasty.step_s
    assert full.step_s > 1.25 * without.step_s
    assert held(selective) < held(uniform) < held(without)


@pytest.mark.parametrize(
    ("name", "chunks"), [("interleaved-1f1b", 2), ("interleaved-1f1b", 4), ("gis", 2), ("hanayo", 2), ("v-half", 2)]
)
def test_memory_of_a_device_falls_with_more_stages(name: str, chunks: int) -> None:
    """The same layers on more ranks: without offload a rank keeps about as much however many there are."""
    predictor = Predictor(replace(BIG, layers=32), WORK, linked(2))
    kept, left = [], []
    for pipeline in (2, 4, 8):
        plan = replace(PLAIN, pipeline=pipeline, schedule=name, chunks=chunks)
        assert why_not(predictor.model, WORK, plan) is None
        kept.append(held(predictor.predict(plan)))
        left.append(held(predictor.predict(replace(plan, offload=100))))
    assert left == sorted(left, reverse=True) and left[2] < 0.6 * left[0]
    assert left[2] / kept[2] < left[0] / kept[0]


def test_what_leaves_the_device_is_on_the_host() -> None:
    """The host's bytes at their most are what all chunk activations that move take at once."""
    work = replace(WORK, global_batch=8)
    plan = replace(PLAIN, chunks=2, offload=100)
    program = lower_training(plan, BIG, work)
    without = lower_training(replace(plan, offload=0), BIG, work)
    for rank in range(plan.pipeline):
        series = memory(program, lambda r, i: 0)[rank]
        less = max(memory(without, lambda r, i: 0)[rank]["device"]) - max(series["device"])
        assert 0 < less <= max(series[HOST]) and series[HOST][-1] == 0


@pytest.mark.parametrize(("name", "chunks"), [("interleaved-1f1b", 2), ("v-half", 2)])
@pytest.mark.parametrize(("model", "choice", "window"), [(OPEN, "uniform", 1), (TIED, "selective", 3)])
def test_moved_activations_give_the_serial_gradients(
    pool: Pool, name: str, chunks: int, model: ModelSpec, choice: str, window: int
) -> None:
    plan = Plan(1, 1, 2, 1, name, chunks, attention="math", offload=50, offload_choice=choice, offload_window=window)
    work = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
    assert any(i.op == "OFFLOAD" for listing in lower_training(plan, model, work).ranks for i in listing)
    assert_equal(pool, model, plan, work)


def test_a_search_that_moves_activations_tries_what_is_free() -> None:
    advice = PricedAdvice(Bounder(Predictor(BIG, WORK, linked(0.5))))
    share, window = advice.moved(PLAIN)
    full = replace(PLAIN, offload=100)
    open_ = Enumeration(Question(BIG, WORK, linked(0.5), 4, {}), advice)
    assert {(p.offload, p.offload_window) for p in open_.eased(full)} == {(50, 2)}
    assert {(p.offload, p.offload_window) for p in open_.widened(full)} == {(share, window), (100, window)}
    assert not open_.widened(PLAIN) and not open_.widened(replace(full, offload_window=window))
    named = Enumeration(Question(BIG, WORK, linked(0.5), 4, {"offload_window": (2,)}), advice)
    assert not named.widened(full)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(offload=120), "offload must be a percentage (found 120; nearest 100)"),
        (Plan(offload=50, offload_choice="long"), "offload_choice 'long' is unknown (nearest selective)"),
        (Plan(offload=100, offload_choice="uniform"),
         "offload_choice uniform needs offload above 0 and below 100 (found 100; nearest 99)"),
        (Plan(offload=50, offload_window=0), "offload_window must be at least 1 compute step (found 0; nearest 1)"),
        (Plan(offload_window=3), "offload_window needs offload above 0 (found 0; nearest window 2)"),
    ],
)  # fmt: skip
def test_what_cannot_be_moved(plan: Plan, message: str) -> None:
    assert why_not(BIG, WORK, plan) == message
