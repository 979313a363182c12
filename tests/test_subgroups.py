"""Optimizer states on the host: any share and stride gives the same weights, and the bytes are where they should be."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from autotune.planners.advice import PricedAdvice
from autotune.planners.bounds import Bounder
from autotune.planners.costs.price import Pricer
from autotune.planners.feasible import why_not
from autotune.planners.lower.subgroups import SUBGROUPS, split
from autotune.planners.lower.train import lower_training
from autotune.planners.lower.traits import stage_sizes
from autotune.planners.predict import Predictor
from autotune.planners.simulate import memory, simulate
from autotune.planners.solvers.stride import Subgroup, best_stride, strides
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.spec.machine import Sample
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction
from autotune.spec.work import Optimizer
from autotune.spec.workload import Workload
from tests.equal import Faults, assert_equal
from tests.pool import Pool

MODEL = ModelSpec("deep-llama", "LlamaForCausalLM", 16, 5, 4, 4, 4, 24, 32, tied=True)
WORK = Workload(sequence_length=8, global_batch=8, precision="fp64", learning_rate=1e-2)
MESHES = [
    Plan(),
    Plan(2, 1, 2, zero=1),
    Plan(1, 2, 2, sequence_parallel=True),
    Plan(1, 1, 2, 1, "interleaved-1f1b", 2),
    Plan(1, 1, 2, vocabulary="vocab-1"),
    Plan(2, 1, 2, zero=1, vocabulary="vocab-2"),
]
# Percent on the host and stride: each mesh takes every second one, its neighbour the others.
SHARES = [(100, 0), (100, 1), (100, 3), (60, 2), (30, 16), (1, 1)]


@pytest.fixture(scope="module")
def h100() -> Predictor:
    """A model of 0.9 billion parameters on one H100 of the profile that ships."""
    model = ModelSpec("small", "LlamaForCausalLM", 2048, 16, 16, 16, 128, 5632, 32000)
    return Predictor(model, Workload(sequence_length=2048, global_batch=4), load_profile(MACHINES / "h100-sxm.json"))


@pytest.mark.parametrize(
    ("mesh", "percent", "stride"),
    [(mesh, *share) for at, mesh in enumerate(MESHES) for share in SHARES[at % 2 :: 2]],
    ids=lambda x: x.describe() if isinstance(x, Plan) else str(x),
)
def test_any_share_and_stride_equals_the_reference(pool: Pool, mesh: Plan, percent: int, stride: int) -> None:
    window = percent % 7 if stride else 0
    plan = replace(mesh, attention="math", optimizer_offload=percent, optimizer_stride=stride, optimizer_window=window)
    work = replace(WORK, global_batch=4 * plan.data)  # as many backwards as the widest window reaches over
    assert why_not(MODEL, work, plan, plan.world) is None
    assert_equal(pool, MODEL, plan, work, steps=3)


@pytest.mark.parametrize(
    "faults", [(), ((1, (5, "attn_norm.weight"), float("nan")),), ((1, (1, "attn_norm.weight"), 1e3),)]
)
def test_clipping_reaches_the_host(pool: Pool, faults: Faults) -> None:
    plan = Plan(1, 1, 2, attention="math", optimizer_offload=70, optimizer_stride=4)
    assert_equal(pool, MODEL, plan, replace(WORK, clip=1.0), faults, steps=3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stride", [0, 2])
def test_the_weights_are_those_of_a_device_alone(pool: Pool, precision: str, stride: int) -> None:
    """fp32 to its rounding (the update's vector code ends elsewhere), bf16 with fp32 masters to its last bit."""
    bound = {"fp32": 2.0**-19, "bf16": 2.0**-8}[precision]  # of a weight, and of a step of the learning rate
    work, plain = replace(WORK, precision=precision), Plan(1, 1, 2, attention="math")
    moved = replace(plain, optimizer_offload=100, optimizer_stride=stride)
    runs = [pool.run("train", 2, plan=plan, model=MODEL, workload=work, steps=3) for plan in (plain, moved)]
    for ours, theirs in zip(*runs, strict=True):
        for key, weight in ours["weights"].items():
            assert np.allclose(weight, theirs["weights"][key], rtol=bound, atol=bound * work.learning_rate)


def test_the_moved_share_leaves_the_device() -> None:
    """The device's bytes fall by the states that moved, but for two subgroups on their way; the host's rise by them."""
    work, zero = replace(WORK, precision="bf16"), lambda rank, instruction: 0
    plain = memory(lower_training(Plan(attention="math"), MODEL, work), zero)[0]
    parameters = stage_sizes(Plan(attention="math"), MODEL, work)[0].parameters
    for percent, stride in ((100, 0), (50, 0), (100, 2), (25, 4)):
        plan = Plan(attention="math", optimizer_offload=percent, optimizer_stride=stride)
        held = memory(lower_training(plan, MODEL, work), zero)[0]
        resident, each = split(parameters, 1, percent)
        moved = 12 * (parameters - resident)
        assert moved == 12 * SUBGROUPS * each
        assert plain["device"][-1] - held["device"][-1] == moved
        assert held["host"][0] == moved
        update = [i.op for i in lower_training(plan, MODEL, work).ranks[0]].index("OPT")
        assert max(held["device"][update:]) - held["device"][-1] == (2 * 12 * each if stride else 0)
        assert max(plain["device"]) - max(held["device"]) >= moved - 2 * 12 * each


def test_early_fetches_take_memory_that_backwards_have_given_back() -> None:
    """Two fetches beside the last two backwards: they are over before the update, which is as much shorter, and the
    step's peak is where it was. A window of the whole step has the states beside every activation."""
    times = Subgroup(fetch=2.0, update=0.1, back=0.1, gradient=0.1, host=0.1, weight=0.1)
    plan = Plan(attention="math", recompute="full", optimizer_offload=100, optimizer_stride=8)

    class Steps(Table):
        def seconds(self, rank: int, instruction: Instruction) -> float:
            return {"F": 1.0, "BW": 2.0}.get(instruction.op, super().seconds(rank, instruction))

    found = {}
    for window in (0, 1, 2, 99):
        program = lower_training(replace(plan, schedule="gpipe", optimizer_window=window), MODEL, WORK)
        ops = [i.op for i in program.ranks[0] if i.op in ("F", "BW", "FETCH", "OPT")]
        found[window] = simulate(program, Steps(times)).makespan, max(memory(program, lambda rank, i: 0)[0]["device"])
        behind = ops[ops.index("FETCH") :]
        assert behind.count("BW") == min(window, WORK.global_batch) and behind.count("FETCH") == 2
    assert found[2][0] < found[1][0] < found[0][0]
    assert found[2][1] == found[0][1] < found[99][1]
    assert found[99][0] == found[2][0]


MOVES = ("FETCH", "OPT_FETCHED", "RETURN", "GRADIENT_DOWN", "OPT_HOST", "WEIGHT_UP")
OPS = dict(zip(MOVES, Subgroup.__dataclass_fields__, strict=True))


@dataclass
class Table:
    """A cost table that knows a subgroup's moves and updates alone."""

    subgroup: Subgroup

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return float(getattr(self.subgroup, OPS[instruction.op])) if instruction.op in OPS else 0.0

    def transient(self, rank: int, instruction: Instruction) -> int:
        return 0

    def sent(self, rank: int, instruction: Instruction) -> int:
        return 0


def test_the_stride_is_the_best_of_the_simulated_grid_within_one_step() -> None:
    """Over machines whose copies, processors and devices differ by a hundred times."""
    draw, grid = random.Random(1), strides(SUBGROUPS)
    seen = set()
    for _ in range(100):
        host, link, device = 10 ** draw.uniform(-1, 1), 10 ** draw.uniform(-1, 1), 10 ** draw.uniform(-2, -0.5)
        times = Subgroup(3 * link, device, 3 * link * draw.uniform(0.8, 1.2), link, 3 * host, link / 2)
        simulated = []
        for stride in grid:
            plan = Plan(attention="math", optimizer_offload=100, optimizer_stride=stride)
            simulated.append(simulate(lower_training(plan, MODEL, WORK), Table(times)).makespan)
        chosen = grid.index(best_stride(SUBGROUPS, times))
        equal = [n for n, seconds in enumerate(simulated) if seconds <= min(simulated) * (1 + 1e-9)]
        assert min(abs(chosen - n) for n in equal) <= 1, (times, simulated)
        seen.add(chosen)
    assert len(seen) >= 5  # the draw reaches most of the grid


def test_a_machine_with_a_fast_link_uses_its_device(h100: Predictor) -> None:
    """On a shipped profile: the advice's stride is the best of the predicted grid within one step, beats both ends or
    equals one, and the whole states fit the host's tier."""
    advice = PricedAdvice(Bounder(h100))
    plan = Plan(optimizer_offload=100, recompute="full")
    assert advice.states(plan) == (100,)
    small = replace(h100.profile, host=replace(h100.profile.host, memory_bytes=1))
    assert PricedAdvice(Bounder(Predictor(MODEL, WORK, small))).states(plan) == ()
    grid = strides(SUBGROUPS)
    seconds = [h100.predict(replace(plan, optimizer_stride=stride)).step_s for stride in grid]
    chosen = grid.index(advice.stride(plan))
    assert abs(chosen - min(range(len(grid)), key=seconds.__getitem__)) <= 1
    assert seconds[chosen] <= min(seconds[0], seconds[-1])


def test_host_updates_are_priced_by_the_host(h100: Predictor) -> None:
    """Without samples by the host's memory, and by its share where eight workers update at once; with them by these."""
    work = Optimizer(10**8, "mixed", "host")
    alone = Pricer(h100.profile, 1).price(work)
    assert alone[1] == "datasheet" and alone[0] > work.bytes / h100.profile.host.memory_bandwidth
    assert Pricer(h100.profile, 8).seconds(work) == pytest.approx(8 * alone[0])
    assert Pricer(h100.profile, 1).seconds(replace(work, place="device")) < alone[0] / 2
    sampled = replace(h100.profile, samples=(*h100.profile.samples, Sample(work, 0.5)))
    assert Pricer(sampled, 1).price(work)[0] == pytest.approx(0.5)
    assert Pricer(sampled, 1).seconds(replace(work, place="device")) < alone[0] / 2  # a host's sample is no device's


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(optimizer_offload=120), "optimizer_offload must be a percentage (found 120; nearest 100)"),
        (Plan(optimizer_stride=2), "optimizer_stride needs optimizer_offload above 0"),
        (Plan(optimizer_offload=50, optimizer_stride=40), "optimizer_stride must be 0 to 16 (found 40; nearest 16)"),
        (
            Plan(optimizer_offload=50, optimizer_window=2),
            "optimizer_window needs optimizer_stride above 0",
        ),
        (Plan(optimizer_offload=50, optimizer_stride=2, optimizer_window=-1), "optimizer_window must be 0 or more"),
        (Plan(1, 1, 2, optimizer_offload=50, optimizer="post-validated"), "needs optimizer_offload 0"),
    ],
)
def test_what_cannot_live_on_the_host_is_refused(plan: Plan, reason: str) -> None:
    assert reason in str(why_not(MODEL, replace(WORK, clip=1.0), plan))
