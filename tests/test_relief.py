"""What a search tries where plans do not fit: activations and optimizer states on the host, under admissible bounds."""

from __future__ import annotations

import random
from dataclasses import replace
from math import gcd

import pytest

from autotune.planners.advice import PricedAdvice
from autotune.planners.alone import LOOKS, Alone
from autotune.planners.bounds import Bounder
from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor, TooLarge, TooSlow
from autotune.planners.schedules import SCHEDULES
from autotune.planners.search import search
from autotune.planners.space import Enumeration
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.model import Experts, ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.recipe_schema import AXES
from autotune.spec.workload import Workload

MODEL = ModelSpec("wide", "LlamaForCausalLM", 1024, 8, 16, 16, 64, 2816, 32000)
EXPERTS = replace(MODEL, architecture="Qwen3MoeForCausalLM", experts=Experts(16, 2, 704))
WORK = Workload(sequence_length=2048, global_batch=16)
H100 = load_profile(MACHINES / "h100-sxm.json")


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_undercuts_its_bounds(seed: int) -> None:
    model = EXPERTS if seed in (2, 5) else MODEL
    draw, predictor = random.Random(seed), Predictor(model, WORK, H100)
    bounder, names, seen = Bounder(predictor), [n for n in SCHEDULES if n not in ("given", "solved")], 0
    while seen < 12:
        plan = Plan(
            draw.choice((1, 2)),
            1,
            draw.choice((1, 2, 4)),
            draw.choice((1, 2)),
            draw.choice(names),
            chunks=draw.choice((1, 2)),
            recompute=draw.choice(("none", "selective", "full")),
            attention="flash",
            zero=draw.choice((0, 1, 2, 3)),
            gathered=draw.choice((0, 0, 1, 2)),
            offload=(away := draw.choice((0, 30, 50, 100))),
            split=draw.choice(("own", "own", "immediate", "fill", "end")),
            offload_choice=draw.choice(("selective", "uniform")) if 0 < away < 100 else "selective",
            offload_window=draw.choice((1, 2, 5)) if away else 2,
            optimizer_offload=(moved := draw.choice((0, 50, 100))),
            optimizer_stride=(stride := draw.choice((0, 1, 2, 5)) if moved else 0),
            optimizer_window=draw.choice((0, 1, 5)) if stride else 0,
            vocabulary=draw.choice(("ends", "vocab-1", "vocab-2")),
            sync=draw.choice(("eager", "eager", "late")),
            gather_each=draw.choice(("step", "step", "step", "unit")),
            weight_gradients=draw.choice(("apart", "apart", "joined")),
        )
        shares = random.Random(plan.digest).choice(((1, 1), (1, 1), (2, 1), (2, 2), (4, 2)))  # drawn apart
        plan = replace(plan, context=shares[0], context_ring=shares[1])
        divided = random.Random(plan.digest).choice((1, 2, 4)) if model is EXPERTS else 1
        plan = replace(plan, expert=gcd(divided, plan.replicas))
        if why_not(model, WORK, plan):
            continue
        seen += 1
        found = predictor.predict(plan)
        assert bounder.time(plan) <= found.step_s * (1 + 1e-9), plan
        least, most = bounder.memory(plan), max(found.peak_bytes)
        assert least <= most, plan
        times, bytes_ = [bounder.time(plan)], list[int]()
        for look in range(LOOKS):
            close = Alone(bounder, most).look(plan, look)
            assert isinstance(close, TooSlow), plan  # no rank alone needs more than the whole
            enough = Alone(bounder, most).look(plan, look, enough=0.0)
            assert isinstance(enough, TooSlow) and enough.seconds <= close.seconds
            small = Alone(bounder, 0).look(plan, look)
            assert isinstance(small, TooLarge) and 0 < small.bytes <= found.peak_bytes[0], plan
            times, bytes_ = [*times, close.seconds], [*bytes_, small.bytes]
        assert max(times) <= found.step_s * (1 + 1e-9) and times[0] == min(times), plan
        # What many plans share weighs as much as their own lists until they are updated.
        assert bytes_[0] <= bytes_[1], plan


