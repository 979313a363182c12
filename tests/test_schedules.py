"""Pipeline schedules at unit cost (forward 1, backward 2, free messages): closed forms, orders, hop latency.

The programs are the ones that `lower_training` gives for a real model shape, messages and updates included.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.resolve import resolve
from autotune.planners.schedules import SCHEDULES, Pipe
from autotune.planners.schedules.interleaved import warm_up
from autotune.planners.simulate import memory, simulate
from autotune.planners.validate import validate
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.timeline import Timeline
from autotune.spec.workload import Workload

DEEP = ModelSpec("deep", "LlamaForCausalLM", 8, 64, 2, 2, 4, 8, 16)

CASES = [
    *(("gpipe", p, m, 1) for p in (1, 2, 3, 4, 8) for m in (1, 2, 5, 8, 17)),
    *(("1f1b", p, m, 1) for p in (1, 2, 3, 4, 8, 16) for m in (1, 2, 3, 7, 8, 16, 33)),
    *(("interleaved-1f1b", p, p * k, v) for p in (2, 3, 4, 8) for k in (1, 2, 3, 5) for v in (2, 3, 4)),
]


@dataclass(frozen=True)
class UnitCosts:
    """Seconds of a forward and a backward of one chunk and of a message; everything else takes no time."""

    hop: float = 0.0
    forward: float = 1.0
    backward: float = 2.0

    def seconds(self, rank: int, instruction: Instruction) -> float:
        table = {"F": self.forward, "BW": self.backward, "SEND": self.hop, "RECV": self.hop}
        return table.get(instruction.op, 0.0)

    def transient(self, rank: int, instruction: Instruction) -> int:
        return 0

    def sent(self, rank: int, instruction: Instruction) -> int:
        return 0


def program(schedule: str, p: int, m: int, v: int = 1) -> Program:
    """The step of a pipeline of p ranks, m micro-batches and v chunks a rank."""
    plan, workload = Plan(pipeline=p, schedule=schedule, chunks=v), Workload(sequence_length=4, global_batch=m)
    assert why_not(DEEP, workload, plan, p) is None
    return lower_training(plan, DEEP, workload)


def run(schedule: str, p: int, m: int, v: int = 1, hop: float = 0.0) -> Timeline:
    return simulate(program(schedule, p, m, v), UnitCosts(hop))


@pytest.mark.parametrize(("schedule", "p", "m", "v"), CASES)
def test_makespan_and_bubble(schedule: str, p: int, m: int, v: int) -> None:
    form = SCHEDULES[schedule].makespan
    assert form is not None
    line = run(schedule, p, m, v)
    ideal = 3 * m * v
    assert line.makespan == form(Pipe(p, m, v)) == ideal + 3 * (p - 1)
    assert [line.busy(rank) for rank in range(p)] == [ideal] * p
    # As a share of the whole and as a ratio to the ideal: (p-1)/(m+p-1) and (p-1)/(v m).
    assert line.idle_share == pytest.approx(float(Fraction(p - 1, m * v + p - 1)), abs=1e-12)
    assert (line.makespan - ideal) / ideal == pytest.approx((p - 1) / (v * m), abs=1e-12)


@pytest.mark.parametrize(("schedule", "p", "m", "v"), CASES)
def test_peak_activations_of_each_rank(schedule: str, p: int, m: int, v: int) -> None:
    """Of the program's own buffers, with one byte a chunk activation and none anywhere else."""
    form = SCHEDULES[schedule].peak
    assert form is not None
    lowered = program(schedule, p, m, v)
    ones = tuple(
        {name: Buffer(int(name.startswith("k.")), persistent=b.persistent) for name, b in held.items()}
        for held in lowered.buffers
    )
    walked = memory(replace(lowered, buffers=ones), lambda rank, instruction: 0)
    assert [max(tiers["device"]) for tiers in walked] == form(Pipe(p, m, v))


def test_the_peaks_that_papers_state() -> None:
    """1F1B p - s (2006.09503); interleaved p v + p - 1 chunks on rank 0 (2104.04473, 2205.05198); GPipe m."""
    peaks = {name: entry.peak for name, entry in SCHEDULES.items()}
    for p, m, v in [(2, 8, 2), (4, 16, 2), (4, 32, 3), (8, 64, 4)]:
        assert peaks["gpipe"] and peaks["1f1b"] and peaks["interleaved-1f1b"]
        assert peaks["gpipe"](Pipe(p, m, 1)) == [m] * p
        assert peaks["1f1b"](Pipe(p, m, 1)) == [p - s for s in range(p)]
        assert peaks["interleaved-1f1b"](Pipe(p, m, v))[0] == p * v + p - 1


@pytest.mark.parametrize(("schedule", "p", "m", "v"), CASES)
def test_order(schedule: str, p: int, m: int, v: int) -> None:
    """Each stage and item once forward and once backward, on the rank of the stage, forward first."""
    entry = SCHEDULES[schedule]
    order, place = entry.order(Pipe(p, m, v)), entry.place(Pipe(p, m, v))
    assert len(order) == p and len(place) == p * v and Counter(r for (r,) in place) == dict.fromkeys(range(p), v)
    assert Counter(s for steps in order for s in steps) == Counter(
        (op, stage, item) for op in ("F", "BW") for stage in range(p * v) for item in range(m)
    )
    for rank, steps in enumerate(order):
        assert all(place[step.stage] == (rank,) for step in steps)
        at = {step: position for position, step in enumerate(steps)}
        assert all(at[s] < at[s._replace(op="BW")] for s in steps if s.op == "F")


def before_first_backward(schedule: str, p: int, m: int, v: int) -> list[int]:
    order = SCHEDULES[schedule].order(Pipe(p, m, v))
    return [next(i for i, step in enumerate(steps) if step.op == "BW") for steps in order]


