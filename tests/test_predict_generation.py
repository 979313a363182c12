"""What a generation is predicted to take: closed forms, what must grow or shrink, a large model on a shipped file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planners.costs.generate import PassCosts
from autotune.planners.lower.generate import ID, inference_body, lower_generation, pass_sizes
from autotune.planners.lower.shape import generation_shape
from autotune.planners.lower.stage import cut_of, stage_blocks
from autotune.planners.predict import Predictor, predict
from autotune.planners.predict_generation import contexts, predict_generation, weights
from autotune.planners.simulate import memory, simulate
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.errors import InfeasibleError
from autotune.spec.families import load_model
from autotune.spec.graph import kv_bytes_per_token, parameters
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction
from autotune.spec.work import Attention, Memory
from autotune.spec.workload import Workload

MODELS = Path(__file__).parents[1] / "recipes" / "models"
WORK = Workload("generate", prompt_length=1024, new_tokens=256, batch=8)


@pytest.fixture(scope="module")
def llama() -> ModelSpec:
    return load_model(MODELS / "meta-llama--Llama-3.1-8B.json")


@pytest.fixture(scope="module")
def h100() -> Profile:
    return load_profile(shipped()["h100-sxm"])


def together(model: ModelSpec, work: Workload, profile: Profile, plan: Plan) -> Prediction:
    """All sequences of the batch at once."""
    return predict_generation(Predictor(model, work, profile), plan)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 6, 7, 100, 4097])
def test_a_straight_line_is_summed_exactly(new_tokens: int) -> None:
    points = contexts(replace(WORK, new_tokens=new_tokens))
    steps = range(1025, 1024 + new_tokens)
    assert len(points) == min(5, len(steps))
    assert sum(weights(points)) == pytest.approx(len(steps))
    assert sum(w * (3 + 0.25 * k) for w, k in zip(weights(points), points, strict=True)) == pytest.approx(
        sum(3 + 0.25 * k for k in steps)
    )


def test_interpolated_decodes_add_up_to_every_single_one(llama: ModelSpec, h100: Profile) -> None:
    found = together(llama, WORK, h100, Plan())
    predictor = Predictor(llama, WORK, h100)
    bodies = predictor.bodies(Plan())
    total = 0.0
    for keys in range(WORK.prompt_length + 1, WORK.prompt_length + WORK.new_tokens):
        costs = PassCosts(Plan(), llama, WORK, bodies, 1, keys)
        total += simulate(lower_generation(Plan(), llama, WORK, 1, keys), costs).makespan
    assert found.decode_s * (WORK.new_tokens - 1) == pytest.approx(total, rel=2e-3)
    assert found.step_s == pytest.approx(found.prefill_s + total, rel=2e-3)
    assert found.tokens_per_s == pytest.approx(WORK.batch * WORK.new_tokens / found.step_s)
    assert sum(found.breakdown.values()) == pytest.approx(found.step_s, rel=1e-6)
    assert sum(found.grades.values()) == pytest.approx(1)


def test_the_cache_and_the_weights_take_their_bytes(llama: ModelSpec, h100: Profile) -> None:
    found = together(llama, WORK, h100, Plan())
    assert found.memory[0]["weights"] == 2 * parameters(llama)
    assert found.memory[0]["kv_cache"] == 8 * (1024 + 256) * kv_bytes_per_token(llama)
    assert found.peak_bytes == (sum(found.memory[0].values()),)
    for plan in (Plan(tensor=4), Plan(pipeline=4), Plan(data=2, tensor=2), Plan(tensor=2, pipeline=2)):
        parts = together(llama, WORK, h100, plan).memory
        each = found.memory[0]["kv_cache"] // plan.data // plan.tensor
        assert sum(part["kv_cache"] for part in parts) == each


def test_what_a_forward_needs_beside_its_input_and_output(llama: ModelSpec) -> None:
    """The walk over a stage's bodies, one after another, block for block, has the peak that the sizes say."""
    for plan in (Plan(), Plan(tensor=2), Plan(pipeline=4)):
        for queries, keys in ((1024, 1024), (1, 1100)):
            shape = generation_shape(plan, WORK, queries, keys)
            for s, blocks in enumerate(stage_blocks(llama, cut_of(plan, llama))):
                size, most, held = pass_sizes(plan, llama, WORK, queries, keys)[s], 0, 0
                for block in blocks:
                    body = inference_body(block, shape)
                    if block.kind == "head" and queries > 1:
                        rows = WORK.batch * llama.hidden * 2
                        most, held = max(most, held + rows), rows
                    most = max(most, held + max(memory(body.forward, lambda r, i: 0)[0]["device"]))
                    held = body.output_bytes
                assert size.output == held
                assert size.transient == most - held
    assert pass_sizes(Plan(), llama, WORK, 1, 1025)[0].output == WORK.batch * llama.vocab * 2


