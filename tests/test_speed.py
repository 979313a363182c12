"""How long programs take to make, resolve and simulate. `python -m tests.test_speed` prints the medians.

The targets are 50 ms of simulation for 25,000 instructions on one core, 150 ms to make and resolve them, 150 ms for
everything about a zero-bubble program of 16 stages and 128 micro-batches, and 2 ms for everything about a small plan
whose schedule has been seen. The bounds here are three times that (of the zero-bubble program one and a half times), on
the least disturbed of several runs and in processor time, because test machines are shared. A slower processor's time
counts as what the targets' own would have taken: by how long a fixed piece of plain Python takes right beside each run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import process_time

import pytest

from autotune.planners.lower import train
from autotune.planners.lower.train import lower_training
from autotune.planners.passes import columns
from autotune.planners.passes.compute import _stage_column
from autotune.planners.simulate import memory, resolve, simulate, sweep
from autotune.planners.validate import validate
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Instruction
from autotune.spec.workload import Workload

pytestmark = pytest.mark.alone

YARDSTICK_MS = 7.5  # the least of many on a core that makes the figures of docs/LOG.md
MODEL = ModelSpec("deep", "LlamaForCausalLM", 16, 32, 4, 4, 4, 24, 32)
LARGE = Plan(pipeline=16, schedule="interleaved-1f1b", chunks=2), Workload(sequence_length=8, global_batch=128)
SMALL = Plan(pipeline=8), Workload(sequence_length=8, global_batch=32)
ZERO_BUBBLE = {  # 16 stages, two on each of 8 ranks, and twice as many
    f"{name}, {ranks} ranks": Plan(pipeline=ranks, schedule=name, chunks=2)
    for ranks in (8, 16)
    for name in ("zb-v", "v-half", "dualpipe-v", "2bp-interleaved-fill")
}


class Costs:
    """Prices as a step's are: looked up by operation and stage."""

    by_stage = False

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return {"F": 1.0, "BW": 2.0}.get(instruction.op, 0.0)

    def transient(self, rank: int, instruction: Instruction) -> int:
        return 0

    def sent(self, rank: int, instruction: Instruction) -> int:
        return 1


class StageCosts(Costs):
    by_stage = True


@dataclass(frozen=True)
class Yard:
    """What the yardstick makes many of, as the planner makes instructions."""

    name: str
    number: int
    needs: tuple[int, ...]


