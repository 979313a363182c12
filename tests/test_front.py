"""Pareto fronts: on spaces that are simulated whole the front is what no plan dominates, however the search went."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from autotune.planners import search as module
from autotune.planners.feasible import why_not
from autotune.planners.pareto import Archive, Vector, covers, missing, thinned, volume
from autotune.planners.predict import Predictor
from autotune.planners.search import limit_bytes, search
from autotune.planners.space import Enumeration
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.front import knee, preferred
from autotune.spec.model import ModelSpec
from autotune.spec.objectives import OBJECTIVES, Rate, power_of, values
from autotune.spec.prediction import Found, Prediction, Question
from autotune.spec.workload import Workload

H100 = load_profile(MACHINES / "h100-sxm.json")
MODEL = ModelSpec("small", "LlamaForCausalLM", 2048, 8, 16, 8, 128, 5632, 4096)
WORK = Workload(sequence_length=1024, global_batch=8, precision="bf16")
RATES = {"price_per_hour": Rate(3.0, "a test"), "power_watts": Rate(700.0, "a test", True)}
TWO = ("step_time", "peak_memory")
THREE = ("step_time", "peak_memory", "cost")
WORLDS = (1, 2, 4, 8)


def question(seed: int, objectives: tuple[str, ...], tolerance: float = 0.0) -> Question:
    """Some hundred plans, drawn by the seed from the axes; one number of devices for two objectives, four for more."""
    draw = random.Random(seed)
    axes: dict[str, tuple[object, ...]] = {
        "schedule": tuple(draw.sample(("1f1b", "gpipe", "interleaved-1f1b", "zb-h1"), 3)),
        "recompute": ("none", "selective", "full"),
        "zero": tuple(sorted(draw.sample((0, 1, 2, 3), 2 if len(objectives) > 2 else 3))),
        "micro_batch": tuple(sorted(draw.sample((1, 2, 4), 2))),
        "sequence_parallel": (draw.random() < 0.5,),
        "offload": (0, 100),
        "offload_window": (2,),
        "optimizer_offload": (0,),
        "vocabulary": ("ends",),
        "weight_gradients": ("apart",),
        "gather_each": ("step",),
        "layers": ("",),
        "times": ("",),
    }
    model = replace(MODEL, layers=draw.choice((4, 8)))
    worlds = WORLDS if "cost" in objectives or "energy" in objectives else ()
    return Question(
        model, WORK, H100, 8 if worlds else 4, axes, objectives[0], objectives=objectives, tolerance=tolerance,
        worlds=worlds, rates=RATES, memory_fraction=draw.choice((0.025, 0.05, 0.92)), seconds=600, simulate_budget=10**6,
    )  # fmt: skip


def vector_of(asked: Question, found: Prediction) -> Vector:
    return values(asked, found.plan.world, found.step_s, float(max(found.peak_bytes)))


def every(asked: Question) -> list[Vector]:
    """The vectors of all plans of a space that fit, each simulated."""
    predictor = Predictor(asked.model, asked.workload, asked.profile)
    plans = list(Enumeration(asked))
    assert not any(why_not(asked.model, asked.workload, plan) for plan in plans)
    found = [predictor.predict(plan, timeline=False) for plan in plans]
    return [vector_of(asked, p) for p in found if max(p.peak_bytes) <= limit_bytes(asked, p.plan.world)]


def undominated(vectors: Sequence[Vector]) -> set[Vector]:
    """By definition: compared pair by pair."""
    return {v for v in vectors if not any(w != v and all(x <= y for x, y in zip(w, v, strict=True)) for w in vectors)}


def vectors_of(asked: Question, found: Found) -> list[Vector]:
    assert found.front is not None
    return [values(asked, p.plan.world, p.step_s, float(p.peak_bytes)) for p in found.front.points]


# --- the front of a space


@pytest.mark.parametrize("objectives", [TWO, THREE, ("energy", "peak_memory")])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_what_no_simulated_plan_dominates(seed: int, objectives: tuple[str, ...]) -> None:
    asked = question(seed, objectives)
    whole = every(asked)
    found = search(asked)
    front = vectors_of(asked, found)
    assert found.finished and found.front and found.front.missing == 0
    assert set(front) == undominated(whole) and len(front) == len(set(front))
    done = found.simulated + found.front.pruned
    assert done <= found.bounded, "each plan that was bounded is simulated, pruned, or does not fit"
    assert len(whole) <= done and front == sorted(front)


@pytest.mark.parametrize("objectives", [TWO, THREE])
def test_within_a_tolerance_every_plan_is_covered_by_fewer(objectives: tuple[str, ...]) -> None:
    asked = question(1, objectives, tolerance=0.1)
    whole, front = every(asked), vectors_of(asked, search(asked))
    assert all(any(covers(mine, vector, 0.1) for mine in front) for vector in whole)
    assert len(front) < len(undominated(whole))
    for axis in range(len(objectives)):
        assert min(v[axis] for v in front) <= 1.05 * min(v[axis] for v in whole)


def test_bounds_leave_plans_unsimulated() -> None:
    asked = question(2, TWO, tolerance=0.005)
    found = search(asked)
    assert found.front and found.front.pruned > 0 and found.simulated < len(every(asked))


def test_one_objective_that_counts_devices_takes_as_many_as_are_cheapest() -> None:
    asked = question(0, ("cost",))
    whole, found = every(asked), search(asked)
    assert vectors_of(asked, found) == [min(whole)] and found.best.plan.world < 8
    allowed = replace(asked, worlds=(8,))
    assert search(allowed).best.plan.world == 8


def test_a_generation_is_simulated_whole() -> None:
    work = Workload("generate", precision="bf16", prompt_length=256, new_tokens=16, batch=8)
    objectives = ("latency", "peak_memory", "cost")
    asked = replace(question(0, objectives), workload=work, axes={"page": (0,), "decoding": ("plain",)}, devices=4)
    asked = replace(asked, worlds=(1, 2, 4))
    found = search(asked)
    assert set(vectors_of(asked, found)) == undominated(every(asked))
    rate = replace(asked, objectives=("tokens_per_s", "peak_memory"), worlds=())
    best = search(rate).front
    assert best and best.points[0].values[0] == pytest.approx(max(p.values[0] for p in best.points))
    assert best.points[0].values[0] == pytest.approx(work.tokens / best.points[0].step_s)


# --- a search that ends early


def after(calls: int) -> Callable[[], bool]:
    asked = iter(range(calls))
    return lambda: next(asked, None) is None


def test_what_ends_early_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = question(3, TWO)
    choices = Enumeration(asked).choices
    whole = search(asked)
    gaps = []
    for more in (1, 4, 16):
        monkeypatch.setattr(module, "deadline", lambda began, seconds, calls=choices + more: after(calls))
        early = search(asked)
        assert not early.finished and early.front and early.front.missing is not None and early.bound.gap is not None
        gaps.append(early.front.missing)
        # What is missing is at least what the whole front dominates beyond the early one.
        mine, all_of_it = vectors_of(asked, early), vectors_of(asked, whole)
        assert missing(mine, all_of_it) <= early.front.missing + 1e-12
        assert early.bound.step_s <= min(v[0] for v in all_of_it)
    assert 1 > gaps[0] >= gaps[-1] > 0
    monkeypatch.setattr(module, "deadline", lambda began, seconds: after(choices // 2))
    unseen = search(asked)
    assert unseen.front and unseen.front.missing is None and unseen.bound.gap is None


def test_an_interrupt_keeps_what_was_found() -> None:
    def progress(line: str) -> None:
        if line.startswith("simulated") and " 1 on the front" not in line:
            raise KeyboardInterrupt

    found = search(question(3, TWO), progress=progress)
    assert not found.finished and found.front and len(found.front.points) > 1
    assert found.front.missing is not None and found.front.missing > 0


# --- what is locked, and measured


def test_the_first_the_preferred_or_the_knee_is_locked() -> None:
    asked = question(0, TWO)
    for prefer, role in (("", "best step_time"), ("peak_memory", "best peak_memory"), ("knee", "knee")):
        found = search(replace(asked, prefer=prefer))
        assert found.front and role in found.front.locked.roles
        assert found.best.plan == found.front.locked.plan and found.ranking[0].timeline is not None
        on_front = {point.plan for point in found.front.points}
        assert {p.plan for p in found.ranking[: len(on_front)]} == on_front


def test_plans_of_the_front_are_what_is_measured() -> None:
    asked = replace(question(0, TWO), measure_budget=3)
    ran = []

    def measure(plan: object) -> float:
        ran.append(plan)
        return 10.0 - len(ran)  # the last is the fastest

    found = search(asked, measure=measure)
    assert found.front and len(ran) == 3 and set(ran) <= {point.plan for point in found.front.points}
    assert {"best step_time", "best peak_memory"} <= {r for p in found.front.points if p.plan in ran for r in p.roles}
    assert found.best.plan == ran[-1] == found.front.locked.plan
    memory = search(replace(asked, prefer="peak_memory", minimize="peak_memory"), measure=lambda plan: 1.0)
    assert memory.front and "best peak_memory" in memory.front.locked.roles


# --- vectors


def drawn(seed: int, count: int, axes: int) -> list[Vector]:
    draw = random.Random(seed)
    return [tuple(float(draw.randint(1, 30)) for _ in range(axes)) for _ in range(count)]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_archive_keeps_what_nothing_dominates(axes: int) -> None:
    for seed in range(30):
        points = drawn(seed, 60, axes)
        archive = Archive(points)
        assert set(archive.vectors) == undominated(points) and archive.vectors == sorted(archive.vectors)
        for probe in drawn(seed + 1000, 40, axes):
            for tolerance in (0.0, 0.2):
                expected = any(covers(p, probe, tolerance) for p in points)
                assert archive.covered(probe, tolerance) == expected
        for tolerance in (0.0, 0.1, 0.5):
            few = thinned(archive.vectors, tolerance)
            assert set(few) <= set(archive.vectors)
            assert all(any(covers(mine, v, tolerance) for mine in few) for v in points)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_volume_is_the_count_of_the_cells_that_are_dominated(axes: int) -> None:
    for seed in range(12):
        points = [tuple(float(int(x) % 9) for x in point) for point in drawn(seed, 9, axes)]
        cells = [()]
        for _ in range(axes):
            cells = [(*cell, float(n)) for cell in cells for n in range(8)]
        dominated = sum(any(covers(point, cell) for point in points) for cell in cells)
        assert volume(points, (8.0,) * axes) == pytest.approx(dominated)


def test_a_knee_lies_between_the_ends() -> None:
    front = [(1.0, 100.0), (2.0, 20.0), (10.0, 10.0)]
    assert knee(front) == 1 and knee(front[:2]) is None
    assert [preferred(p, TWO, front) for p in ("", "step_time", "peak_memory", "knee")] == [0, 0, 2, 1]


def test_measured_power_goes_before_the_limit() -> None:
    limit = replace(H100, coefficients={"power_limit_watts": 700.0})
    both = replace(H100, coefficients={"power_limit_watts": 700.0, "power_watts": 512.0})
    assert power_of(replace(H100, coefficients={})) is None
    told, measured = power_of(limit), power_of(both)
    assert told and told.most and told.value == 700 and measured and not measured.most and measured.value == 512
    asked = question(0, ("energy", "peak_memory"))
    assert OBJECTIVES["energy"].value(asked, 8, 2.0, 1.0) == 8 * 700 * 2
    assert OBJECTIVES["cost"].value(asked, 8, 3600.0, 1.0) == 8 * 3
