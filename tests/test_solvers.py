"""The scheduler as a solver: against plain enumeration, the table's own orders, published figures and its bounds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import permutations, product
from random import Random

import pytest

from autotune.planners.schedules import SCHEDULES
from autotune.planners.schedules.schedule import Order, Pipe, Place, Step, linear, wave
from autotune.planners.schedules.solved import limits, place, refuse, shop, solved, words
from autotune.planners.schedules.times import UNIT, Times
from autotune.planners.schedules.timing import peaks, timed
from autotune.planners.solvers.bound import bound
from autotune.planners.solvers.exact import branch_and_bound
from autotune.planners.solvers.shop import least_peak
from autotune.planners.solvers.solve import Budget, heuristic, solve
from autotune.planners.solvers.sweep import critical, fits, sweep


def random_times(random: Random, stages: int) -> Times:
    """F, B and W of each stage and a hop, in sixteenths, so that sums are exact."""
    columns = [tuple(random.randint(8, 32) / 16 for _ in range(stages)) for _ in range(3)]
    return Times(columns[0], columns[1], columns[2], random.choice((0.0, 2 / 16, 8 / 16)))


def legal(steps: tuple[Step, ...], stages: int) -> bool:
    """Whether one rank's steps do not wait for what they themselves do later."""
    at = {step: position for position, step in enumerate(steps)}
    for (op, stage, item), position in at.items():
        for later in {"F": [Step("B", stage, item)], "B": [Step("W", stage, item)], "W": []}[op]:
            if at[later] < position:
                return False
        for other in range(stages):  # chunks of the same rank
            if op == "F" and other > stage and at.get(Step("F", other, item), position) < position:
                return False
            if op == "B" and other < stage and at.get(Step("B", other, item), position) < position:
                return False
    return True


