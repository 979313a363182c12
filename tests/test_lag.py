"""Lag at both ends: an instruction with lag k reads the version of k steps ago, simulated and executed.

A version is what one step writes. Before there are k of them the oldest there is stands in: what was there at the
start, if the buffer was, else the first that was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from autotune.planners.simulate import memory, simulate
from autotune.planners.validate import validate
from autotune.runners.interpreter import Interpreter, Started
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.timeline import Timeline

I = Instruction
CPU = torch.device("cpu")
RATE = 0.1


def delayed(lag: int) -> Program:
    """Gradient descent with the gradient of k steps ago (PipeDream-2BW's rule for k = 1, 2006.09503):
    w(t+1) = w(t) - rate x slope(w(t-k))."""
    listing = (
        I("SLOPE", reads=("w",), writes=("g",), lag=lag),
        I("UPDATE", reads=("w", "g"), writes=("w",), frees=("g",)),
    )
    return Program((listing,), ({"w": Buffer(8, persistent=True), "g": Buffer(8)},))


def slope(instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
    return (2 * values["w"] - 3,)


def update(instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
    return (values["w"] - RATE * values["g"],)


def recurrence(start: Any, lag: int, steps: int) -> list[Any]:
    """The same in plain Python."""
    w = [start]
    for t in range(steps):
        w.append(w[t] - RATE * (2 * w[max(0, t - lag)] - 3))
    return w[1:]


def run(program: Program, operations: Mapping[str, Any], values: dict[str, Any], steps: int, watch: str) -> list[Any]:
    """The value of `watch` after each step."""
    interpreter = Interpreter(program, 0, operations, values, CPU)
    seen = []
    for _ in range(steps):
        interpreter.step()
        seen.append(interpreter.values[watch])
    return seen


def test_lag_0_is_exact() -> None:
    operations = {"SLOPE": slope, "UPDATE": update}
    assert run(delayed(0), operations, {"w": 4.0}, 6, "w") == recurrence(4.0, 0, 6)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_delayed_gradients_equal_the_recurrence(lag: int) -> None:
    operations = {"SLOPE": slope, "UPDATE": update}
    assert run(delayed(lag), operations, {"w": 4.0}, 8, "w") == recurrence(4.0, lag, 8)
    start = torch.tensor([4.0, -1.0], dtype=torch.float64)
    tensors = run(delayed(lag), operations, {"w": start}, 8, "w")
    for ours, expected in zip(tensors, recurrence(start, lag, 8), strict=True):
        assert torch.equal(ours, expected)


def passing(lag: int, before: bool) -> Program:
    """A step makes h and reads the h of k steps ago, before or after it has made its own; h does not persist."""
    make = I("MAKE", reads=("t",), writes=("h", "t"))
    use = I("USE", reads=("h",), writes=("seen",), frees=() if lag else ("h",), lag=lag)
    names = {"t": Buffer(8, persistent=True), "h": Buffer(16), "seen": Buffer(8, persistent=True)}
    return Program(((use, make) if before else (make, use),), (names,))


OPERATIONS = {
    "MAKE": lambda instruction, values: (float(values["t"]), values["t"] + 1),
    "USE": lambda instruction, values: (values["h"],),
}


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_the_version_of_k_steps_ago(lag: int) -> None:
    """Step t makes h = t. After it, lag 0 reads t and lag k reads t - k, or the first while there is none so old."""
    program = passing(lag, before=False)
    validate(program)
    seen = run(program, OPERATIONS, {"t": 0}, 9, "seen")
    assert seen == [max(0, t - lag) for t in range(9)]


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_lag_counts_from_what_a_plain_read_would_give(lag: int) -> None:
    """Read before the step makes its own, the newest is the last step's: lag k is k steps older than that."""
    seen = run(passing(lag, before=True), OPERATIONS, {"t": 0}, 9, "seen")
    assert seen[0] is None  # nothing has ever been made: the operation sees that there is nothing
    assert seen[1:] == [max(0, t - 1 - lag) for t in range(1, 9)]


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_old_versions_are_counted(lag: int) -> None:
    """delayed: w is there k + 1 times, the gradient of 8 comes and goes; passing: k old h of 16, then one more."""
    zero = lambda rank, instruction: 0  # noqa: E731
    assert memory(delayed(lag), zero)[0]["device"] == [8 * (1 + lag) + 8] * 2
    if lag:
        assert memory(passing(lag, before=False), zero)[0]["device"] == [16 * (1 + lag) + 16] * 2
        assert memory(passing(lag, before=True), zero)[0]["device"] == [16 * lag + 16, 16 * (1 + lag) + 16]


# In time


@dataclass
class Seconds:
    table: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, rank: int, instruction: Instruction) -> float:
        return self.table[instruction.op]

    def transient(self, rank: int, instruction: Instruction) -> int:
        return 0

    def sent(self, rank: int, instruction: Instruction) -> int:
        return 0


