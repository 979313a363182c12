"""The costs of a long context: hand-calculated values, what follows from the size of the cache, and the view."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planners import context_costs as module
from autotune.planners.context_costs import ContextCosts, at_length, context_costs, lengths, options
from autotune.planners.predict import Predictor
from autotune.planners.search import limit_bytes
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.report.context_costs import explain_context
from autotune.spec.model import ModelSpec
from autotune.spec.plan import INT8, Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload
from tests.recipes import RECIPE, Autotune

# Yi-34B (01-ai/Yi-34B-200K), the example of Fu, 2405.08944; on A100s, as there.
MODEL = ModelSpec("yi-34b", "LlamaForCausalLM", 7168, 60, 56, 8, 128, 20480, 64000, max_positions=200_000)
A100 = load_profile(shipped()["a100-sxm-80gb"])
LONG, NEW = 50_000, 250
ASK = Question(MODEL, Workload("generate", precision="bf16", prompt_length=LONG, new_tokens=NEW), A100, 2)
PLAN = Plan(tensor=2)

LAYER = 2 * 7168 * 7168 + 2 * 7168 * 1024 + 3 * 7168 * 20480  # q and o, k and v, the feed-forward
ENDS = 64000 * 7168  # an embedding, and as much again for the head
A_TOKEN = 2 * 60 * 8 * 128 * 2  # bytes: keys and values, layers, heads, width, two bytes each


@pytest.fixture(scope="module")
def costs() -> ContextCosts:
    return context_costs(ASK, PLAN)


def test_the_cache_and_the_peak_times_are_those_by_hand(costs: ContextCosts) -> None:
    assert A_TOKEN == 245_760
    assert costs.kv_bytes == pytest.approx(12.35e9, rel=0.002)  # 50,250 positions
    assert costs.kv_bytes % A_TOKEN == 0 and costs.kv_bytes // A_TOKEN in (LONG + NEW - 1, LONG + NEW)
    weights = 2 * (60 * (LAYER + 2 * 7168) + 2 * ENDS + 7168)
    assert weights == pytest.approx(68.8e9, rel=0.002)
    assert costs.peak.decode_s == pytest.approx((weights + costs.kv_bytes) / 2 / 2.039e12, rel=0.001)
    causal = 4 * 56 * 128 * LONG * (LONG + 1) / 2 * 60
    flops = 2 * 60 * LAYER * LONG + 2 * ENDS + causal  # the head sees the last token alone
    assert costs.peak.prefill_s == pytest.approx(flops / 2 / 312e12, rel=0.01)
    assert costs.peak.users == int((2 * limit_bytes(ASK) - weights) // costs.kv_bytes) == 6


def test_predictions_are_no_better_than_the_peak(costs: ContextCosts) -> None:
    assert costs.prefill_s > costs.peak.prefill_s and costs.decode_s > costs.peak.decode_s
    assert 0 < costs.users <= costs.peak.users
    assert costs.full_s > costs.decode_s


def test_a_switch_is_the_cache_out_and_in(costs: ContextCosts) -> None:
    link = A100.coefficients["host_link_bandwidth"]
    assert costs.switch_s == pytest.approx(2 * costs.kv_bytes / 2 / link, rel=0.05)  # each rank its half at once


def test_users_are_the_most_that_fit(costs: ContextCosts) -> None:
    """One more would not, by the bytes that the programs of the prefill and of the last token hold."""
    allowed = limit_bytes(ASK)

    def need(users: int) -> int:
        first = max(module._peaks(ASK, PLAN, 1, prompt=True)) + (users - 1) * costs.kv_bytes // 2
        return max(first, *module._peaks(ASK, PLAN, users, prompt=False))

    assert need(costs.users) <= allowed < need(costs.users + 1)
    alone = Predictor(MODEL, ASK.workload, A100).predict(PLAN)
    assert need(1) == max(alone.peak_bytes), "as the plan itself is predicted to take"


def test_all_four_follow_the_cache() -> None:
    short, long = at_length(ASK, PLAN, 4096), at_length(ASK, PLAN, LONG)
    assert long == context_costs(ASK, PLAN)
    ratio = long.kv_bytes / short.kv_bytes
    assert ratio == pytest.approx((LONG + NEW) / (4096 + NEW), rel=1e-3)
    assert long.switch_s and short.switch_s and long.switch_s / short.switch_s == pytest.approx(ratio, rel=0.05)
    assert long.prefill_s / short.prefill_s > LONG / 4096, "attention grows with the square"
    assert short.users > (ratio - 2) * long.users and long.decode_s > short.decode_s
    assert short.sessions_h > long.sessions_h
    assert lengths(ASK) == (4096, 8192, 16384, 32768, LONG, 65536, 131072)


def test_what_else_there_could_be() -> None:
    own = context_costs(ASK, PLAN)
    found = {option.changes: option for option in options(ASK, PLAN)}
    wide = found["kv_heads 8 -> 56"]
    assert wide.model and wide.costs.kv_bytes == 7 * own.kv_bytes and wide.costs.users == 0
    half = found["kv_heads 8 -> 4"].costs
    assert half.kv_bytes == own.kv_bytes / 2 and half.users >= 2 * own.users
    near = found["window none -> 4096"].costs
    assert near.decode_s < own.decode_s and near.kv_bytes == own.kv_bytes, "fewer keys are read, all are kept"
    rounded = found[f"weights exact -> {INT8}"]
    assert not rounded.model and rounded.costs.kv_bytes == own.kv_bytes
    assert rounded.costs.users > own.users and rounded.costs.decode_s < own.decode_s
    pipeline = next(option.costs for changes, option in found.items() if "pipeline" in changes)
    assert pipeline.decode_s > own.decode_s and pipeline.kv_bytes == own.kv_bytes
    text = "\n".join(explain_context(PLAN, A100, (own,), own, tuple(found.values())).lines())
    assert "kv_heads 8 -> 56 *" in text and "a search cannot choose it" in text


def test_replicas_each_have_their_users() -> None:
    small = replace(ASK, model=replace(MODEL, layers=6), workload=replace(ASK.workload, prompt_length=4096))
    one, two = context_costs(replace(small, devices=1), Plan()), context_costs(small, Plan(data=2))
    assert two.users == 2 * one.users and two.sessions_h == pytest.approx(2 * one.sessions_h)
    assert (two.prefill_s, two.decode_s, two.kv_bytes) == (one.prefill_s, one.decode_s, one.kv_bytes)


def test_a_processor_s_memory_is_the_host_s() -> None:
    small = replace(MODEL, layers=2)
    inline = replace(A100, device=replace(A100.device, kind="cpu", cores=8))
    work = replace(ASK.workload, prompt_length=512, new_tokens=8)
    found = context_costs(Question(small, work, inline, 1), Plan())
    assert found.switch_s is None and found.users > 0
    lines = explain_context(Plan(), inline, (found,), found, ()).lines()
    assert next(line for line in lines if line.split()[:1] == ["512"]).split()[-2] == "-"


def test_the_view(autotune: Autotune, recipe: str) -> None:
    served = RECIPE.replace('kind = "train"', 'kind = "generate"')
    served = served.replace("sequence_length = 64\nglobal_batch = 8", "prompt_length = 64\nnew_tokens = 8\nbatch = 4")
    served = served.replace('[search]\nrecompute = "none"\nzero = 0', "[search]")
    Path("served.toml").write_text(served)
    raw = autotune("explain", "served.toml", "--pin", "micro_batch=1", "--view", "context", "--json").json
    assert set(raw) == {"schema", "subject", "context", "options"} and raw["schema"] == "autotune.explain/1"
    own = raw["context"]["own"]
    assert own["context"] == 64 and own["users"] > 0 and own in raw["context"]["by_context"]
    assert {option["changes"] for option in raw["options"]["options"]} >= {"kv_heads 2 -> 4", "weights exact -> int8"}
    refused = autotune("explain", recipe, "--pin", "pipeline=2", "--view", "context")
    assert refused.code == 2 and "is of a generation" in refused.stderr
