"""Ranks that share processors: against the longest path, against hand-worked cases, and against small time steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autotune.planners.lower.train import lower_training
from autotune.planners.predict import Predictor
from autotune.planners.refine import unmeasured
from autotune.planners.resolve import Resolved, resolve
from autotune.planners.search import search
from autotune.planners.sharing import ALONE, Capacity, shared_sweep, sharers
from autotune.planners.simulate import simulate, sweep
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question
from autotune.spec.program import COMPUTE, D2H, H2D
from autotune.spec.work import Collective
from autotune.spec.workload import Workload
from tests.commands import two_workers
from tests.test_closed_forms import DEEP, UnitCosts

pytestmark = pytest.mark.alone


def graph(waits: list[list[int]]) -> Resolved:
    """Events in topological order already."""
    return Resolved(range(len(waits)), waits, ((*range(len(waits)),),), 1)


def test_two_share_one_core_and_the_rest_is_free() -> None:
    """3 and 1 start together on one core: at half speed the short one ends at 2, then the long one has 2 left: 4."""
    start, end = shared_sweep(graph([[], []]), [3.0, 1.0], [0, 0], [1.0])
    assert (start, end) == ([0.0, 0.0], [4.0, 2.0])


def test_what_takes_no_core_takes_its_own_time() -> None:
    """A message of 1 runs beside two computes of 2 on one core; a third compute starts when it has arrived."""
    resolved = graph([[], [], [], [2]])
    start, end = shared_sweep(resolved, [2.0, 2.0, 1.0, 1.0], [0, 0, ALONE, 0], [1.0])
    assert start[3] == 1.0 and end[2] == 1.0
    # From 1 on three share a core: the third needs 1 at a third, until 4; 2 x 1.5 - 1 x 2 = 1 is left of the others.
    assert end[3] == pytest.approx(4.0) and end[:2] == pytest.approx([5.0, 5.0])


def test_two_things_are_shared_apart() -> None:
    """Two computes on one core and two copies through one memory: each pair takes its own 2, whatever the other does;
    a third copy has a memory of its own."""
    waits: list[list[int]] = [[], [], [], [], []]
    start, end = shared_sweep(graph(waits), [1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1, 2], [1.0, 1.0, 1.0])
    assert start == [0.0] * 5 and end == pytest.approx([2.0, 2.0, 2.0, 2.0, 1.0])


def test_what_shares_what() -> None:
    """Pairs of ranks share a host's memory, all ranks a processor."""
    lanes = [[COMPUTE, H2D, "data"], [D2H], [H2D], [COMPUTE]]
    event = [[0, 1, 2, 3, 4, 5], [6], [7], [8]]  # the first list twice over
    capacities = [Capacity(frozenset({COMPUTE}), 3.0), Capacity(frozenset({H2D, D2H}), 1.5, 2)]
    shares, most = sharers(lanes, event, 9, capacities)
    assert shares == [0, 1, ALONE, 0, 1, ALONE, 1, 2, 0]
    assert most == [3.0, 1.5, 1.5]
    assert sharers(lanes, event, 9, [Capacity(None, 2.0)]) == ([0] * 9, [2.0])


@pytest.mark.parametrize("seed", range(20))
def test_enough_cores_are_the_longest_path_and_fewer_never_faster(seed: int) -> None:
    draw = random.Random(seed)
    waits = [sorted(draw.sample(range(n), min(n, draw.choice([0, 1, 2])))) for n in range(40)]
    duration = [draw.choice([0.0, 0.5, 1.0, 2.0]) for _ in waits]
    compute = [0 if draw.random() < 0.7 else ALONE for _ in waits]
    free = sweep(graph(waits), duration)
    assert shared_sweep(graph(waits), duration, compute, [40.0]) == (pytest.approx(free[0]), pytest.approx(free[1]))
    last = max(free[1])
    for capacity in (8.0, 4.0, 2.0, 1.0, 0.5):
        end = max(shared_sweep(graph(waits), duration, compute, [capacity])[1])
        assert end >= last - 1e-9
        busy = sum(d for d, c in zip(duration, compute, strict=True) if c != ALONE)
        assert end >= busy / capacity - 1e-9
        last = end


def test_a_pipeline_on_half_as_many_cores() -> None:
    """Of 4 ranks on 2 cores the bubbles cost little: they are the time in which others run at full speed."""
    program = lower_training(Plan(pipeline=4), DEEP, Workload(sequence_length=4, global_batch=8))
    alone = simulate(program, UnitCosts()).makespan
    shared = simulate(program, UnitCosts(), resolved=resolve(program), capacities=[Capacity(frozenset({COMPUTE}), 2.0)])
    assert alone == 3 * (8 + 3)
    work = 4 * 3 * 8 / 2
    assert work < shared.makespan < 1.25 * work
    assert shared.peaks == simulate(program, UnitCosts()).peaks


@pytest.mark.parametrize("devices", [3, 8])
def test_more_workers_than_cores_are_searched_and_their_groups_measured_whole(devices: int) -> None:
    """A shared link joins any number of workers: also 8, which tensor parallelism could not share these heads among."""
    machine = two_workers()
    machine = replace(machine, device=replace(machine.device, cores=2), links=(replace(machine.links[0], size=0),))
    work = Workload(sequence_length=4, global_batch=24)
    found = search(Question(DEEP, work, machine, devices, {"recompute": ("none",)}), progress=lambda text: None)
    assert found.best.plan.world == devices
    assert any(reason.startswith("tensor must divide") for reason in found.space.infeasible)
    missing = unmeasured(Predictor(DEEP, work, machine), [Plan(data=devices, zero=1)])
    for ranks, works in missing.items():
        groups = {w.group for w in works if isinstance(w, Collective)}
        assert groups <= {ranks}, "a collective is measured by as many workers as it joins"
    assert devices in missing


def test_groups_of_more_accelerators_than_the_node_has_are_not_measured_on_it() -> None:
    machine = two_workers()
    machine = replace(machine, device=replace(machine.device, kind="cuda"))
    missing = unmeasured(Predictor(DEEP, Workload(sequence_length=4, global_batch=24), machine), [Plan(data=8, zero=1)])
    assert not any(isinstance(w, Collective) for works in missing.values() for w in works)
