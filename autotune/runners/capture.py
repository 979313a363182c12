"""What computes, captured once in a CUDA graph and replayed: one launch where the host issued hundreds.

A whole step where it sends nothing, else each of its operations, which also is what a trace can tell apart. Decoding a
token takes less time on the device than issuing its kernels takes the host. What an operation reads and writes must lie
where it lay when it was captured: what persists does, and what does not is copied there first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autotune.runners.interpreter import Operation
from autotune.spec.errors import RunError
from autotune.spec.program import Instruction


@dataclass
class _Graph:
    """One instruction as captured: what it read, what it made, and the graph that makes it again."""

    reads: tuple[Any, ...]
    made: tuple[Any, ...]
    graph: Any

    def replay(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for place, value in zip(self.reads, given, strict=True):
            if value is not place:
                place.copy_(value)
        self.graph.replay()
        return self.made


@dataclass
class Captured:
    """`operation`, captured for each instruction at its second call.

    The first runs as it is, for libraries allocate and choose their kernels then. `pool`: the memory that graphs which
    never run at the same time may share.
    """

    operation: Operation
    pool: Any
    _seen: set[Instruction] = field(default_factory=set)
    _graphs: dict[Instruction, _Graph] = field(default_factory=dict)

    def __call__(self, instruction: Instruction, values: Mapping[str, Any]) -> Any:
        given = tuple(values[name] for name in instruction.reads)
        if instruction in self._graphs:
            return self._graphs[instruction].replay(given)
        if instruction not in self._seen:
            self._seen.add(instruction)
            return self.operation(instruction, values)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            made = self.operation(instruction, values)
        if not isinstance(made, tuple):
            raise RunError(f"{instruction.label} does not end when it returns: it cannot be captured")
        found = self._graphs[instruction] = _Graph(given, made, graph)
        return found.replay(given)


@dataclass
class CapturedStep:
    """All instructions of a rank's step as one graph, captured at its second call; the first runs them as they are.

    Everything that outlives the step is changed where it lies, so that nothing but the device's memory need be handed
    from one step to the next.
    """

    listing: Sequence[Instruction]
    operations: Mapping[str, Operation]
    values: Mapping[str, Any]  # what persists; what a step makes beside it lives in the graph's own memory
    pool: Any
    _graph: Any = None
    _called: bool = False

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif not self._called:
            self._called = True
            self._run()
        else:
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self._run()
            self._graph = graph
            graph.replay()

    def _run(self) -> None:
        values = dict(self.values)
        for instruction in self.listing:
            made = self.operations[instruction.op](instruction, values)
            if not isinstance(made, tuple):
                raise RunError(f"{instruction.label} does not end when it returns: it cannot be captured")
            values.update(zip(instruction.writes, made, strict=True))
            for name in instruction.frees:
                del values[name]