def yardstick() -> int:
    """A fixed piece of work of the planner's kind: small frozen objects, tuples, dictionaries and a sort."""
    gc.disable()  # a collection would look through all that the tests have made
    made = [Yard(f"F{i % 7}", i, (i // 2, i // 3)) for i in range(6_000)]
    by_key = {(yard.name, yard.number): yard for yard in made}
    later = sorted(by_key.values(), key=lambda yard: (yard.name, -yard.number))
    found = sum(by_key[yard.name, yard.number].needs[0] for yard in later)
    gc.enable()
    return found


def spent_by(run: Callable[[], object]) -> float:
    start = process_time()
    run()
    return 1e3 * (process_time() - start)


def milliseconds(run: Callable[[], object], times: int) -> list[float]:
    """Processor time of each run, by as much less as this processor is slower than the targets' own at its best."""
    spent, yards = list[float](), list[float]()
    for _ in range(times):
        yards.append(spent_by(yardstick))
        spent.append(spent_by(run))
    return [each / max(1.0, min(yards) / YARDSTICK_MS) for each in spent]


def measure(plan: Plan, workload: Workload, times: int) -> dict[str, list[float]]:
    """Cold: nothing of the schedule is known. Seen: another plan had the same schedule, ranks and micro-batches."""
    lower_training(plan, MODEL, workload)  # the sizes of stages are known either way

    def cold() -> None:
        train._outlines.clear()
        lower_training(plan, MODEL, workload)

    def unresolved() -> None:
        program.ranks.memo.clear()  # type: ignore[attr-defined]
        resolve(program)

    found = {"lower, cold": milliseconds(cold, times)}
    program = lower_training(plan, MODEL, workload)
    found["resolve, cold"] = milliseconds(unresolved, times)
    resolved = resolve(program)
    durations = [1.0] * resolved.events
    found["sweep"] = milliseconds(lambda: sweep(resolved, durations), times)
    found["memory"] = milliseconds(lambda: memory(program, lambda rank, instruction: 0), times)
    found["simulate"] = milliseconds(lambda: simulate(program, Costs(), resolved=resolved), times)

    def plan_seen() -> None:
        again = lower_training(plan, MODEL, workload)
        simulate(again, StageCosts(), resolved=resolve(again))

    found["lower, resolve and simulate, seen"] = milliseconds(plan_seen, times)
    return found


def zero_bubble(plan: Plan, times: int) -> list[float]:
    """Everything about a program of which nothing is known, not even the order."""
    lower_training(plan, MODEL, LARGE[1])

    def cold() -> None:
        for known in (train._order, train.kind_of, columns.named, _stage_column):
            known.cache_clear()
        train._outlines.clear()
        program = lower_training(plan, MODEL, LARGE[1])
        validate(program)
        simulate(program, StageCosts())

    return milliseconds(cold, times)


def test_a_large_program() -> None:
    program = lower_training(*(LARGE[0], MODEL, LARGE[1]))
    assert len(program) > 24_000
    best = {what: min(spent) for what, spent in measure(*LARGE, 5).items()}
    assert best["simulate"] <= 3 * 50
    assert best["sweep"] + best["memory"] <= 3 * 50
    assert best["lower, cold"] + best["resolve, cold"] <= 3 * 150
    assert best["lower, resolve and simulate, seen"] <= 3 * 50


def test_a_zero_bubble_program() -> None:
    plan = ZERO_BUBBLE["zb-v, 8 ranks"]
    assert len(lower_training(plan, MODEL, LARGE[1])) == 13_328
    assert min(zero_bubble(plan, 5)) <= 1.5 * 150


def test_a_small_program() -> None:
    best = {what: min(spent) for what, spent in measure(*SMALL, 20).items()}
    assert best["lower, resolve and simulate, seen"] <= 3 * 2
    assert best["lower, cold"] + best["resolve, cold"] + best["simulate"] <= 3 * 12


def test_what_is_remembered_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outlines used last are kept, as many as are small enough together; one alone may be larger."""
    monkeypatch.setattr(train, "MOST_INSTRUCTIONS", 5_000)
    train._outlines.clear()
    for items in range(8, 104, 8):
        lower_training(Plan(pipeline=8), MODEL, Workload(sequence_length=8, global_batch=items))
        lower_training(*SMALL[:1], MODEL, SMALL[1])
        held = [sum(map(len, outline.ranks)) for outline in train._outlines.values()]
        assert sum(held) <= 5_000 and list(train._outlines)[-1].pipe.items == 32
    assert len(train._outlines) < 12
    first = lower_training(SMALL[0], MODEL, SMALL[1])
    assert lower_training(SMALL[0], MODEL, SMALL[1]).ranks is first.ranks
    lower_training(LARGE[0], MODEL, LARGE[1])
    assert len(train._outlines) == 1


@pytest.mark.parametrize(
    "sized", [Workload(sequence_length=8, global_batch=32), Workload(sequence_length=64, global_batch=32)]
)
def test_plans_that_share_an_outline_keep_their_own_bytes(sized: Workload) -> None:
    alone = lower_training(SMALL[0], MODEL, sized)
    train._outlines.clear()
    fresh = lower_training(SMALL[0], MODEL, sized)
    assert alone.buffers == fresh.buffers and alone.ranks == fresh.ranks
    assert simulate(alone, Costs()) == simulate(fresh, StageCosts())


if __name__ == "__main__":
    for name, shape, count in (("large", LARGE, 15), ("small", SMALL, 200)):
        size = len(lower_training(shape[0], MODEL, shape[1]))
        print(f"{name}: {size} instructions; milliseconds, median (least)")
        for what, spent in measure(*shape, count).items():
            print(f"  {what:36} {median(spent):8.2f} ({min(spent):.2f})")
    yards = [spent_by(yardstick) for _ in range(50)]
    print(f"yardstick {median(yards):.2f} ({min(yards):.2f})")
    print("zero bubble: order, passes, check and simulation of a program of which nothing is known")
    for name, plan in ZERO_BUBBLE.items():
        spent, size = zero_bubble(plan, 15), len(lower_training(plan, MODEL, LARGE[1]))
        print(f"  {f'{name}, {size} instructions':46} {median(spent):8.2f} ({min(spent):.2f})")
