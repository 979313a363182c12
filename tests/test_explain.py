"""Explanations: what they say of a real prediction, and that each figure follows from what they were given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planners.predict import Predictor
from autotune.planners.search import limit_bytes
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.report.explain import changed, explain_found, explain_prediction, explain_versus, headroom, taken
from autotune.report.units import percent, seconds, size
from autotune.spec.families import load_model
from autotune.spec.machine import Link
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Prediction, Question, Space
from autotune.spec.workload import Workload

MODEL = Path(__file__).parents[1] / "recipes" / "models" / "meta-llama--Llama-3.2-1B.json"
PLANS = (
    Plan(data=2, pipeline=2, micro_batch=1),
    Plan(data=2, pipeline=2, micro_batch=1, recompute="full"),
    Plan(data=4, micro_batch=1, zero=1),
)


@pytest.fixture(scope="module")
def question() -> Question:
    profile = load_profile(shipped()["h100-sxm"])
    return Question(load_model(MODEL), Workload("train", 2048, 16, "bf16"), profile, 4)


@pytest.fixture(scope="module")
def ranking(question: Question) -> tuple[Prediction, ...]:
    predictor = Predictor(question.model, question.workload, question.profile)
    return tuple(sorted((predictor.predict(plan) for plan in PLANS), key=lambda p: p.step_s))


@pytest.fixture(scope="module")
def found(question: Question, ranking: tuple[Prediction, ...]) -> Found:
    reasons = {"memory above what a plan may use": 5, "tensor must divide kv_heads 8 (found 3; nearest 4)": 12}
    bound = Bound(ranking[0].step_s / 1.25, 0.25)
    return Found(question, ranking, bound, Space(40, 23, reasons), 40, 3, {}, True)


def of(prediction: Prediction, **parts: object) -> Prediction:
    return replace(prediction, **parts)  # type: ignore[arg-type]


def test_prediction_says_where_the_time_goes(question: Question, ranking: tuple[Prediction, ...]) -> None:
    best = ranking[0]
    told = explain_prediction(best, question.profile)
    lines, raw = told.lines(), told.to_dict()
    assert raw["schema"] == "autotune.explain/1"
    json.dumps(raw)
    assert seconds(best.step_s) in lines[0] and question.profile.name in lines[0]
    assert raw["time"]["breakdown_s"] == dict(best.breakdown)
    order = list(raw["time"]["breakdown_s"].values())
    assert order == sorted(order, reverse=True)
    kind, value = max(best.breakdown.items(), key=lambda item: item[1])
    row = next(line for line in lines if line.strip().startswith(kind))
    assert seconds(value) in row and percent(value / sum(best.breakdown.values())) in row
    assert best.timeline is not None
    assert raw["time"]["idle_share"] == pytest.approx(best.timeline.idle_share)


def test_critical_path_is_the_predicted_step(question: Question, ranking: tuple[Prediction, ...]) -> None:
    """A simulated step waits for nothing but instructions, so the path's seconds are the makespan."""
    for prediction in ranking:
        path = explain_prediction(prediction, question.profile).to_dict()["critical_path"]
        assert sum(path["seconds"].values()) == pytest.approx(path["makespan_s"])
        assert path["makespan_s"] == pytest.approx(prediction.step_s)


def test_memory_is_compared_with_the_device(question: Question, ranking: tuple[Prediction, ...]) -> None:
    best = ranking[0]
    memory = explain_prediction(best, question.profile).to_dict()["memory"]
    available = question.profile.device.memory_bytes
    assert memory["available_bytes"] == available
    assert memory["ranks"] == [dict(classes) for classes in best.memory]
    assert memory["peak_bytes"] == list(best.peak_bytes)
    whole = [sum(classes.values()) for classes in best.memory]  # peak and overhead
    assert memory["taken_bytes"] == whole == list(taken(best))
    context = question.profile.device.context_bytes
    assert context > 0 and whole == [peak + context for peak in best.peak_bytes]
    assert memory["headroom"] == pytest.approx(1 - max(whole) / available)
    lines = explain_prediction(best, question.profile).lines()
    head = next(line for line in lines if line.split()[:1] == ["rank"])
    assert head.split()[-3:] == ["peak", "overhead", "all"] and set(best.memory[0]) < set(head.split())
    row = lines[lines.index(head) + 1]
    assert size(best.peak_bytes[0]) in row and size(context) in row and size(whole[0]) in row
    assert any(f"leaves {size(available - max(whole))} of {size(available)}" in line for line in lines)
    assert not any("memory binds" in line for line in lines)