@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 4), (4, 3), (4, 16), (8, 32), (16, 8)])
def test_warm_up_and_alternation_of_1f1b(p: int, m: int) -> None:
    """A rank runs min(m, p-s-1) forwards, then pairs, then the backwards that are left."""
    assert before_first_backward("1f1b", p, m, 1) == [min(m, p - s) for s in range(p)]
    assert before_first_backward("gpipe", p, m, 1) == [m] * p
    for s, steps in enumerate(SCHEDULES["1f1b"].order(Pipe(p, m, 1))):
        warm = min(m, p - s - 1)
        ops = [step.op for step in steps]
        assert ops == ["F"] * warm + ["F", "BW"] * (m - warm) + ["BW"] * warm


@pytest.mark.parametrize(("p", "k", "v"), [(2, 1, 2), (4, 2, 2), (4, 4, 3), (8, 2, 4)])
def test_warm_up_of_interleaved(p: int, k: int, v: int) -> None:
    """min(m v, 2(p-r-1) + (v-1)p) forwards before the steady pairs (Megatron-LM, 2104.04473)."""
    m = p * k
    for rank, steps in enumerate(SCHEDULES["interleaved-1f1b"].order(Pipe(p, m, v))):
        warm = min(m * v, 2 * (p - rank - 1) + (v - 1) * p)
        assert warm_up(rank, p, m, v) == warm
        ops = [step.op for step in steps]
        assert ops == ["F"] * warm + ["F", "BW"] * (m * v - warm) + ["BW"] * warm
        # Groups of p micro-batches, chunk by chunk: the first p forwards are of the first chunk, the next of the next.
        forwards = [step for step in steps if step.op == "F"]
        assert [s.stage for s in forwards[: p * v]] == [c * p + rank for c in range(v) for _ in range(p)]
        assert [s.item for s in forwards[:p]] == list(range(p))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("hop", [0.25, 1.0, 4.0])
def test_hop_latency_of_1f1b(p: int, hop: float) -> None:
    """p micro-batches in flight go round through 2(p-1) hops: each costs 2(p-1)/p hops more in the steady state."""
    m = 8 * p
    steady = (run("1f1b", p, m + p, hop=hop).makespan - run("1f1b", p, m, hop=hop).makespan) / p
    assert steady == pytest.approx(3 + 2 * (p - 1) / p * hop)
    if hop <= 1:  # the first and the last round pay for p - 2 hops beyond their own, forward and backward
        whole = 3 * (m + p - 1) + 2 * (p - 1) * hop * m / p + 2 * (p - 2) * hop
        assert run("1f1b", p, m, hop=hop).makespan == pytest.approx(whole)


@pytest.mark.parametrize(("p", "v"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_hop_latency_of_interleaved(p: int, v: int) -> None:
    """Megatron's order keeps p - 1 forwards more in flight than 1F1B, so short hops hide behind compute: what is left
    is one trip of one micro-batch through all p v stages and back, 2(pv - 1) hops, however many micro-batches."""
    for k in (1, 3, 8):
        for hop in (1 / 64, 1 / 32):
            whole = 3 * (k * p * v + p - 1) + 2 * (p * v - 1) * hop
            assert run("interleaved-1f1b", p, k * p, v, hop=hop).makespan == pytest.approx(whole)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_hop_latency_of_gpipe(p: int) -> None:
    """Messages overlap with compute: only the first goes through all hops, forward and backward."""
    for hop in (0.5, 1.0):
        assert run("gpipe", p, 4 * p, hop=hop).makespan == pytest.approx(3 * (5 * p - 1) + 2 * (p - 1) * hop)


def test_hops_of_gpipe_slower_than_compute_are_the_bottleneck() -> None:
    """With hop > backward, a link carries m messages one by one: m hops a direction, not m computes."""
    p, m, hop = 2, 8, 5.0
    # Forward: 1 + m hops, then the last forward; the first backward's message leaves after all forwards of rank 1.
    assert run("gpipe", p, m, hop=hop).makespan == pytest.approx(1 + m * hop + 1 + 2 + m * hop + 2)


@pytest.mark.parametrize(("p", "v"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_interleaving_shrinks_the_bubble_by_its_chunks(p: int, v: int) -> None:
    """The same model: a chunk is 1/v of a rank's layers."""
    m = 4 * p
    whole = simulate(program("1f1b", p, m), UnitCosts(0, 1.0, 2.0)).makespan
    parts = simulate(program("interleaved-1f1b", p, m, v), UnitCosts(0, 1 / v, 2 / v)).makespan
    assert whole - 3 * m == pytest.approx(3 * (p - 1))
    assert parts - 3 * m == pytest.approx(3 * (p - 1) / v)


@pytest.mark.parametrize(("schedule", "p", "m", "v"), CASES)
def test_every_program_is_sound(schedule: str, p: int, m: int, v: int) -> None:
    lowered = program(schedule, p, m, v)
    validate(lowered)
    resolve(lowered, inline=True)


@pytest.mark.parametrize(
    ("schedule", "p", "m", "v", "hint"),
    [
        ("gpipe", 2, 4, 2, "nearest 1"),
        ("1f1b", 2, 4, 3, "nearest 1"),
        ("interleaved-1f1b", 4, 8, 1, "nearest 2"),
        ("interleaved-1f1b", 1, 8, 2, "nearest 2"),
        ("interleaved-1f1b", 4, 6, 2, "nearest 8"),
    ],
)
def test_what_a_schedule_refuses(schedule: str, p: int, m: int, v: int, hint: str) -> None:
    reason = SCHEDULES[schedule].refuse(Pipe(p, m, v))
    assert reason is not None and hint in reason
