"""Weights rounded to 8 bits: rounded as plain torch does, the same tokens as the emulation under every plan, and bytes
as predicted; such a plan says everywhere that it changes results."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from autotune.cli._views import run_lines
from autotune.planners.costs.generate import PassCosts
from autotune.planners.costs.price import Pricer
from autotune.planners.costs.works import works
from autotune.planners.feasible import why_not
from autotune.planners.lower.call import Site
from autotune.planners.lower.expand import expand
from autotune.planners.lower.generate import inference_body, lower_generation, program_sizes
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.workspace import widened
from autotune.planners.predict import Predictor
from autotune.planners.simulate import memory
from autotune.planners.space import axis_values
from autotune.profiles_db.profile_file import from_dict, load_profile, shipped, to_dict
from autotune.runners.bench_parts import PassPiece
from autotune.runners.bench_pass import time_pass
from autotune.runners.emulated import EMULATIONS, rounded_and_back
from autotune.runners.memory import peak_during
from autotune.runners.prompts import Prompts
from autotune.runners.reference import reference_generate
from autotune.runners.rounded import Rounded, round_rows
from autotune.spec.families import load_model
from autotune.spec.graph import Weight, blocks, parameters
from autotune.spec.int8_graph import OP, rounded
from autotune.spec.machine import Sample
from autotune.spec.model import Experts
from autotune.spec.plan import CHANGES, EXACT, FUSED, INT8, Plan
from autotune.spec.prediction import Question
from autotune.spec.work import Matmul, Memory
from tests.commands import Inside
from tests.pool import Pool
from tests.small import GENERATE
from tests.tasks import lively_weight, random_prompts
from tests.test_generation import LLAMA, MODELS, QWEN, WORK, build, lively

ROUNDED = Plan(weights=INT8)
LONG = replace(WORK, new_tokens=24)  # long enough for some answers to differ from the exact model's
SHIPPED = Path(__file__).parents[1] / "recipes" / "models"
CASES = [
    ("llama", ROUNDED, "fp64"),
    ("qwen", ROUNDED.altered(attention="math"), "fp32"),
    ("qwen", ROUNDED.altered(kernels=FUSED), "fp64"),
    ("llama", ROUNDED.altered(data=2), "fp32"),
    ("llama", ROUNDED.altered(tensor=2), "fp64"),
    ("qwen", ROUNDED.altered(tensor=4), "fp64"),
    ("qwen", ROUNDED.altered(pipeline=2), "fp32"),
    ("llama", ROUNDED.altered(tensor=2, pipeline=2, prompt_chunk=3), "fp64"),
    ("window", ROUNDED.altered(tensor=2, pipeline=2, kernels=FUSED), "fp64"),
]


@lru_cache
def expected(name: str, precision: str, weights: str = INT8) -> list[list[int]]:
    """The tokens of the reference with emulated weights."""
    model = MODELS[name]
    prompts = random_prompts(LONG, model.vocab)
    whole = EMULATIONS[weights](model, lively(model, precision))
    return reference_generate(model, whole, prompts, LONG.new_tokens, torch.float64).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "plan", "precision"), CASES, ids=lambda case: getattr(case, "describe", lambda: case)()
)
def test_a_plan_generates_the_emulations_tokens(pool: Pool, name: str, plan: Plan, precision: str) -> None:
    work = replace(LONG, precision=precision)
    answers = pool.run("generate", plan.world, plan=plan, model=MODELS[name], workload=work)
    passes = (work.prompt_length,) * 2, (1, work.prompt_length + work.new_tokens - 1)
    for rank, answer in enumerate(answers):
        assert answer["tokens"] == expected(name, precision)
        for (order, held), (queries, keys) in zip(answer["traces"], passes, strict=True):
            program = expand(lower_generation(plan, MODELS[name], work, queries, keys), plan)
            assert order == [i.label for i in program.ranks[rank]]
            assert held == memory(program, lambda rank, i: 0)[rank]["device"]


def test_rounding_makes_a_difference() -> None:
    """Otherwise the cases above would say nothing."""
    for name in MODELS:
        assert expected(name, "fp64") != expected(name, "fp64", EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rounding_is_that_of_plain_torch(dtype: torch.dtype) -> None:
    """Bit by bit: whole numbers, scales, what they multiply back to; rows of zeros, of one sign, and halves."""
    torch.manual_seed(1)
    weight = torch.randn(300, 70).to(dtype)
    weight[3], weight[4] = 0, -weight[4].abs()
    weight[5] = torch.linspace(-127, 127, 70).to(dtype).round() + 0.5
    weight[5, 0] = 127
    made, scales = (
        torch.empty(300, 70, dtype=torch.int8),
        torch.empty(300, dtype=torch.promote_types(dtype, torch.float32)),
    )
    round_rows(weight, made, scales)
    wide = weight.to(scales.dtype)
    top = wide.abs().amax(1)
    wanted = torch.where(top > 0, top, 1) / 127
    assert torch.equal(scales, wanted)
    assert torch.equal(made, torch.round(wide / wanted[:, None]).to(torch.int8))
    assert torch.equal(made * scales[:, None], rounded_and_back(weight))
    assert int(made.abs().max()) == 127 and not made[3].any()
    assert float((made * scales[:, None] - wide).abs().max()) <= float(scales.max()) / 2 * (1 + 1e-6)


def test_a_rows_scale_is_the_whole_rows_where_ranks_share_its_inputs() -> None:
    """The shards' largest magnitudes are reduced, so that any number of ranks rounds to the same numbers."""
    torch.manual_seed(2)
    weight = torch.randn(24, 32)
    whole, scales = torch.empty(24, 32, dtype=torch.int8), torch.empty(24)
    round_rows(weight, whole, scales)
    for part, of in zip(weight.chunk(2, 1), whole.chunk(2, 1), strict=True):
        made, own = torch.empty(24, 16, dtype=torch.int8), torch.empty(24)
        round_rows(part, made, own, lambda top, how: torch.maximum(top, weight.abs().amax(1)))
        assert torch.equal(made, of) and torch.equal(own, scales)