def test_what_must_grow_and_what_must_shrink(llama: ModelSpec, h100: Profile) -> None:
    whole = together(llama, WORK, h100, Plan())
    longer = together(llama, replace(WORK, prompt_length=8192), h100, Plan())
    assert longer.decode_s > whole.decode_s
    assert longer.prefill_s > 8 * whole.prefill_s * 0.8
    halves = [together(llama, WORK, h100, Plan(tensor=t)) for t in (1, 2, 4, 8)]
    for less, more in zip(halves[1:], halves, strict=False):
        assert less.peak_bytes[0] < more.peak_bytes[0]
        assert less.prefill_s < more.prefill_s
    split = together(llama, WORK, h100, Plan(data=2))
    assert split.step_s < whole.step_s  # half as many sequences a replica
    assert split.tokens_per_s < 2 * whole.tokens_per_s  # the weights are read all the same
    piped = together(llama, WORK, h100, Plan(pipeline=2))
    assert max(piped.peak_bytes) < whole.peak_bytes[0]
    assert piped.breakdown["idle"] > 0.4 * piped.step_s  # one batch: a stage waits while the other works
    assert piped.breakdown["exposed communication"] > 0
    one = together(llama, replace(WORK, new_tokens=1), h100, Plan())
    assert (one.decode_s, one.step_s) == (0.0, one.prefill_s)


def test_a_decoded_token_reads_every_weight_and_the_cache(llama: ModelSpec, h100: Profile) -> None:
    """No faster than memory allows, and on one device not far above what is read and issued."""
    found = together(llama, WORK, h100, Plan())
    read = 2 * (parameters(llama) - llama.vocab * llama.hidden)  # the embedding's rows are looked up
    cache = 8 * 1024 * kv_bytes_per_token(llama)
    floor = (read + cache) / h100.device.memory_bandwidth
    assert floor < found.decode_s < 4 * floor
    assert found.timeline is not None
    assert [i.op for i in found.timeline.program.ranks[0]] == ["F", "COMMIT"]


def test_the_cost_table_prices_what_is_done(llama: ModelSpec, h100: Profile) -> None:
    """Of the parts that only generation has: picking, the way back of the token, appending to the cache."""
    plan = Plan(tensor=2, pipeline=2)
    predictor = Predictor(llama, WORK, h100)
    costs = PassCosts(plan, llama, WORK, predictor.bodies(plan), 1, 1100)
    program = lower_generation(plan, llama, WORK, 1, 1100)
    by_label = {i.label: costs.cost(i) for listing in program.ranks for i in listing}
    assert by_label["1COMMIT0"].sent == 2 * 8 * 8 * 2 // 2  # (value, index) of 8 sequences, to the other rank
    assert by_label["1SEND0>1+0"].sent == 2 * 8 * ID  # how many, and which
    assert by_label["0SEND0>0+1"].sent == 8 * llama.hidden * 2
    seconds, one = predictor.pricer(4).seconds, 8 * llama.kv_heads // 2 * llama.head_dim * 2
    block = stage_blocks(llama, cut_of(Plan(pipeline=2), llama))[1][0]
    body = inference_body(block, costs.shape)
    inside = costs.bodies.price(block, body, body.forward, costs.shape)
    appended = costs.block(block).kinds["memory"] - inside.kinds["memory"]
    assert appended == pytest.approx(2 * seconds(Memory("append", 2 * one)))
    assert inside.kinds["attention"] == pytest.approx(seconds(Attention(8, 1, 1100, 16, 4, 128)))


def test_a_plan_that_cannot_run_is_refused(llama: ModelSpec, h100: Profile) -> None:
    with pytest.raises(InfeasibleError, match="must divide batch 8"):
        predict(llama, WORK, h100, Plan(data=3))


@pytest.mark.alone
def test_a_large_model_on_eight_devices_without_torch() -> None:
    script = f"""
import sys, time
from autotune.planners.predict import predict
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.families import load_model
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
model = load_model({str(MODELS / "meta-llama--Llama-3.1-70B.json")!r})
work = Workload("generate", prompt_length=2048, new_tokens=512, batch=16)
profile = load_profile(shipped()["h100-sxm"])
begin = time.perf_counter()
found = predict(model, work, profile, Plan(tensor=8, micro_batch=16))
print(time.perf_counter() - begin, found.decode_s, max(found.peak_bytes), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    took, decode, peak, torch = done.stdout.split()
    assert float(took) < 1
    assert 0.005 < float(decode) < 0.1
    assert 141e9 / 8 < int(peak) < 80e9
    assert torch == "False"
