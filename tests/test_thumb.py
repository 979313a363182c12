"""The rule of thumb: the plan it writes is the first that fits on its own way, and what is gained over it is what runs
and predictions of both say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.cli._target import Target, pinned
from autotune.cli._thumb import measured_pair
from autotune.planners.predict import Predictor
from autotune.planners.search import limit_bytes
from autotune.planners.thumb import POLICIES, degrees, rule_of_thumb
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.profiles_db.store import Store
from autotune.report.thumb import Measured, pins, thumb_section
from autotune.spec.families import load_model
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload
from tests.recipes import Autotune

MODELS = Path(__file__).parents[1] / "recipes" / "models"
SMALL = load_model(MODELS / "meta-llama--Llama-3.2-1B.json")
LARGE = load_model(MODELS / "meta-llama--Llama-3.1-70B.json")
SPARSE = load_model(MODELS / "Qwen--Qwen3-30B-A3B.json")
PROFILE = load_profile(shipped()["h100-sxm"])
WORK = Workload("train", 4096, 64, "bf16")
ASK = Workload("generate", precision="bf16", prompt_length=1024, new_tokens=128, batch=16)


def peak(question: Question, plan: Plan) -> int:
    predictor = Predictor(question.model, question.workload, question.profile)
    return max(predictor.predict(plan, timeline=False).peak_bytes)


def with_room(question: Question, room: int) -> Question:
    """The question on devices that leave a plan so many bytes."""
    whole = -(-(room + PROFILE.device.context_bytes) // question.memory_fraction) + 1
    device = replace(PROFILE.device, memory_bytes=int(whole))
    found = replace(question, profile=replace(PROFILE, device=device))
    assert room <= limit_bytes(found) <= room + 2
    return found


def test_degrees_fill_a_node_before_there_are_stages() -> None:
    assert list(degrees(Question(LARGE, WORK, PROFILE, 64))) == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8)]
    four_heads = Question(SPARSE, WORK, PROFILE, 16)  # four heads of keys and values
    assert list(degrees(four_heads)) == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)]


def test_a_model_that_fits_is_trained_by_data_alone_in_the_largest_micro_batches() -> None:
    question = Question(SMALL, WORK, PROFILE, 4)
    plan = rule_of_thumb(question)
    assert plan is not None and (plan.data, plan.tensor, plan.pipeline, plan.zero) == (4, 1, 1, 1)
    assert peak(question, plan) <= limit_bytes(question)
    twice = plan.altered(micro_batch=2 * plan.micro_batch)
    assert WORK.global_batch % (4 * twice.micro_batch) == 0 and peak(question, twice) > limit_bytes(question)


def test_a_large_model_takes_the_fewest_ranks_that_hold_it() -> None:
    question = Question(LARGE, replace(WORK, global_batch=512), PROFILE, 64)
    plan = rule_of_thumb(question)
    assert plan is not None and plan.tensor == PROFILE.device.count and plan.pipeline > 1 and plan.micro_batch == 1
    assert plan.world == 64 and plan.sequence_parallel and plan.schedule == "1f1b"
    assert peak(question, plan) <= limit_bytes(question)
    for tensor, pipeline in degrees(question):
        if (tensor, pipeline) == (plan.tensor, plan.pipeline):
            break
        data = 64 // (tensor * pipeline)
        for recompute in POLICIES[0]:
            before = plan.altered(data=data, tensor=tensor, pipeline=pipeline, recompute=recompute)
            before = before.altered(sequence_parallel=tensor > 1)
            assert peak(question, before) > limit_bytes(question)


def test_recompute_is_what_room_asks_for() -> None:
    question = Question(SMALL, WORK, PROFILE, 1)
    bare = Plan()
    peaks = {policy: peak(question, bare.altered(recompute=policy)) for policy in ("none", "selective", "full")}
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    for policy, room in peaks.items():
        plan = rule_of_thumb(with_room(question, room))
        assert plan == bare.altered(recompute=policy)
    assert rule_of_thumb(with_room(question, peaks["full"] - 2**20)) is None


def test_experts_are_divided_within_a_node() -> None:
    question = Question(SPARSE, WORK, replace(PROFILE, device=replace(PROFILE.device, memory_bytes=2**38)), 16)
    plan = rule_of_thumb(question)
    assert plan is not None and (plan.tensor, plan.data, plan.expert) == (1, 16, 8)


def test_generation_takes_the_whole_batch_on_the_fewest_ranks() -> None:
    question = Question(SMALL, ASK, PROFILE, 2)
    assert rule_of_thumb(question) == Plan(data=2, micro_batch=8)
    alone = replace(question, workload=replace(ASK, batch=1))
    assert rule_of_thumb(alone) == Plan(tensor=2), "one sequence is not shared by two replicas"
    large = replace(question, model=LARGE, devices=8)
    plan = rule_of_thumb(large)
    assert plan is not None and plan.tensor > 1 and plan.data * plan.micro_batch == ASK.batch
    half = plan.altered(tensor=plan.tensor // 2, data=plan.data * 2, micro_batch=max(1, plan.micro_batch // 2))
    assert peak(large, half) > limit_bytes(large)
    less = with_room(replace(question, devices=1), peak(question, Plan(micro_batch=4)))
    assert rule_of_thumb(less) == Plan(micro_batch=4), "not all at a time where the cache has no room"


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(data=2, tensor=2, sequence_parallel=True, zero=1), Plan(micro_batch=8, recompute="selective")]
)
def test_the_pins_make_the_plan(plan: Plan) -> None:
    words = pins(plan).split()
    assert words[::2] == ["--pin"] * (len(words) // 2) and words
    assert pinned(words[1::2], plan.world) == plan


# --- what was measured

CHOSEN, THUMB = Plan(data=2, micro_batch=4), Plan(data=2, micro_batch=8, zero=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "plans.db") as opened:
        yield opened


def run_of(store: Store, plan: Plan, *seconds: float, profile: Profile = PROFILE, work: Workload = WORK) -> None:
    run = store.start_run(plan, SMALL, work, machine=profile.fingerprint)
    store.add_launch(run, seconds)
    store.finish_run(run)


def test_runs_of_both_plans_on_that_machine_tell_the_gain(store: Store) -> None:
    target = Target(CHOSEN.id, CHOSEN, SMALL, WORK, 2, PROFILE)
    none = measured_pair(target, THUMB, store)
    assert none.gain is None and "either plan" in none.source and f"autotune run {CHOSEN.id}" in none.source
    run_of(store, CHOSEN, 1.0, 1.0, 4.0)
    one = measured_pair(target, THUMB, store)
    assert (one.step_s, one.thumb_s, one.gain) == (1.0, None, None)
    assert "the rule's plan" in one.source and f"`autotune run RECIPE {pins(THUMB)}`" in one.source
    run_of(store, THUMB, 9.0, profile=replace(PROFILE, fingerprint="another machine"))
    run_of(store, THUMB, 9.0, work=replace(WORK, global_batch=128))
    assert measured_pair(target, THUMB, store).gain is None
    run_of(store, THUMB, 1.25)
    both = measured_pair(target, THUMB, store)
    assert both.gain == pytest.approx(0.25) and both.source == "the newest run of each"


def test_the_section_says_what_is_gained_and_what_is_not_known() -> None:
    question = Question(SMALL, WORK, PROFILE, 2)
    predictor = Predictor(SMALL, WORK, PROFILE)
    chosen, thumb = predictor.predict(CHOSEN), predictor.predict(THUMB)
    told = thumb_section("the rule", chosen, thumb, Measured(1.0, 1.25, "by the search"))
    assert told.facts["gain"] == pytest.approx(thumb.step_s / chosen.step_s - 1)
    assert told.facts["measured_gain"] == pytest.approx(0.25)
    assert any("measured gain: 25.0 % faster" in line for line in told.text)
    slower = thumb_section("the rule", thumb, chosen, Measured(1.25, 1.0, "by the search"))
    assert any("measured gain: none, it is 25.0 % slower" in line for line in slower.text)
    same = thumb_section("the rule", chosen, chosen, Measured(1.0, 1.0, "by the search"))
    assert any("this very plan" in line for line in same.text) and same.facts["gain"] == 0
    nothing = thumb_section("the rule", chosen, None, Measured(None, None, ""))
    assert nothing.facts["plan_id"] is None and question.devices == 2


def test_explain_says_it_of_a_lock(autotune: Autotune, recipe: str) -> None:
    found = autotune("search", recipe, "--json").json
    raw = autotune("explain", recipe, "--json").json["rule_of_thumb"]
    simulated = autotune("simulate", recipe, *pins(Plan(**raw["plan"])).split(), "--json").json
    assert simulated["plan_id"] == raw["plan_id"]
    gain = simulated["predicted"]["step_s"] / found["predicted"]["step_s"] - 1
    assert raw["gain"] == pytest.approx(gain) and raw["measured_gain"] is None
    assert "no run of either plan" in raw["measured_source"]