def test_layers_alone_are_rounded() -> None:
    embed, layer, head = (rounded(blocks(QWEN)[i]) for i in (0, 1, -1))
    assert [node.op for node in layer.nodes].count(OP) == 4
    assert OP not in {node.op for block in (embed, head) for node in block.nodes}
    assert [w.form for w in layer.nodes[1].weights] == ["int8", "scale", ""]  # a bias stays


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("plan", [ROUNDED, ROUNDED.altered(kernels=FUSED)], ids=["library", "fused"])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_peak_is_as_predicted(name: str, plan: Plan, precision: str) -> None:
    """All that is allocated in a whole generation, byte by byte: of a rounded weight some rows are wide at a time."""
    model, work = MODELS[name], replace(WORK, precision=precision, batch=2)
    prompts = Prompts(random_prompts(work, model.vocab), (work.prompt_length,) * 2)
    with torch.no_grad():  # as workers run
        generator = build(model, work, plan)
        found = peak_during(lambda: generator.generate(prompts), generator.values, torch.device("cpu"))
    most = 0
    for queries, keys in ((7, 7), (1, 12)):
        sizes = program_sizes(plan, model, work, queries, keys, Site("cpu"))
        program = lower_generation(plan, model, work, queries, keys)
        held = memory(program, lambda rank, i, of=sizes: of[0][0].transient if i.op == "F" else 0)  # type: ignore[misc]
        most = max(most, *held[0]["device"])
    assert found == most


def test_a_weight_is_there_twice_one_at_a_time() -> None:
    """The peak while weights are loaded: those that are kept, one whole one, and its rows while they are divided."""
    model = replace(LLAMA, hidden=64, ffn=256, layers=6)
    layers = tuple(rounded(block) for block in blocks(model) if block.kind == "layer")
    largest = max(w.size for w in layers[0].weights())

    def load(index: int, weight: Weight) -> torch.Tensor:
        return torch.randn(weight.shape)

    where = {"precision": "fp32", "tensor_size": 1, "device": torch.device("cpu")}
    held = Rounded.build(layers, load, **where)  # type: ignore[arg-type]
    kept = held.weight.nbytes + held.scale.nbytes
    peak = peak_during(lambda: Rounded.build(layers, load, **where), {}, torch.device("cpu"))  # type: ignore[arg-type]
    assert kept < peak <= kept + 3 * 4 * largest + 4096
    assert kept < 0.3 * 4 * sum(w.size for block in layers for w in block.weights())