def test_memory_binds_by_what_a_rank_takes_overhead_included(
    question: Question, ranking: tuple[Prediction, ...]
) -> None:
    """What is left is exactly what makes the difference: the context alone can make memory bind."""
    best = ranking[0]
    whole = max(taken(best))
    for left, binds in ((0.04, True), (0.06, False)):
        device = replace(question.profile.device, memory_bytes=int(whole / (1 - left)))
        told = explain_prediction(best, replace(question.profile, device=device))
        assert told.to_dict()["memory"]["headroom"] == pytest.approx(left, abs=1e-6)
        assert any("memory binds" in line for line in told.lines()) == binds


def test_a_plan_fits_where_the_search_says_it_fits(question: Question, ranking: tuple[Prediction, ...]) -> None:
    """Peak against the search's limit is overhead and peak against the share that a plan may use."""
    best = ranking[0]
    edge = max(taken(best)) / question.memory_fraction
    for memory_bytes, fits in ((int(edge) + 2, True), (int(edge) - 2, False)):
        profile = replace(question.profile, device=replace(question.profile.device, memory_bytes=memory_bytes))
        asked = replace(question, profile=profile)
        one = Found(asked, (best,), Bound(best.step_s, 0.0), Space(1, 1, {}), 1, 1, {}, True)
        memory = explain_found(one).to_dict()["memory"]
        assert (max(best.peak_bytes) <= limit_bytes(asked)) == fits
        assert (max(memory["taken_bytes"]) <= memory["allowed_bytes"]) == fits


def test_a_cpu_s_memory_is_shared(question: Question, ranking: tuple[Prediction, ...]) -> None:
    device = replace(question.profile.device, kind="cpu", count=2, memory_bytes=1 << 40)
    cpu = replace(question.profile, device=device)
    two = of(ranking[0], plan=Plan(data=2))
    assert headroom(two, cpu)[0] == 1 << 39
    assert headroom(of(two, plan=Plan()), cpu)[0] == 1 << 40
    assert headroom(of(two, plan=Plan(data=4)), replace(cpu, links=cpu.links[:1]))[0] == 1 << 38, "more than measured"


@pytest.mark.parametrize(("kind", "nodes", "sharing"), [("cpu", 1, 8), ("cpu", 2, 2), ("cuda", 1, 1), ("cuda", 2, 1)])
def test_workers_beyond_those_that_were_measured_share_the_memory_too(
    question: Question, kind: str, nodes: int, sharing: int
) -> None:
    """The limits of all workers on one processor never add up to more than it has."""
    device = replace(question.profile.device, kind=kind, count=2, memory_bytes=1 << 40, context_bytes=1 << 30)
    links = (Link("near", 0, 1e9, 1e-6), Link("far", 0, 1e8, 1e-5))[:nodes]
    asked = replace(question, profile=replace(question.profile, device=device, links=links), devices=8)
    assert asked.profile.sharing(8) == sharing
    assert limit_bytes(asked) == int((1 << 40) * asked.memory_fraction / sharing - (1 << 30))


def test_grades_are_told(question: Question, ranking: tuple[Prediction, ...]) -> None:
    mixed = of(ranking[0], grades={"datasheet": 0.25, "measured": 0.75})
    lines = explain_prediction(mixed, question.profile).lines()
    assert any("75.0 % measured, 25.0 % datasheet" in line for line in lines)


