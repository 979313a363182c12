"""Closed forms of makespan and peak activations at unit cost, of every schedule that has one, on the lowered program.

The programs are those that run: messages, gradient sums and updates included, each of which costs nothing here. A
schedule joins by being in the table.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.lower.traits import pipe_of
from autotune.planners.resolve import resolve
from autotune.planners.schedules import SCHEDULES
from autotune.planners.simulate import memory, simulate
from autotune.planners.validate import validate
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Buffer, Instruction
from autotune.spec.workload import Workload

SEARCHED = [name for name, entry in SCHEDULES.items() if entry.searched]
DEEP = ModelSpec("deep", "LlamaForCausalLM", 8, 64, 2, 2, 4, 8, 16)
SMALL = 8  # forwards of one rank in a step: longer ones run with the first and the last value of a schedule's own axes
SECONDS = {"F": 1.0, "B": 1.0, "W": 1.0, "BW": 2.0}


class UnitCosts:
    """F, B and W of a chunk take one unit; everything else takes no time."""

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return SECONDS.get(instruction.op, 0.0)

    def transient(self, rank: int, instruction: Instruction) -> int:
        return 0

    def sent(self, rank: int, instruction: Instruction) -> int:
        return 0


def plans(name: str) -> list[tuple[Plan, Workload]]:
    """The legal plans of a grid of ranks, micro-batches, chunks and the schedule's own axes."""
    entry, found = SCHEDULES[name], []
    for p, m, v in product((1, 2, 3, 4, 8), (1, 2, 3, 4, 6, 8, 16, 24), entry.chunks):
        plan, work = Plan(pipeline=p, schedule=name, chunks=v), Workload(sequence_length=4, global_batch=m)
        pipe = pipe_of(plan, m)
        if p * v > DEEP.layers or entry.refuse(pipe):
            continue
        axes = entry.groups(pipe), entry.limits(pipe)
        if m * v > SMALL:
            axes = axes[0][:: max(1, len(axes[0]) - 1)], axes[1][:: max(1, len(axes[1]) - 1)]
        for group, limit in product(*axes):
            chosen = replace(plan, group=group, limit=limit)
            if why_not(DEEP, work, chosen, p) is None:
                found.append((chosen, work))
    assert found, name
    return found


@pytest.mark.parametrize("name", SEARCHED)
def test_makespan_and_peak(name: str) -> None:
    entry = SCHEDULES[name]
    for plan, work in plans(name):
        program, pipe = lower_training(plan, DEEP, work), pipe_of(plan, work.global_batch)
        expected = entry.makespan(pipe) if entry.makespan else None
        line = simulate(program, UnitCosts())
        if expected is not None:
            assert line.makespan == expected, plan.describe()
        busy = 3.0 * plan.chunks * work.global_batch
        assert [line.busy(rank) for rank in range(plan.pipeline)] == [busy] * plan.pipeline
        # One byte for what each chunk activation leaves from its forward to its last backward, nothing else.
        ones = tuple(
            {n: Buffer(int(n[:2] == "k."), persistent=b.persistent) for n, b in h.items()} for h in program.buffers
        )
        walked = memory(replace(program, buffers=ones), lambda rank, instruction: 0)
        peak = entry.peak(pipe) if entry.peak else None
        if peak is not None:
            assert [max(tiers["device"]) for tiers in walked] == peak, plan.describe()


@pytest.mark.parametrize("name", SEARCHED)
def test_every_program_is_sound(name: str) -> None:
    for plan, work in plans(name)[::7]:
        program = lower_training(plan, DEEP, work)
        validate(program)
        resolve(program, inline=True)