def exchange(lag: int) -> Program:
    """Each step gathers s on a lane and computes with what was gathered k steps ago (DistriFusion, 2402.19481, for
    k = 1): the newest gather runs beside the compute."""
    listing = (
        I("GATHER", lane="net", reads=("s",), writes=("h",)),
        I("F", reads=("h",), writes=("y",), lag=lag),
        I("NEXT", reads=("y",), writes=("s",), frees=("y",)),
    )
    return Program((listing,), ({"s": Buffer(4, persistent=True), "h": Buffer(16), "y": Buffer(4)},))


def spans(line: Timeline, op: str) -> list[tuple[float, float]]:
    return [(s.start, s.end) for s in line.spans if line.instruction(s).op == op]


@pytest.mark.parametrize(("gather", "compute"), [(3.0, 5.0), (5.0, 3.0)])
def test_lag_hides_what_lag_0_waits_for(gather: float, compute: float) -> None:
    steps, costs = 6, Seconds({"GATHER": gather, "F": compute, "NEXT": 0.0})
    waiting = simulate(exchange(0), costs, steps=steps)
    assert waiting.makespan == steps * (gather + compute)
    line = simulate(exchange(1), costs, steps=steps)
    # Both start as soon as the gather and the compute of the step before are over.
    period = max(gather, compute)
    assert line.makespan == steps * period
    assert spans(line, "F") == [(t * period, t * period + compute) for t in range(steps)]
    assert spans(line, "GATHER") == [(t * period, t * period + gather) for t in range(steps)]


def test_a_lagged_read_waits_for_the_version_that_it_reads() -> None:
    """With lag k the compute of step t starts with the gather of step t - k done, however slow gathers are."""
    for lag in (1, 2, 3):
        listing = (I("GATHER", lane="net", writes=("h",)), I("F", reads=("h",), lag=lag))
        program = Program((listing,), ({"h": Buffer(4)},))
        line = simulate(program, Seconds({"GATHER": 4.0, "F": 1.0}), steps=8)
        gathers, computes = spans(line, "GATHER"), spans(line, "F")
        for t in range(8):
            before = computes[t - 1][1] if t else 0.0
            assert computes[t][0] == max(before, gathers[t - lag][1] if t >= lag else 0.0)


def test_a_lagged_read_does_not_wait_for_the_newest_version() -> None:
    """Executed: the gather of this step is still in flight while the compute reads the last one."""
    events: list[str] = []

    class Handle:
        def wait(self) -> None:
            events.append("arrived")

    def gather(instruction: Instruction, values: Mapping[str, Any]) -> Started:
        events.append("gather")
        return Started((values["s"] + 1,), Handle())

    def compute(instruction: Instruction, values: Mapping[str, Any]) -> tuple[Any, ...]:
        events.append("compute")
        return (values["h"],)

    operations = {"GATHER": gather, "F": compute, "NEXT": lambda instruction, values: (values["y"],)}
    interpreter = Interpreter(exchange(1), 0, operations, {"s": 0.0}, CPU)
    interpreter.step()
    events.clear()
    interpreter.step()
    assert events[:3] == ["gather", "compute", "arrived"]
