"""Weight gradients of several micro-batches as one product: 2BP's, and of any W's that stand side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.costs.works import works
from autotune.planners.feasible import why_not
from autotune.planners.lower.join import joined_body, part_of, together
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.train import lower_training
from autotune.planners.predict import Predictor
from autotune.planners.refine import step_works
from autotune.planners.simulate import memory
from autotune.planners.space import Enumeration
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.work import Matmul, Memory
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.test_conformance import OPEN, SEARCHED, TIED, plans

MODEL = ModelSpec("wide", "LlamaForCausalLM", 1024, 8, 16, 16, 64, 2816, 32000)
WORK = Workload(sequence_length=2048, global_batch=16)
H100 = load_profile(MACHINES / "h100-sxm.json")
TWO_STAGE = [("2bp-gpipe", 1), ("2bp-1f1b", 1), ("2bp-interleaved", 2)]


@pytest.mark.parametrize(("schedule", "chunks"), TWO_STAGE)
@pytest.mark.parametrize(("model", "recompute"), [(OPEN, "none"), (TIED, "full")])
def test_joined_gradients_are_the_serial_ones(
    pool: Pool, schedule: str, chunks: int, model: ModelSpec, recompute: str
) -> None:
    """In fp64 to 1e-10, and the bytes of the trace, and of each body, are the simulated ones."""
    plan = Plan(1, 1, 2, 1, schedule, chunks, recompute, "math", weight_gradients="joined")
    assert_equal(pool, model, plan, Workload(sequence_length=8, global_batch=4, precision="fp64", learning_rate=1e-2))


def test_the_conformance_suite_draws_them() -> None:
    drawn = [case.values for name in SEARCHED for case in plans(name)]
    lists = [(p.schedule, listing) for m, p, w in drawn for listing in lower_training(p, m, w).ranks]
    assert len({name for name, listing in lists if any(i.op == "W" and i.part > 1 for i in listing)}) >= 4


@pytest.mark.parametrize(("schedule", "chunks"), TWO_STAGE)
def test_one_w_a_stage_over_all_micro_batches(schedule: str, chunks: int) -> None:
    plan = Plan(1, 1, 2, 1, schedule, chunks, weight_gradients="joined")
    for listing in lower_training(plan, MODEL, WORK).ranks:
        found = [i for i in listing if i.op == "W"]
        assert [i.part for i in found] == [16] * chunks and len({i.stage for i in found}) == chunks
        apart = Counter(i.op for i in listing if i.op != "W")
        assert apart["B"] == apart["F"] == 16 * chunks


def test_units_join_what_stands_side_by_side() -> None:
    """ZeroPP's blocks: W's of a chunk in a unit are in a row, but for those that fill the next unit's warm-up."""
    plan = Plan(1, 1, 2, 1, "zeropp", 2, group=4, weight_gradients="joined")
    for listing in lower_training(plan, MODEL, WORK).ranks:
        found = [i for i in listing if i.op == "W"]
        assert sum(max(1, i.part) for i in found) == 2 * 16 and max(i.part for i in found) == 4
        held = Counter(name for i in found for name in i.frees if name.startswith("k."))
        assert set(held.values()) == {1} and len(held) == 32


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["embed", "layer", "head"])
def test_the_body_is_one_product_a_weight_and_a_copy_a_value(kind: str, count: int) -> None:
    shape = Shape(1, 64, 64, dtype="bf16")
    block = next(b for b in blocks(MODEL) if b.kind == kind)
    one, many = joined_body(block, shape, "none", 1), joined_body(block, shape, "none", count)
    single, listing = one.weight_gradient.ranks[0], many.weight_gradient.ranks[0]
    assert [i.op for i in listing if i.op != "concat"] == [i.op for i in single]
    read = {name for i in single for name in i.reads}
    copies = {i.writes[0]: i for i in listing if i.op == "concat"}
    assert set(copies) == read  # none of what W makes by itself
    for name, copy in copies.items():
        assert copy.reads == tuple(part_of(name, number) for number in range(count))
        (priced,) = works(block, many, copy, together(shape, count))
        assert priced == Memory("add", 2 * count * one.sizes[name], "bf16")  # each byte read and written
    large = [w for i in listing for w in works(block, many, i, together(shape, count)) if isinstance(w, Matmul)]
    small = [w for i in single for w in works(block, one, i, shape) if isinstance(w, Matmul)]
    assert large == [replace(w, k=count * w.k) for w in small]


def test_parts_are_given_back_as_they_are_put_together() -> None:
    """At most one value is there twice: never all that W needs."""
    shape, block = Shape(1, 64, 64, dtype="bf16"), blocks(MODEL)[1]
    one, many = joined_body(block, shape, "none", 1), joined_body(block, shape, "none", 4)
    source = block.nodes[0].reads[0]
    parts = {name for i in many.weight_gradient.ranks[0] if i.op == "concat" for name in i.reads}
    held = sum(many.sizes[name] for name in parts if not name.startswith(f"{source}@"))
    most = max(memory(many.weight_gradient, lambda rank, i: 0)[0]["device"])
    assert held < most <= held + 4 * max(one.sizes[name] for i in one.weight_gradient.ranks[0] for name in i.reads)


def test_memory_and_time_beside_products_apart() -> None:
    """Joined: at most one value more at the peak. The weights' wide gradients are read and written once, not once a
    micro-batch: with short micro-batches that is more than the copies are."""
    predictor = Predictor(MODEL, WORK, H100)
    apart, joined = (
        predictor.predict(Plan(1, 1, 2, 1, "2bp-1f1b", attention="flash", weight_gradients=how))
        for how in ("apart", "joined")
    )
    assert max(apart.peak_bytes) < max(joined.peak_bytes) < 1.5 * max(apart.peak_bytes)
    short = replace(WORK, sequence_length=128)
    times = [
        Predictor(MODEL, short, H100).predict(Plan(1, 1, 2, 1, "2bp-1f1b", attention="flash", weight_gradients=how))
        for how in ("apart", "joined")
    ]
    assert times[1].step_s < 0.95 * times[0].step_s


def test_a_search_tries_it_where_all_w_stand_side_by_side() -> None:
    axes: dict[str, tuple[object, ...]] = {"pipeline": (2,), "data": (1,), "micro_batch": (1,), "recompute": ("none",)}
    question = Question(MODEL, WORK, H100, 2, axes)
    found = {
        p.schedule
        for p in Enumeration(question, PricedAdvice(Bounder(Predictor(MODEL, WORK, H100))))
        if p.weight_gradients == "joined"
    }
    assert found == {name for name, _ in TWO_STAGE}


def test_its_operations_are_among_those_measured() -> None:
    predictor = Predictor(MODEL, WORK, H100)
    found = step_works(predictor, Plan(1, 1, 2, 1, "2bp-1f1b", attention="flash", weight_gradients="joined"))
    assert Matmul(1024, 16 * 2048, 2816, "bf16", "wgrad") in found


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(pipeline=2, weight_gradients="together"), "weight_gradients 'together' is unknown (nearest apart)"),
        (Plan(pipeline=2, weight_gradients="joined"),
         "weight_gradients joined needs a schedule with a split backward (found 1f1b; nearest 2bp-1f1b)"),
        (Plan(1, 2, 2, schedule="2bp-1f1b", sequence_parallel=True, weight_gradients="joined"),
         "weight_gradients joined needs sequence_parallel false: shards of tokens are not joined (found true)"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined(plan: Plan, message: str) -> None:
    assert why_not(MODEL, WORK, plan) == message