def test_a_rank_alone_sees_copies_that_compute_waits_for() -> None:
    """Slow links to the host: the sums of a rank do not know that its copies hold up its compute, its list does."""
    slow = {k: v / 30 if k.startswith("host_link") else v for k, v in H100.coefficients.items()}
    predictor = Predictor(MODEL, WORK, replace(H100, coefficients=slow))
    bounder, plan = Bounder(predictor), Plan(pipeline=4, attention="flash", offload=100)
    step = predictor.predict(plan).step_s
    for look in range(LOOKS):
        close = Alone(bounder, 10**12).look(plan, look)
        assert isinstance(close, TooSlow) and 1.2 * bounder.time(plan) < close.seconds <= step


def test_a_sketch_that_is_kept_is_each_plan_s_own() -> None:
    """Plans that share sketches are bounded as if each were the first."""
    predictor, kept = Predictor(MODEL, WORK, H100), Alone(Bounder(Predictor(MODEL, WORK, H100)), 0)
    plain = Plan(2, 1, 4, 1, "interleaved-1f1b", chunks=2, attention="flash", vocabulary="vocab-2")
    others = [
        {},
        {"zero": 3, "gathered": 1},
        {"zero": 2},
        {"recompute": "full"},
        {"zero": 3},
        {"optimizer_offload": 100},
    ]
    for axes in [{"offload": moved, **each} for each in others for moved in (0, 100)]:
        plan = plain.altered(**axes)
        assert kept.look(plan, 0) == Alone(Bounder(predictor), 0).look(plan, 0)
    assert len(kept._known) == 2  # of the first rank, with and without moves


@pytest.mark.parametrize("seed", range(3))
def test_an_attempt_is_the_prediction_or_says_at_which_stage_it_was_left(seed: int) -> None:
    predictor = Predictor(MODEL, WORK, H100)
    plan = Plan(1, 1, 4, 1 + seed % 2, attention="flash", offload=50 * seed)
    whole = predictor.predict(plan)
    most = max(whole.peak_bytes)
    assert predictor.attempt(plan, most, whole.step_s * (1 + 1e-12)) == replace(whole, timeline=None)
    assert predictor.attempt(plan, most - 1) == TooLarge(plan, most)
    assert predictor.attempt(plan, most, whole.step_s) == TooSlow(plan, whole.step_s)


def question(gigabytes: float, **axes: tuple[object, ...]) -> Question:
    """Two H100 with this much memory each, for a model whose states alone take 2.3 GB a half of the layers."""
    device = replace(H100.device, memory_bytes=int(gigabytes * 1e9) + H100.device.context_bytes)
    profile = replace(H100, device=device)
    fixed: dict[str, tuple[object, ...]] = {"schedule": ("1f1b",), "pipeline": (2,), "vocabulary": ("ends",)}
    return Question(MODEL, WORK, profile, 2, {**fixed, **axes}, memory_fraction=1.0)


def test_what_fits_is_not_moved() -> None:
    assert all(not p.plan.offload and not p.plan.optimizer_offload for p in search(question(80)).ranking)


def test_what_does_not_fit_moves_to_the_host() -> None:
    """Least memory that needs no move, less one byte's worth of room: the search answers with a plan that moves."""
    whole = search(replace(question(80), minimize="peak_memory", axes={**question(80).axes, "offload": (0,),
                                                                       "optimizer_offload": (0,)}))  # fmt: skip
    least = max(whole.ranking[0].peak_bytes)
    found = search(question(0.98 * least / 1e9)).ranking
    assert found and all(p.plan.offload or p.plan.optimizer_offload for p in found)
    assert all(max(p.peak_bytes) < least for p in found)


def test_a_recipe_that_names_the_axes_is_obeyed() -> None:
    small = question(1, offload=(0,), optimizer_offload=(0,))
    space = Enumeration(small, PricedAdvice(Bounder(Predictor(MODEL, WORK, small.profile))))
    assert space.relieved(Plan(pipeline=2)) == () and space.eased(Plan(pipeline=2, offload=100)) == ()
    open_ = Enumeration(question(1), PricedAdvice(Bounder(Predictor(MODEL, WORK, small.profile))))
    moved = {(p.offload, p.optimizer_offload) for p in open_.relieved(Plan(pipeline=2))}
    assert moved == {(100, 0), (0, 100)}
    assert {p.optimizer_offload for p in open_.relieved(Plan(pipeline=2, offload=100))} == {100}


def test_what_may_be_left_out_counts_from_nothing() -> None:
    assert AXES["offload"].values([0, 50]) == (0, 50) and AXES["limit"].values({"min": 0, "max": 2}) == (0, 1, 2)
    assert AXES["tensor"].expected_one == "a whole number from 1"
    assert AXES["optimizer_stride"].expected_one == "a whole number from 0"