def rank_orders(held: list[int], items: int, stages: int, in_order: bool) -> Iterator[tuple[Step, ...]]:
    """Every order of one rank's steps; `in_order`: those with the micro-batches of each stage and kind in order."""
    if not in_order:
        steps = [Step(op, stage, item) for op in "FBW" for stage in held for item in range(items)]
        yield from (order for order in permutations(steps) if legal(order, stages))
        return
    kinds = [(op, stage) for op in "FBW" for stage in held]

    def grow(done: dict[tuple[str, int], int], order: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
        if len(order) == len(kinds) * items:
            yield order
        for op, stage in kinds:
            k = done[op, stage]
            before = {"F": items, "B": done["F", stage], "W": done["B", stage]}[op]
            if k < min(items, before):
                yield from grow({**done, (op, stage): k + 1}, (*order, Step(op, stage, k)))

    yield from (order for order in grow(dict.fromkeys(kinds, 0), ()) if legal(order, stages))


def enumerated(pipe: Pipe, where: Place, in_order: bool, kept: float = 1.0) -> tuple[float, float, float]:
    """(least makespan, least longest rank, least peak) over every order under the pipe's limit."""
    lists = []
    for rank in range(pipe.ranks):
        held = [stage for stage, ranks in enumerate(where) if ranks == (rank,)]
        every = rank_orders(held, pipe.items, pipe.stages, in_order)
        lists.append([list(order) for order in every if not pipe.limit or peaks([list(order)], kept)[0] <= pipe.limit])
    makespan = longest = peak = float("inf")
    for order in product(*lists):
        try:
            timing = timed(list(order), pipe)
        except ValueError:  # ranks that wait for each other
            continue
        makespan, longest = min(makespan, timing.makespan), min(longest, timing.longest_rank)
        peak = min(peak, max(peaks(list(order))))
    return makespan, longest, peak


def checked(pipe: Pipe, order: Order, kept: float = 1.0) -> float:
    """The makespan of an order that is complete and keeps the limit."""
    for rank, steps in enumerate(order):
        held = [stage for stage, ranks in enumerate(place(pipe)) if ranks == (rank,)]
        assert sorted(steps) == sorted(Step(op, s, i) for op in "FBW" for s in held for i in range(pipe.items))
    assert not pipe.limit or max(peaks(order, kept)) <= pipe.limit + 1e-9
    return timed(order, pipe).makespan


SMALL = [
    *((2, 2, 1, limit, False) for limit in (0, 1, 2)),
    *((2, 3, 1, limit, True) for limit in (0, 1, 2, 3)),
    *((3, 2, 1, limit, True) for limit in (0, 1, 2)),
    *((2, 1, 2, limit, False) for limit in (0, 2)),
    (1, 4, 1, 2, True),
]


@pytest.mark.parametrize(("ranks", "items", "chunks", "limit", "in_order"), SMALL)
@pytest.mark.parametrize("seed", range(4))
def test_exact_equals_enumeration(ranks: int, items: int, chunks: int, limit: int, in_order: bool, seed: int) -> None:
    """At random times; with `in_order` false the enumeration lets micro-batches overtake each other."""
    times = random_times(Random(f"{ranks} {items} {chunks} {limit} {seed}"), ranks * chunks)
    pipe = Pipe(ranks, items, chunks, limit=limit, times=times)
    makespan, longest, _ = enumerated(pipe, place(pipe), in_order)
    found = solved(pipe, place(pipe))
    assert found.optimal and found.value == pytest.approx(makespan, abs=1e-9)
    assert checked(pipe, found.order) == pytest.approx(makespan, abs=1e-9)
    span = solved(pipe, place(pipe), longest_rank=True)
    assert span.optimal and timed(span.order, pipe).longest_rank == pytest.approx(longest, abs=1e-9)


@pytest.mark.parametrize(
    ("ranks", "items", "chunks", "limit"), [(2, 3, 1, 2), (3, 2, 1, 2), (1, 2, 2, 3), (2, 2, 2, 3)]
)
def test_branch_and_bound_alone(ranks: int, items: int, chunks: int, limit: int) -> None:
    """With nothing to start from it finds what the whole finds, and without its floor it proves it."""
    for seed in range(6):
        times = random_times(Random(seed), ranks * chunks)
        pipe = Pipe(ranks, items, chunks, limit=limit, times=times)
        problem = shop(pipe, place(pipe))
        alone = branch_and_bound(problem, float("inf"), 0.0, 500_000)
        assert alone.complete and alone.words is not None
        assert alone.value == pytest.approx(solve(problem).value, abs=1e-9)
        swept = sweep(problem, alone.words)
        assert swept is not None and swept.value == pytest.approx(alone.value, abs=1e-9)


def every_state(pipe: Pipe, where: Place) -> float:
    """The least makespan over all semi-active schedules with micro-batches in order: any rank's any next step, each
    set of states (steps done and when) once. No bound, no dominance, no choice of a rank."""
    stages, items, hop = pipe.stages, pipe.items, pipe.times.hop
    rank = [ranks[0] for ranks in where]
    state: set[tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {(((),) * (3 * stages), (0.0,) * pipe.ranks)}
    for _ in range(3 * stages * items):
        grown = set()
        for ends, clocks in state:
            held = [0] * pipe.ranks
            for s in range(stages):
                held[rank[s]] += len(ends[s]) - len(ends[2 * stages + s])
            for letter in range(3 * stages):
                kind, s = divmod(letter, stages)
                k, r = len(ends[letter]), rank[s]
                needs = {
                    0: [s - 1] if s else [],
                    1: [s, *([stages + s + 1] if s < stages - 1 else [])],
                    2: [stages + s],
                }[kind]
                if k == items or any(len(ends[n]) <= k for n in needs):
                    continue
                if kind == 0 and pipe.limit and held[r] == pipe.limit:
                    continue
                ready = [ends[n][k] + (hop if rank[n % stages] != r else 0.0) for n in needs]
                end = max([clocks[r], *ready]) + pipe.times.of("FBW"[kind], s)
                new = [list(times) for times in ends]
                new[letter].append(end)
                for n in needs:  # an end that all who wait for it have used is forgotten
                    who = [n + 1] if n < stages - 1 else []
                    who += [n + stages] if n < 2 * stages else []
                    who += [n - 1] if stages < n < 2 * stages else []
                    if all(len(new[w]) > k for w in who):
                        new[n][k] = 0.0
                if kind == 2:
                    new[letter][k] = 0.0
                grown.add((tuple(map(tuple, new)), (*clocks[:r], end, *clocks[r + 1 :])))
        state = grown
    return min(max(clocks) for _, clocks in state)


@pytest.mark.parametrize("limit", [2, 3])
@pytest.mark.parametrize("of", [wave, linear])
def test_two_chunks_equal_every_state(limit: int, of: Callable[[Pipe], Place]) -> None:
    """Two chunks on two ranks: with a limit a forward may have to let another one pass."""
    for seed in range(2):
        pipe = Pipe(2, 2, 2, limit=limit, times=random_times(Random(seed), 4))
        problem = shop(pipe, of(pipe))
        alone = branch_and_bound(problem, float("inf"), 0.0, 1_000_000)
        assert alone.complete and alone.value == pytest.approx(every_state(pipe, of(pipe)), abs=1e-9)


def test_a_forward_lets_another_one_pass() -> None:
    """Where every rank takes what it can start at once, the makespan of this pipe is 27.0625: its slot is needed."""
    pipe = Pipe(2, 3, 2, limit=3, times=random_times(Random(25), 4))
    found = solved(pipe, wave(pipe))
    assert found.optimal and checked(pipe, found.order) == found.value == 25.625


@pytest.mark.parametrize(("ranks", "items", "chunks"), [(1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)])
@pytest.mark.parametrize("of", [linear, wave])
def test_least_peak_is_the_enumerations(ranks: int, items: int, chunks: int, of: Callable[[Pipe], Place]) -> None:
    pipe = Pipe(ranks, items, chunks)
    assert least_peak([r[0] for r in of(pipe)]) == enumerated(pipe, of(pipe), in_order=items > 1)[2] == chunks


def test_limit_below_the_least_peak_is_refused() -> None:
    assert refuse(Pipe(4, 8, 2, limit=1)) == "a limit of at least 2 chunk activations (found 1; nearest 2)"
    with pytest.raises(ValueError, match="nearest 2"):
        solved(Pipe(4, 8, 2, limit=1), wave(Pipe(4, 8, 2)))
    assert refuse(Pipe(4, 8, 2, limit=2)) is None and refuse(Pipe(4, 8, 1, limit=1)) is None
    assert refuse(Pipe(4, 8, 3)) == "one or two chunks a rank (found 3; nearest 2)"


@pytest.mark.parametrize(("ranks", "items"), [(2, 3), (3, 7), (4, 4), (4, 16), (8, 16)])
def test_not_worse_than_the_tables_orders(ranks: int, items: int) -> None:
    """Against 1F1B and GPipe with W right after B, each under the memory that it needs itself."""
    random = Random(ranks * items)
    for times in (UNIT, *(random_times(random, ranks) for _ in range(3))):
        for name in ("1f1b", "gpipe"):
            fixed = [
                [
                    part
                    for step in steps
                    for part in ([Step("B", *step[1:]), Step("W", *step[1:])] if step.op == "BW" else [step])
                ]
                for steps in SCHEDULES[name].order(Pipe(ranks, items))
            ]
            for limit in (0, int(max(peaks(fixed)))):
                pipe = Pipe(ranks, items, limit=limit, times=times)
                found = SCHEDULES["solved"].order(pipe)
                assert checked(pipe, found) <= timed(fixed, pipe).makespan * (1 + 1e-12)


@pytest.mark.parametrize("chunks", [1, 2])
def test_bounds_hold_and_orders_are_legal(chunks: int) -> None:
    """On random pipes of random places, limits and times: bound <= value = what the schedules' own simulator says."""
    random = Random(chunks)
    for _ in range(25):
        ranks, items = random.randint(1, 5), random.randint(1, 9)
        limit = random.choice((0, *range(chunks, chunks * (ranks + 2))))
        pipe = Pipe(ranks, items, chunks, limit=limit, times=random_times(random, ranks * chunks))
        found = solved(pipe, place(pipe))
        assert found.bound <= found.value * (1 + 1e-9)
        assert found.gap == pytest.approx(0.0 if found.optimal else found.value / found.bound - 1.0)
        assert checked(pipe, found.order) == pytest.approx(found.value)
        span = solved(pipe, place(pipe), longest_rank=True)
        assert timed(span.order, pipe).longest_rank == pytest.approx(span.value)
        assert span.bound <= span.value * (1 + 1e-9) and span.value <= found.value * (1 + 1e-9)


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_placement_under_every_limit(chunks: int) -> None:
    """A linear placement of several chunks deadlocks under greedy forwards; the solver's rule keeps it live."""
    for limit in range(chunks, 3 * chunks + 1):
        pipe = Pipe(3, 5, chunks, limit=limit, times=random_times(Random(limit), 3 * chunks))
        found = solved(pipe, linear(pipe))
        assert max(peaks(found.order)) <= limit and timed(found.order, pipe).makespan == pytest.approx(found.value)


ZERO_BUBBLE = [  # Zero Bubble, table 5: p, m, T_F, T_B, T_W, T_c, rates of ZB-1p and ZB-2p, heads, hidden size
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1242, 0.0039, 24, 2304),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.1323, 0.0029, 32, 4096),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.0576, 0.0028, 40, 5120),
]


