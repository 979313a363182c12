"""Steps along the axes: which plans they are, what is said of each, and that an optimum has none that is faster."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.predict import Predictor
from autotune.planners.search import search
from autotune.planners.sensitivity import Sensitivity, sensitivity
from autotune.planners.space import MESH
from autotune.planners.steps import beside, refused, steps
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.report.explain import changed
from autotune.report.sensitivity import sensitivity_section
from autotune.report.units import signed
from autotune.spec.families import load_model
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Acceptance, Workload
from tests.recipes import Autotune

MODEL = load_model(Path(__file__).parents[1] / "recipes" / "models" / "meta-llama--Llama-3.2-1B.json")
PROFILE = load_profile(shipped()["h100-sxm"])
TRAIN = Question(MODEL, Workload("train", 2048, 16, "bf16"), PROFILE, 4)
PLAN = Plan(data=2, pipeline=2, micro_batch=2)


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return sensitivity(TRAIN, Predictor(MODEL, TRAIN.workload, PROFILE).predict(PLAN))


def test_a_step_is_the_next_number_or_any_other_name() -> None:
    assert beside((8, 1, 4, 2), 2) == (1, 4)
    assert beside((1, 2, 4), 1) == (2,) and beside((1, 2, 4), 4) == (2,) and beside((4,), 4) == ()
    assert beside((0, 50, 100), 30) == (0, 50)  # a value that the space does not have lies between two that it has
    assert beside((False, True), False) == (True,)
    assert beside(("none", "selective", "full"), "selective") == ("none", "full")


def test_the_degrees_of_the_mesh_keep_the_devices(found: Sensitivity) -> None:
    """One that grows is paid for by one that shrinks, and by nothing else."""
    moved = [m.plan for m in found.moved if any(getattr(m.plan, axis) != getattr(PLAN, axis) for axis in MESH)]
    meshes = {tuple(getattr(plan, axis) for axis in MESH) for plan in moved}
    assert meshes == {(1, 2, 2, 1), (1, 1, 4, 1), (2, 2, 1, 1), (4, 1, 1, 1)}
    assert len(moved) == len(meshes) and all(plan.world == TRAIN.devices for plan in moved)


def test_each_step_is_one_plan_and_predicted_as_it_would_be_alone(found: Sensitivity) -> None:
    plans = [moved.plan for moved in found.moved]
    assert len(set(plans)) == len(plans) and PLAN not in plans
    predictor = Predictor(MODEL, TRAIN.workload, PROFILE)
    for moved in found.moved:
        if moved.prediction is None:
            assert moved.reason == refused(TRAIN, moved.plan)
            continue
        alone = predictor.predict(moved.plan, timeline=False)
        assert (moved.prediction.step_s, moved.prediction.peak_bytes) == (alone.step_s, alone.peak_bytes)
    assert {m.axis for m in found.moved} >= {
        "data",
        "tensor",
        "micro_batch",
        "schedule",
        "recompute",
        "zero",
        "offload",
    }


def test_other_axes_stay_unless_they_cannot(found: Sensitivity) -> None:
    """Of a schedule of two chunks the chunks come with it; of one that runs as it is, nothing does."""
    schedules = {m.plan.schedule: changed(PLAN, m.plan) for m in found.moved if m.axis == "schedule" and m.prediction}
    assert set(schedules["gpipe"]) == {"schedule"} and set(schedules["interleaved-1f1b"]) == {"schedule", "chunks"}
    cut = replace(TRAIN, devices=8)
    uneven = Plan(data=2, pipeline=4, layers="5,4,4,3")
    wider = [s.plan for s in steps(cut, uneven) if s.plan.pipeline == 8]
    assert wider and all(plan.layers == "" for plan in wider), "the cut of four stages is none of eight"


def test_steps_that_make_no_difference_are_none() -> None:
    """One rank alone has no bubble: no other order of its micro-batches is a step."""
    alone = replace(TRAIN, devices=1)
    assert not [step for step in steps(alone, Plan(micro_batch=2)) if step.plan.schedule != "1f1b"]


def test_the_recipe_may_offer_less_or_more_than_the_space() -> None:
    asked = replace(TRAIN, axes={"recompute": ("none",), "sync": ("eager", "late")})
    by_axis = {step.axis: step for step in steps(asked, PLAN)}
    assert not by_axis["recompute"].offered and by_axis["micro_batch"].offered
    assert by_axis["sync"].plan.sync == "late" and by_axis["sync"].offered
    assert "sync" not in {step.axis for step in steps(TRAIN, PLAN)}, "what the space alone does not offer"


def test_what_does_not_fit_says_so_and_keeps_its_figures() -> None:
    base = Predictor(MODEL, TRAIN.workload, PROFILE).predict(PLAN)
    room = int(1.02 * max(base.peak_bytes))
    device = replace(PROFILE.device, memory_bytes=int((room + PROFILE.device.context_bytes) / TRAIN.memory_fraction))
    tight = sensitivity(replace(TRAIN, profile=replace(PROFILE, device=device)), base)
    larger = next(m for m in tight.moved if m.plan == PLAN.altered(micro_batch=4))
    assert larger.reason and "memory of a device" in larger.reason
    assert larger.prediction and max(larger.prediction.peak_bytes) > room
    order = [(m.prediction is None, m.reason is not None) for m in tight.moved]
    assert order == sorted(order)


@pytest.mark.parametrize("axes", [{}, {"schedule": ("1f1b", "interleaved-1f1b"), "recompute": ("none", "full")}])
def test_no_step_that_the_search_could_take_is_faster_than_its_answer(axes: dict[str, tuple[object, ...]]) -> None:
    question = replace(TRAIN, axes=axes)
    answer = search(question)
    assert answer.finished
    around = sensitivity(question, answer.best)
    faster = [m for m in around.moved if m.offered and m.prediction and not m.reason]
    assert faster and min(m.prediction.step_s for m in faster if m.prediction) >= answer.best.step_s * (1 - 1e-9)


def test_generation_steps_through_its_own_axes() -> None:
    known = (Acceptance("ngram match=2", (0.6, 0.5, 0.4, 0.3)),)
    workload = Workload("generate", precision="bf16", prompt_length=512, new_tokens=64, batch=4, acceptance=known)
    question = Question(MODEL, workload, PROFILE, 2)
    plan = Plan(data=2, micro_batch=2)
    predictor = Predictor(MODEL, workload, PROFILE)
    advice = PricedAdvice(Bounder(predictor))
    found = {s.axis: s for s in steps(question, plan, advice) if not s.reason}
    assert {"data", "micro_batch", "kernels", "decoding"} <= set(found)
    assert found["decoding"].plan.decoding == "ngram" and found["decoding"].plan.speculate > 0
    assert not set(found) & {"schedule", "recompute", "zero"}


def test_the_section_has_every_step(found: Sensitivity) -> None:
    section = sensitivity_section(found)
    raw = json.loads(json.dumps(dict(section.facts)))
    assert raw["plan_id"] == PLAN.id and len(raw["steps"]) == len(found.moved)
    assert set(raw["still"]).isdisjoint({step["axis"] for step in raw["steps"]})
    assert set(raw["still"]) < {f.name for f in fields(Plan)}
    lines = "\n".join(section.text)
    for moved, told in zip(found.moved, raw["steps"], strict=True):
        assert told["fits"] == (moved.reason is None) and (told["reason"] or "") in lines
        if moved.prediction:
            assert told["change"] == pytest.approx(moved.prediction.step_s / found.base.step_s - 1)
            assert moved.reason or signed(told["change"]) in lines


def test_explain_shows_it_when_asked(autotune: Autotune, recipe: str) -> None:
    pins = ("--pin", "pipeline=2", "--pin", "micro_batch=2")
    plain = autotune("explain", recipe, *pins, "--json").json
    assert "sensitivity" not in plain
    raw = autotune("explain", recipe, *pins, "--sensitivity", "--json").json
    assert raw["schema"] == "autotune.explain/1" and raw["sensitivity"]["step_s"] == pytest.approx(
        raw["time"]["step_s"]
    )
    assert any(not step["offered"] for step in raw["sensitivity"]["steps"]), "the recipe pins recompute"
    both = autotune("explain", recipe, *pins, "--sensitivity", "--versus", raw["sensitivity"]["plan_id"])
    assert both.code == 2 and "drop one of them" in both.stderr
