"""Weights and gradients that data ranks share: equal to the reference, as many bytes as the formula, as much memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from autotune.planners.bounds import Bounder
from autotune.planners.costs.step import StepCosts
from autotune.planners.feasible import why_not
from autotune.planners.lower.expand import expand
from autotune.planners.lower.train import lower_training, stage_bytes
from autotune.planners.lower.traits import stage_sizes
from autotune.planners.predict import Predictor
from autotune.planners.schedules import SCHEDULES
from autotune.planners.search import search
from autotune.planners.simulate import memory
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload
from tests.equal import assert_equal, shallow
from tests.pool import Pool

TIED = ModelSpec("deep-llama", "LlamaForCausalLM", 16, 9, 4, 4, 4, 24, 32, tied=True)
OPEN = ModelSpec("deep-qwen", "Qwen3ForCausalLM", 24, 10, 8, 4, 4, 32, 40, qkv_bias=True, qk_norm=True)
ODD = ModelSpec("odd", "LlamaForCausalLM", 12, 5, 2, 2, 6, 19, 31)  # stages that two, three or four ranks cannot halve
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
WIDE = ModelSpec("wide", "LlamaForCausalLM", 1024, 16, 16, 16, 64, 2816, 32000)
H100 = load_profile(MACHINES / "h100-sxm.json")
SEARCHED = [name for name, entry in SCHEDULES.items() if entry.searched]


def in_pipeline(name: str, zero: int, gathered: int) -> Plan:
    """Two data ranks times two pipeline ranks: with as many chunks as the search tries where all that is shared is
    gathered one at a time, elsewhere with as few as a rank can have room for some of."""
    several = [count for count in SCHEDULES[name].chunks if count > 1]
    chunks = (several or SCHEDULES[name].chunks)[-1 if (zero, gathered) == (3, 1) else 0]
    return Plan(2, 1, 2, 1, name, chunks, zero=zero, gathered=gathered, attention="math")


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize(("zero", "gathered"), [(2, 1), (3, 1), (3, 0)])
def test_every_schedule_equals_the_reference(pool: Pool, name: str, zero: int, gathered: int) -> None:
    plan = in_pipeline(name, zero, gathered)
    model = shallow(OPEN, plan)
    assert why_not(model, WORK, plan, 4) is None
    assert_equal(pool, model, plan, WORK)


@pytest.mark.parametrize(
    ("model", "plan", "work"),
    [
        (TIED, Plan(2, zero=3), WORK),
        (TIED, Plan(4, zero=2), WORK),
        (TIED, Plan(2, 1, 2, 1, "zeropp", 2, zero=3, gathered=1), WORK),
        (TIED, Plan(2, 1, 2, 1, "zeropp", 2, zero=3, group=2, gather_each="unit"), WORK),
        (TIED, Plan(2, 1, 2, 1, "bitpipe", 2, zero=2, gathered=1), WORK),
        (TIED, Plan(2, 1, 2, 1, "v-zb", 2, zero=3, gathered=1), replace(WORK, clip=0.1)),
        (TIED, Plan(4, 1, 1, 1, "breadth-first", 4, zero=3, gathered=1), WORK),
        (TIED, Plan(2, 2, 1, 1, "breadth-first", 2, zero=3, gathered=1, sequence_parallel=True), WORK),
        (ODD, Plan(3, 1, 1, 1, "zeropp", 2, zero=3, gathered=1), replace(WORK, global_batch=6)),
        (ODD, Plan(4, 1, 1, 1, "breadth-first", 4, zero=3, gathered=2, recompute="selective"), WORK),
        (ODD, Plan(2, 1, 2, 1, "zeropp", 2, zero=2, gathered=1, layers="1,1,2,1", group=1), WORK),
        (OPEN, Plan(2, 1, 2, 1, "zeropp", 4, zero=3, gathered=2, group=3, recompute="full"), WORK),
        (OPEN, Plan(2, 1, 2, 1, "zeropp", 4, zero=3, gathered=3, offload=50), WORK),
        (OPEN, Plan(2, 2, 1, 1, "breadth-first", 2, zero=3, gathered=1, sequence_parallel=True), WORK),
        (OPEN, Plan(2, 2, 1, zero=2), replace(WORK, clip=0.1)),
        (TIED, Plan(2, 1, 2, 1, "zeropp", 2, zero=3, gathered=1, vocabulary="vocab-1"), WORK),
        (OPEN, Plan(2, 1, 2, 1, "1f1b", zero=3, vocabulary="vocab-2"), WORK),
        (OPEN, Plan(2, 1, 2, 1, "zeropp", 2, zero=3, gathered=1), replace(WORK, clip=0.1)),
        (OPEN, Plan(2, 1, 2, 1, "v-zb", 2, zero=3, gathered=1, optimizer_offload=50, optimizer_stride=3), WORK),
    ],
    ids=lambda x: x.describe() if isinstance(x, Plan) else getattr(x, "name", ""),
)
def test_with_every_other_axis(pool: Pool, model: ModelSpec, plan: Plan, work: Workload) -> None:
    assert_equal(pool, shallow(model, plan), replace(plan, attention="math"), work)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("value", [float("nan"), 1e3])
def test_taken_back_afterwards(pool: Pool, zero: int, value: float) -> None:
    """Updates before their norm is known, and steps that begin again with what is gathered in flight."""
    plan = Plan(2, 1, 2, 1, "zeropp", 2, zero=zero, gathered=1, attention="math", optimizer="post-validated")
    model = shallow(OPEN, plan)
    faults = ((1, (model.layers, "attn_norm.weight"), value),)
    answers = assert_equal(pool, model, plan, replace(WORK, clip=3.0), faults, steps=3)
    assert any(len(a["validated"]) > 3 for a in answers)


def test_mixed_precision_holds_what_is_predicted(pool: Pool) -> None:
    """bf16 shares with fp32 masters: the bytes at every instruction."""
    work = replace(WORK, precision="bf16")
    for zero, gathered in ((2, 1), (3, 1), (3, 2)):
        plan = Plan(2, 1, 1, 1, "breadth-first", 4, zero=zero, gathered=gathered, attention="math")
        answers = pool.run("train", 2, plan=plan, model=ODD, workload=work, steps=1)
        predicted = memory(expand(lower_training(plan, ODD, work), plan), lambda rank, instruction: 0)
        assert [a["memory"] for a in answers] == [held["device"] for held in predicted]


def traffic(plan: Plan, model: ModelSpec, work: Workload) -> tuple[Counter[tuple[str, int]], int]:
    """Of pipeline rank 0: how often it gathers and scatters each stage, and the bytes it sends beside messages."""
    line = Predictor(model, work, H100).predict(plan).timeline
    assert line is not None
    counts = Counter((i.op, i.stage) for i in line.program.ranks[0] if i.op in ("UNSHARD", "SCATTER"))
    costs = StepCosts(plan, model, work, H100, Predictor(model, work, H100).bodies(plan))
    return counts, line.sent[0] - sum(costs.sent(0, i) for i in line.program.ranks[0] if i.op == "SEND")


def stage_parameters(plan: Plan, model: ModelSpec, work: Workload) -> list[int]:
    """Padded to whole shares."""
    return [-(-size.parameters // plan.data) * plan.data for size in stage_sizes(plan, model, work)]


@pytest.mark.parametrize("chunks", [2, 4])
def test_a_gather_for_each_direction_and_a_sum(pool: Pool, chunks: int) -> None:
    """ZeRO-3's three times the parameters a step, but for the chunk where the forward turns: it is at hand."""
    plan = Plan(2, 1, 1, 1, "breadth-first", chunks, zero=3, gathered=1, attention="math")
    work = replace(WORK, precision="fp32")
    counts, sent = traffic(plan, ODD, work)
    last = chunks - 1
    assert counts == {
        **{("UNSHARD", s): 2 for s in range(last)},
        ("UNSHARD", last): 1,
        **{("SCATTER", s): 1 for s in range(chunks)},
    }
    parameters = stage_parameters(plan, ODD, work)
    formula = 4 * (3 * sum(parameters) - parameters[last]) * (plan.data - 1) // plan.data
    assert sent == formula
    assert pool.run("sharded_bytes", 2, plan=plan, model=ODD, workload=work) == [formula] * 2


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_zeropp_gathers_once_a_unit(pool: Pool, chunks: int, group: int) -> None:
    """Units x stages gathers each direction, less those that find the chunk at hand: where a unit turns, and where the
    next begins with the chunk that the last one ended with. And units x stages sums."""
    plan = Plan(2, 1, 2, 1, "zeropp", chunks, zero=3, gathered=1, group=group, attention="math")
    work = replace(WORK, global_batch=16, precision="fp32")
    counts, sent = traffic(plan, OPEN, work)
    units = work.global_batch // plan.data // group
    first, last = 0, 2 * (chunks - 1)
    for stage in range(0, 2 * chunks, 2):
        # With two chunks: units x stages gathers in all, and the last unit's last one.
        gathers = units + 1 if stage == first else units if stage == last else 2 * units
        assert (counts["UNSHARD", stage], counts["SCATTER", stage]) == (gathers, units)
    parameters = stage_parameters(plan, OPEN, work)
    share = (plan.data - 1) / plan.data
    assert sent == 4 * share * sum(count * parameters[stage] for (_, stage), count in counts.items())
    if group == 2:
        assert pool.run("sharded_bytes", 4, plan=plan, model=OPEN, workload=work)[0] == sent


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_gathers_of_zeropp_in_closed_form(chunks: int, group: int) -> None:
    """U units of v chunks a rank with room for r: v + (2U - 1)(v - r). Once a unit, as in the paper: units x stages."""
    work = replace(WORK, global_batch=16, precision="fp32")
    units = work.global_batch // 2 // group

    def gathers(gathered: int, each: str = "step") -> int:
        plan = Plan(2, 1, 2, 1, "zeropp", chunks, zero=3, gathered=gathered, group=group, gather_each=each)
        assert why_not(OPEN, work, plan, 4) is None
        return sum(i.op == "UNSHARD" for listing in lower_training(plan, OPEN, work).ranks for i in listing)

    for room in range(1, chunks + 1):
        assert gathers(room) == 2 * (chunks + (2 * units - 1) * (chunks - room))
    assert gathers(0) == gathers(chunks) == 2 * chunks
    assert gathers(0, "unit") == units * 2 * chunks
    if chunks > 1:  # as many and one filling more, with half of the chunks whole
        assert gathers(chunks // 2) == units * 2 * chunks + chunks


def test_once_a_unit_trades_gathers_for_memory() -> None:
    """Between one chunk whole at a time and all of them all along: in gathers and in time; and less memory than all."""
    work = Workload(sequence_length=2048, global_batch=32)
    predictor = Predictor(WIDE, work, H100)
    plan = Plan(2, 1, 2, 1, "zeropp", 4, attention="flash", zero=3, group=4)
    ways = [replace(plan, gathered=1), replace(plan, gather_each="unit"), plan]
    counts = [sum(n for (op, _), n in traffic(p, WIDE, work)[0].items() if op == "UNSHARD") for p in ways]
    one, each, all_ = (predictor.predict(p) for p in ways)
    units = 4
    assert counts == [2 * units * 3 + 1, units * 4, 4]
    assert one.step_s > each.step_s > all_.step_s and max(each.peak_bytes) < 0.95 * max(all_.peak_bytes)


@pytest.mark.parametrize("schedule", ["zeropp", "breadth-first", "interleaved-1f1b", "v-zb", "gis"])
def test_with_room_for_all_each_stage_is_gathered_once(schedule: str) -> None:
    plan = Plan(2, 1, 2, 1, schedule, 2, zero=3, attention="math")
    counts, _ = traffic(plan, OPEN, WORK)
    assert set(counts.values()) == {1} and len(counts) == 4


def test_zeropp_trades_traffic_for_memory_over_its_units() -> None:
    """Larger units: fewer bytes sent, more activations held; fewer chunks whole: less memory, more bytes sent."""
    work = Workload(sequence_length=2048, global_batch=32)
    predictor = Predictor(WIDE, work, H100)

    def at(group: int, gathered: int) -> tuple[int, int]:
        plan = Plan(2, 1, 2, 1, "zeropp", 4, attention="flash", zero=3, gathered=gathered, group=group)
        assert why_not(WIDE, work, plan, 4) is None
        return traffic(plan, WIDE, work)[1], max(predictor.predict(plan).peak_bytes)

    over_units = [at(group, 1) for group in (1, 2, 4, 8, 16)]
    assert over_units == sorted(over_units, reverse=True) and len({sent for sent, _ in over_units}) == 5
    assert [peak for _, peak in over_units] == sorted(peak for _, peak in over_units)
    over_room = [at(4, gathered) for gathered in (1, 2, 3, 4)]
    assert over_room == sorted(over_room, reverse=True) and len({sent for sent, _ in over_room}) == 4
    assert [peak for _, peak in over_room] == sorted(peak for _, peak in over_room)


def test_gathers_run_beside_work_where_there_is_room_for_two() -> None:
    work = Workload(sequence_length=4096, global_batch=8)
    predictor = Predictor(WIDE, work, H100)
    plan = Plan(2, 1, 1, 1, "breadth-first", 4, attention="flash", zero=3)
    one, two = (predictor.predict(replace(plan, gathered=count)) for count in (1, 2))
    gathers = [i for i in lower_training(plan, WIDE, work).ranks[0] if i.op == "UNSHARD"]
    assert gathers and two.step_s < one.step_s
    assert two.breakdown["exposed communication"] < one.breakdown["exposed communication"] / 2


def test_the_peak_is_a_share_of_all_and_what_is_whole() -> None:
    """Deep models: the states of a rank are its share, and beside them stand the whole chunks that it has room for."""
    work = Workload(sequence_length=128, global_batch=4)
    plan = Plan(4, 1, 1, 1, "breadth-first", 4, attention="flash", zero=3, gathered=1)
    held = Predictor(WIDE, work, H100).predict(plan).memory[0]
    own = [stage_bytes(plan, s, z.parameters, "bf16") for s, z in enumerate(stage_sizes(plan, WIDE, work))]
    assert held["weights"] <= sum(b.weights for b in own) + max(b.whole_weights for b in own)
    assert held["gradients"] <= sum(b.gradients for b in own) + max(b.whole_gradients for b in own)
    assert sum(b.weights for b in own) * 4 == pytest.approx(
        2 * sum(z.parameters for z in stage_sizes(plan, WIDE, work))
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(1, zero=3), "zero needs data > 1 (found 1; nearest 2)"),
        (Plan(2, zero=4), "zero must be 0 to 3 (found 4; nearest 3)"),
        (Plan(2, zero=1, gathered=1), "gathered needs zero 2 or 3 (found zero 1; nearest 2)"),
        (Plan(2, schedule="zeropp", chunks=2, zero=3, gathered=3),
         "gathered must be 0 to 2, the chunks of a rank (found 3; nearest 2)"),
        (Plan(2, zero=3, gather_each="batch"), "gather_each 'batch' is unknown (nearest step)"),
        (Plan(2, zero=2, gather_each="unit"),
         "gather_each unit needs zero 3 and gathered 0 (found zero 2, gathered 0; nearest step)"),
        (Plan(2, zero=2, gathered=-1), "gathered must be 0 to 1, the chunks of a rank (found -1; nearest 0)"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared(plan: Plan, message: str) -> None:
    assert why_not(OPEN, WORK, plan) == message


def test_a_search_shares_what_does_not_fit_otherwise() -> None:
    """Eight devices that hold less than the states of level 1: the search answers with shared weights or gradients, and
    what it says the peak is was bounded from below."""
    work = Workload(sequence_length=1024, global_batch=16)
    axes: dict[str, tuple[object, ...]] = {
        "data": (8,), "micro_batch": (1,), "schedule": ("1f1b", "zeropp", "breadth-first"), "offload": (0,),
        "optimizer_offload": (0,), "recompute": ("full",),
    }  # fmt: skip

    def question(limit: int) -> Question:
        device = replace(H100.device, memory_bytes=limit + H100.device.context_bytes)
        return Question(WIDE, work, replace(H100, device=device), 8, axes, memory_fraction=1.0)

    best = search(question(80 * 10**9)).ranking[0]
    level_one = Plan(8, recompute="full", attention=best.plan.attention, zero=1)
    least = max(Predictor(WIDE, work, H100).predict(level_one).peak_bytes)
    found = search(question(int(0.8 * least))).ranking
    assert found and all(p.plan.zero > 1 and max(p.peak_bytes) <= 0.8 * least for p in found)
    bounder = Bounder(Predictor(WIDE, work, H100))
    assert all(bounder.time(p.plan) <= p.step_s and bounder.memory(p.plan) <= max(p.peak_bytes) for p in found)
