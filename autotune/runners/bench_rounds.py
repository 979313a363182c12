"""How often and how hot a body runs while its operations are timed: in rounds back to back, or each held for the host.

A device alone between rounds is faster than in a step, where it keeps to its power limit. So it is heated with the body
itself; and where the host cannot issue as fast as the device computes, the body as a CUDA graph fills the time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from autotune.runners.clock import Clock
from autotune.spec.program import Program

ROUNDS, WARM = 12, 3  # passes through a block that count, and those before them
MOST_HELD_S = 0.5  # that a device is kept busy while the host issues
ENOUGH_S, FEWEST = 0.6, 6  # on CUDA a long body runs fewer rounds: as many as fit this time, but at least so many
HEAT_S, QUEUED = 0.5, 4  # a device under load slows until it keeps to its power limit; rounds issued before a look
HEATED, SLOWING = 4, 1.02  # times that a body heats the device at most, and what the later half of rounds may take
AHEAD = 2.0  # the device takes so many times what issuing takes: the host is well ahead

Stamps = list[tuple[Program, list[Any]]]  # of one round: the programs that ran, and the marks between their calls


class Bench(Protocol):
    """A body made ready to run in rounds, each through one of its chains of copies."""

    device: torch.device
    clock: Clock
    chains: list[list[Any]]

    def input(self) -> Tensor: ...

    def round(self, number: int) -> Stamps: ...

    def through(self, chain: Sequence[Any], x: Tensor, clock: Clock) -> Stamps: ...

    def seconds(self, rounds: Sequence[Stamps]) -> float: ...


def hot_rounds(bench: Bench) -> list[Stamps]:
    """Rounds one after another on a CUDA device that has done nothing else for a while, so that its clocks are those
    of a step; none where the host cannot keep ahead of it."""
    rounds: list[Stamps] = []
    for _ in range(HEATED):
        begun, before = time.perf_counter(), 0
        while time.perf_counter() - begun < HEAT_S:
            bench.round(before)
            before += 1
            if before % QUEUED == 0:
                bench.clock.settle()
        many = WARM + max(FEWEST, min(ROUNDS, int(ENOUGH_S * before / HEAT_S)))
        issuing = time.perf_counter()
        rounds = [bench.round(number) for number in range(many)]
        issued = time.perf_counter() - issuing
        bench.clock.settle()
        if bench.seconds(rounds) < AHEAD * issued:
            return []
        rounds = rounds[WARM:]
        half = len(rounds) // 2
        if bench.seconds(rounds[half:]) / (len(rounds) - half) < SLOWING * bench.seconds(rounds[:half]) / half:
            break
    return rounds


@dataclass(frozen=True)
class Untimed(Clock):
    """No marks: what is captured cannot be timed from inside."""

    def mark(self, stream: Any = None) -> Any:
        return None


@dataclass(frozen=True)
class _Filler:
    """A round as a CUDA graph, which takes the host next to nothing: it keeps a device as busy as a step does."""

    graph: Any
    input: Tensor  # the graph reads it where it lies
    seconds: float  # of one replay

    @classmethod
    def of(cls, bench: Bench) -> _Filler | None:
        """None where the body cannot be captured. The bench has run a round before: libraries are ready."""
        graph: Any = torch.cuda.CUDAGraph()
        x, clock = bench.input(), bench.clock
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                bench.through(bench.chains[0], x, Untimed(bench.device))
        except RuntimeError:
            return None
        graph.replay()
        begin = clock.mark()
        graph.replay()
        end = clock.mark()
        clock.settle()
        return cls(graph, x, clock.between(begin, end))

    def fill(self, seconds: float) -> None:
        for _ in range(max(1, -int(-seconds // self.seconds))):
            self.graph.replay()


def held_rounds(bench: Bench, visits: int = 1) -> list[Stamps]:
    """Rounds that each wait until the host has issued them: on CUDA behind the same work, as hot as in a step. Those
    of one of so many `visits` of the bench."""
    length = len(bench.chains[0])
    warm, counted = -(-WARM // length), -(-ROUNDS // (length * visits))
    issue, rounds = 0.0, list[Stamps]()
    filler = None
    if bench.device.type == "cuda":
        bench.round(0)
        filler = _Filler.of(bench)
    hold = filler.fill if filler else bench.clock.hold
    hold(HEATED * HEAT_S if filler else 0.0)
    for number in range(warm + counted):
        hold(issue)
        issuing = time.perf_counter()
        rounds.append(bench.round(number))
        issue = min(MOST_HELD_S, 1.5 * (time.perf_counter() - issuing))
        bench.clock.settle()
    return rounds[warm:]