def test_what_is_priced() -> None:
    """Half of bf16's bytes; with more tokens than are multiplied as the weight lies also what widening it takes."""
    model, profile = load_model(SHIPPED / "meta-llama--Llama-3.1-8B.json"), load_profile(shipped()["h200-sxm"])
    work = replace(WORK, precision="bf16", prompt_length=512, new_tokens=64, batch=1)
    found = {
        p: Predictor(model, work, profile).predict(p) for p in (Plan(kernels=FUSED), Plan(kernels=FUSED, weights=INT8))
    }
    exact, ours = found.values()
    layers = 2 * (parameters(model) - 2 * model.vocab * model.hidden)
    small = 2 * 2 * model.vocab * model.hidden
    assert exact.memory[0]["weights"] == layers + small
    assert small + layers // 2 < ours.memory[0]["weights"] < small + layers // 2 * 1.002
    read = (small // 2 + layers // 2) / (small // 2 + layers)
    assert read < ours.decode_s / exact.decode_s < read * 1.1
    assert ours.prefill_s > exact.prefill_s  # weights are widened first
    few, many = (Matmul(m, 4096, 4096, "bf16", "int8") for m in (16, 17))
    assert few.bytes == 16 * 4096 * 2 * 2 + 4096**2
    pricer = Pricer(replace(profile, samples=()))
    assert pricer.seconds(many) > pricer.seconds(few) + 4 * 4096**2 / profile.device.memory_bandwidth


def test_where_a_weight_is_widened() -> None:
    node = next(n for n in rounded(blocks(LLAMA)[1]).nodes if n.op == OP)
    whole = node.weights[0].size
    one, many = Shape(1, 1, 9), Shape(17, 1, 9)
    assert widened(node, one, Site("cuda")) == 0 and widened(node, many, Site("cuda")) == 2 * whole
    assert widened(node, replace(one, dtype="fp64"), Site("cuda")) == 8 * whole  # no kernel computes in fp64
    assert widened(node, replace(one, dtype="fp32"), Site("cpu")) == 4 * whole


@pytest.mark.parametrize("fused", [False, True])
def test_its_operations_are_timed_in_bodies(fused: bool) -> None:
    block = rounded(blocks(LLAMA)[1])
    shape = Shape(2, 1, 9, dtype="fp32", fused=fused)
    body = inference_body(block, shape)
    wanted = {w for i in body.forward.ranks[0] for w in works(block, body, i, shape)}
    found = time_pass(LLAMA, PassPiece(block, shape), torch.device("cpu"))
    names = {work.op for work in wanted if isinstance(work, Memory) and OP in work.op}
    assert len(names) == 3 if fused else sum(isinstance(w, Matmul) and w.form == "int8" for w in wanted) == 4
    assert wanted <= set(found) and min(found.values()) > 0
    profile = load_profile(shipped()["h200-sxm"])
    samples = tuple(Sample(work, seconds) for work, seconds in found.items())
    known = replace(profile, samples=profile.samples + samples)
    assert from_dict(to_dict(known)).samples == known.samples
    assert all(Pricer(known).grade(work) == "measured" for work in wanted)
    plain = Matmul(2, LLAMA.hidden, LLAMA.hidden, "fp32")
    assert Pricer(known).price(plain) == Pricer(profile).price(plain)  # no sample of one form says a thing of others


def test_costs_know_where_they_are() -> None:
    work = replace(WORK, precision="fp32", batch=2)
    predictor = Predictor(LLAMA, work, load_profile(shipped()["h200-sxm"]))
    costs = PassCosts(ROUNDED, LLAMA, work, predictor.bodies(ROUNDED), 1, 9)
    assert costs.sizes == program_sizes(ROUNDED, LLAMA, work, 1, 9, Site("cuda"))[-1]


def test_what_cannot_be_is_refused() -> None:
    reason = why_not(LLAMA, WORK, Plan(weights="int9"))
    assert reason == "weights 'int9' is unknown (nearest int8)"
    moe = replace(QWEN, architecture="Qwen3MoeForCausalLM", experts=Experts(4, 2, 24), qkv_bias=False)
    assert "needs a model without experts" in str(why_not(moe, WORK, ROUNDED))
    train = replace(WORK, kind="train", sequence_length=8, global_batch=8)
    assert "weights has no meaning when training (found 'int8'; nearest 'exact')" in str(why_not(LLAMA, train, ROUNDED))


def test_such_plans_are_labelled_and_never_searched_unasked() -> None:
    question = Question(LLAMA, WORK, load_profile(shipped()["h200-sxm"]), 1, {})
    assert INT8 not in axis_values(question)["weights"]
    assert axis_values(replace(question, axes={"weights": (INT8,)}))["weights"] == (INT8,)
    for axis, value in CHANGES:
        plan = Plan().altered(**{axis: value})
        assert len(plan.changes) == 1 and plan.unchanged == Plan()
    assert Plan().changes == () and "rounded to 8 bits" in ROUNDED.changes[0]


def test_a_run_says_what_it_changes_and_how_far_it_drifts(inside: Inside) -> None:
    recipe = inside.write("round.toml", GENERATE.replace("[search]\n", '[search]\nweights = "int8"\n'))
    found = inside.run("search", recipe, "--measure", "0", "--json")
    assert found.code == 0, found.stderr
    assert found.json["plan"]["weights"] == INT8 and len(found.json["changes"]) == 1
    ran = inside.run("run", recipe, "--check", "--steps", "1", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["changes"] == found.json["changes"]
    assert 0 <= ran.json["drift"]["equal"] <= 1 and ran.json["drift"]["first"] >= -1
    said = "\n".join(run_lines(ran.json, WORK))  # as the command tells it without --json
    assert "CHANGES    weights = int8" in said and "drift      " in said
    for words in (
        ("explain", recipe),
        ("simulate", recipe),
        ("plans", "show", found.json["plan_id"]),
    ):
        shown = inside.run(*words)
        assert shown.code == 0 and "rounded to 8 bits" in shown.stdout, (words, shown.stdout, shown.stderr)


def test_what_is_held_is_the_rounded_weight() -> None:
    layer = rounded(blocks(LLAMA)[1])
    one = Rounded.build((layer,), lambda i, w: lively_weight(w, "fp64"), precision="fp64", tensor_size=1,
                        device=torch.device("cpu"))  # fmt: skip
    weight, scale = (one.views[1, f"down.{kind}"] for kind in ("weight", "scale"))
    assert torch.equal(weight * scale[:, None], rounded_and_back(lively(LLAMA, "fp64")[1, "down.weight"]))
