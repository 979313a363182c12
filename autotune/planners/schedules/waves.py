"""Lays out F, B and W in rounds under a memory limit: the heuristic of Zero Bubble (2401.10241, section 3.1).

Every rank starts with the forwards that fit before its first B arrives and within the limit. Then come the rounds: B
goes up the ranks, F goes down them, and W fills the waits or frees memory. Where the paper leaves a choice open,
`Choices` takes it one way or the other.
"""

from __future__ import annotations

from typing import NamedTuple

from autotune.planners.schedules.schedule import Order, Pipe, Step

_CLOSE = 1e-9  # relative to durations and activations: rounding must not decide whether something fits


class Choices(NamedTuple):
    """What the search tries both ways."""

    early: bool  # one more warm-up forward where it delays the first B
    fill: bool  # a W in a wait that is shorter than it, where waiting would raise the longest wait of all ranks
    skip: bool  # no forward this round where the rank is two or more ahead of the next one


class Board:
    """The order while it is made: each rank's steps, clock, waiting time and the ends of its F and B."""

    def __init__(self, pipe: Pipe, limit: float, choices: Choices) -> None:
        self.pipe, self.limit, self.choices = pipe, limit, choices
        self.order: Order = [[] for _ in range(pipe.ranks)]
        self.clock = [0.0] * pipe.ranks
        self.waited = [0.0] * pipe.ranks
        self.ends: dict[str, list[list[float]]] = {op: [[] for _ in range(pipe.ranks)] for op in "FBW"}

    def count(self, op: str, rank: int) -> int:
        return len(self.ends[op][rank])

    def pending(self, rank: int) -> int:
        """Weight gradients that could run now."""
        return self.count("B", rank) - self.count("W", rank)

    def full(self, rank: int) -> bool:
        """Whether one more forward would break the limit."""
        whole = self.count("F", rank) - self.count("B", rank)
        return whole + 1 + self.pipe.kept * self.pending(rank) > self.limit + _CLOSE

    def ready(self, op: str, rank: int) -> float:
        """When the inputs of a rank's next F or B are there (its own F ended before, as it came first)."""
        peer = rank - 1 if op == "F" else rank + 1
        if not 0 <= peer < self.pipe.ranks:
            return 0.0
        return self.ends[op][peer][self.count(op, rank)] + self.pipe.times.hop

    def put(self, op: str, rank: int, ready: float = 0.0) -> None:
        """Appends a rank's next F, B or W."""
        begin = max(self.clock[rank], ready)
        if self.order[rank]:
            self.waited[rank] += begin - self.clock[rank]
        self.clock[rank] = begin + self.pipe.times.of(op, rank)
        self.order[rank].append(Step(op, rank, self.count(op, rank)))
        self.ends[op][rank].append(self.clock[rank])

    def put_after_weights(self, op: str, rank: int) -> None:
        """An F or a B, after the weight gradients that there is time for until its inputs are there."""
        ready = self.ready(op, rank)
        while self.pending(rank) and ready > self.clock[rank]:
            wait = ready - self.clock[rank]
            worst = self.waited[rank] + wait > max(self.waited)
            if wait < self.pipe.times.of("W", rank) - _CLOSE and not (self.choices.fill and worst):
                break
            self.put("W", rank)
        self.put(op, rank, ready)

    def warm_up(self) -> None:
        """The forwards before the first B: each rank at least one more than the next, as long as there are any."""
        p, m, times = self.pipe.ranks, self.pipe.items, self.pipe.times
        turn = sum(times.of("F", rank) for rank in range(p)) + times.hop * (p - 1)  # the last rank's first B
        for rank in range(p):
            above = self.count("F", rank - 1) if rank else m
            least, most = min(above, p - rank), above if above == m else above - 1
            first_b = turn + sum(times.of("B", later) + times.hop for later in range(rank + 1, p))
            for count in range(above):
                begin = max(self.clock[rank], self.ready("F", rank))
                room = first_b - begin
                fits = count < most and room > (0 if self.choices.early else times.of("F", rank) - 2 * _CLOSE) + _CLOSE
                if self.full(rank) or (count >= least and not fits):
                    break
                self.put("F", rank, begin)

    def round(self) -> None:
        """One B on every rank, the last rank first, then one F on every rank that may."""
        p, m = self.pipe.ranks, self.pipe.items
        for rank in reversed(range(p)):
            self.put_after_weights("B", rank)
        for rank in range(p):
            done = self.count("F", rank)
            ahead = self.count("F", rank - 1) if rank else m
            if done == m or ahead == done:
                continue
            if self.choices.skip and rank < p - 1 and done - self.count("F", rank + 1) >= 2:
                continue
            while self.full(rank) and self.pending(rank):
                self.put("W", rank)
            if not self.full(rank):
                self.put_after_weights("F", rank)


def laid_out(pipe: Pipe, limit: float, choices: Choices) -> Order:
    """The order that the rounds give for a pipe of one chunk a rank; `limit` in chunk activations, at least 1."""
    board = Board(pipe, limit, choices)
    board.warm_up()
    for _ in range(pipe.items):
        board.round()
    for rank in range(pipe.ranks):
        while board.pending(rank):
            board.put("W", rank)
    return board.order