def test_generation_has_prefill_and_tokens(question: Question, ranking: tuple[Prediction, ...]) -> None:
    generated = of(ranking[0], timeline=None, prefill_s=0.1, decode_s=0.02)
    told = explain_prediction(generated, question.profile)
    assert any("prefill 100 ms, then 20.0 ms a token" in line for line in told.lines())
    assert "critical_path" not in told.to_dict()


def test_versus_sums_to_the_parts(ranking: tuple[Prediction, ...]) -> None:
    a, b = ranking[0], ranking[1]
    raw = explain_versus(a, b).to_dict()["versus"]
    assert raw["axes"] == {name: list(pair) for name, pair in changed(a.plan, b.plan).items()}
    assert sum(raw["breakdown_s"].values()) == pytest.approx(sum(a.breakdown.values()) - sum(b.breakdown.values()))
    magnitudes = [abs(v) for v in raw["breakdown_s"].values()]
    assert magnitudes == sorted(magnitudes, reverse=True)
    text = "\n".join(explain_versus(a, b).lines())
    assert percent(b.step_s / a.step_s - 1) + " slower" in text
    assert size(max(a.peak_bytes)) in text and size(max(b.peak_bytes)) in text
    back = "\n".join(explain_versus(b, a).lines())
    assert percent(1 - a.step_s / b.step_s) + " faster" in back
    assert "as fast" in "\n".join(explain_versus(a, a).lines())


def test_found_tells_the_whole_story(found: Found) -> None:
    told = explain_found(found)
    raw, text = told.to_dict(), "\n".join(told.lines())
    json.dumps(raw)
    assert raw["answer"]["plan_id"] == found.best.plan.id
    assert raw["versus"]["plan_ids"] == [found.best.plan.id, found.ranking[1].plan.id]
    assert list(raw["space"]["infeasible"].values()) == [12, 5]
    assert "nearest 4" in text and "23 of 40 structures are feasible" in text
    assert "at most 25.0 % above the best" in text and "search is complete" in text
    assert raw["memory"]["allowed_bytes"] == int(0.92 * found.question.profile.device.memory_bytes)


def test_found_knows_what_one_axis_is_worth(found: Found) -> None:
    winner = next(p for p in found.ranking if p.plan == PLANS[0])
    other = next(p for p in found.ranking if p.plan == PLANS[1])
    pair = replace(found, ranking=(winner, other))
    assert explain_found(pair).to_dict()["one_axis"] == {
        "recompute": {"plan_id": other.plan.id, "step_s": other.step_s},
    }
    assert any("recompute none -> full" in line for line in explain_found(pair).lines())


def test_measured_figures_come_first(found: Found) -> None:
    first, second = found.ranking[0].plan.id, found.ranking[1].plan.id
    told = explain_found(replace(found, measured={first: 2.0, second: 2.5}))
    assert told.to_dict()["versus"]["step_s"] == [2.0, 2.5]
    assert any("25.0 % slower (measured)" in line for line in told.lines())
    assert any(line.strip().startswith("measured 2.00 s") for line in told.lines())
    one = explain_found(replace(found, measured={first: 2.0})).to_dict()["versus"]  # never one measured, one predicted
    assert one["step_s"] == [found.ranking[0].step_s, found.ranking[1].step_s]


def test_nothing_feasible_still_says_why(found: Found) -> None:
    told = explain_found(replace(found, ranking=(), space=Space(17, 0, {"memory": 17}), finished=False))
    text = "\n".join(told.lines())
    assert "0 of 17 structures are feasible" in text and "100.0 %)  memory" in text
    assert "stopped before the bound closed" in text
    assert "answer" not in told.to_dict()


def test_many_reasons_are_counted_not_listed(found: Found) -> None:
    reasons = {f"reason {k}": k + 1 for k in range(30)}
    told = explain_found(replace(found, space=Space(600, 135, reasons)))
    lines = [line for line in told.lines() if "reason" in line]
    assert len(lines) == 9
    assert lines[0].endswith("reason 29")
    assert "253  for 22 other reasons" in lines[-1]
    assert sum(told.to_dict()["space"]["infeasible"].values()) == 465