@pytest.mark.parametrize(("p", "m", "f", "b", "w", "hop", "one", "two", "heads", "hidden"), ZERO_BUBBLE)
def test_published_bubble_rates(
    p: int, m: int, f: float, b: float, w: float, hop: float, one: float, two: float, heads: int, hidden: int
) -> None:
    """Not worse than the paper's own automatic scheduler at 1F1B's memory and at twice that; sequences of 1024.

    A token's activations weigh 34 h + 5 a s until B is over and 32 h from there to W (table 1).
    """
    kept = 32 * hidden / (34 * hidden + 5 * heads * 1024)
    for limit, rate in ((p, one), (2 * p, two)):
        pipe = Pipe(p, m, limit=limit, times=Times((f,), (b,), (w,), hop))
        order = solved(pipe, place(pipe), longest_rank=True, kept=kept).order
        checked(pipe, order, kept)
        assert round(1.0 - m * (f + b + w) / timed(order, pipe).longest_rank, 4) <= rate


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("kept", [0.25, 0.5, 1.0])
def test_what_the_weight_gradient_keeps(limit: int, kept: float) -> None:
    """B frees a part of the activation: exact against enumeration."""
    for seed in range(3):
        pipe = Pipe(2, 3, limit=limit, times=random_times(Random(seed), 2))
        found = solved(pipe, linear(pipe), kept=kept)
        assert found.optimal and checked(pipe, found.order, kept) == pytest.approx(
            enumerated(pipe, linear(pipe), True, kept)[0], abs=1e-9
        )


@pytest.mark.parametrize(("ranks", "items"), [(4, 8), (4, 16), (8, 32)])
def test_no_bubble_where_none_has_to_be(ranks: int, items: int) -> None:
    """At unit times two chunks under 1F1B's memory meet the bound of the makespan (ZB-V)."""
    pipe = Pipe(ranks, items, 2, limit=2 * ranks)
    found = solved(pipe, wave(pipe))
    assert found.optimal and found.value == 6.0 * items + ranks - 1


def test_local_search_helps_and_never_harms() -> None:
    """Over random pipes it improves some list schedules, and it worsens none."""
    random, better = Random(5), 0
    for _ in range(12):
        pipe = Pipe(4, 8, limit=3, times=random_times(random, 4))
        problem = shop(pipe, linear(pipe))
        floor = bound(problem)
        without = heuristic(problem, (), Budget(swept=0), floor)
        with_it = heuristic(problem, (), Budget(), floor)
        assert with_it.value <= without.value
        better += with_it.value < without.value - 1e-9
    assert better


def test_seeds_are_beaten_or_kept() -> None:
    pipe = Pipe(4, 12, times=random_times(Random(9), 4))
    best = solved(pipe, linear(pipe))
    poor = solve(shop(pipe, linear(pipe)), (words(best.order, 4),), Budget(dispatched=0, swept=0))
    assert poor.value <= best.value * (1 + 1e-12)
    tight = Pipe(4, 12, limit=1, times=pipe.times)
    assert fits(shop(tight, linear(tight)), solve(shop(tight, linear(tight)), (words(best.order, 4),)).words)


def test_critical_path_is_tight() -> None:
    """Its steps follow each other without slack from time zero to the end."""
    pipe = Pipe(3, 5, limit=3, times=random_times(Random(3), 3))
    problem = shop(pipe, linear(pipe))
    found = sweep(problem, solve(problem).words)
    assert found is not None
    path, clock, hops = critical(found), 0.0, 0
    for (rank, position), after in zip(path, [*path[1:], None], strict=True):
        clock += problem.seconds[found.words[rank][position]]
        assert found.end[rank][position] == pytest.approx(clock + hops * pipe.times.hop)
        hops += after is not None and after[0] != rank
    assert clock + hops * pipe.times.hop == pytest.approx(found.value)


def test_same_order_in_every_process() -> None:
    code = (
        "from autotune.planners.schedules import SCHEDULES, Pipe\n"
        "from autotune.planners.schedules.times import Times\n"
        "print(SCHEDULES['solved'].order(Pipe(3, 7, 2, limit=5, times=Times((1.0,), (1.25,), (0.75,), 0.125))))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    pipe = Pipe(3, 7, 2, limit=5, times=Times((1.0,), (1.25,), (0.75,), 0.125))
    assert texts == {f"{SCHEDULES['solved'].order(pipe)}\n"}


def test_limits_on_offer() -> None:
    assert limits(Pipe(4, 8, 2)) == (8, 4, 0) and limits(Pipe(1, 8, 1)) == (1, 0)
    for ranks, chunks in product((1, 2, 4), (1, 2)):
        assert all(refuse(Pipe(ranks, 8, chunks, limit=limit)) is None for limit in limits(Pipe(ranks, 8, chunks)))
