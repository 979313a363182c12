"""Zero bubble and 2BP schedules with the schedules' own clock: orders, closed forms, limits, published bubble rates."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from autotune.planners.replay.orders import METRICS, bubble_rate, measure
from autotune.planners.replay.row import Row
from autotune.planners.replay.zero_bubble import ZERO_BUBBLE_ROWS, rows
from autotune.planners.schedules import SCHEDULES, Order, Pipe, Schedule, Step, held
from autotune.planners.schedules.split import split
from autotune.planners.schedules.times import Times
from autotune.planners.schedules.timing import peaks, timed

NAMES = [name for name in SCHEDULES if name.startswith(("zb-", "2bp-"))]
RANKS = (1, 2, 3, 4, 5, 8, 16)
UNEQUAL = Times((20.0,), (21.0,), (9.0,), 1.5)


def items(p: int) -> list[int]:
    """Micro-batches around every value where an order changes its shape, and far from them."""
    return sorted({1, 2, 3, 7, 33} | {m for m in (p - 1, p, p + 1, 2 * p - 2, 2 * p - 1, 2 * p, 3 * p, 4 * p) if m})


def legal(schedule: Schedule) -> list[Pipe]:
    pipes = [Pipe(p, m, v) for p in RANKS for m in items(p) for v in schedule.chunks]
    return [pipe for pipe in pipes if schedule.refuse(pipe) is None]


def check_complete(order: Order, schedule: Schedule, pipe: Pipe) -> None:
    """Every stage and micro-batch has one F and either a BW or a B and a W, each on the rank that holds the stage."""
    place = schedule.place(pipe)
    assert len(order) == pipe.ranks
    for rank, steps in enumerate(order):
        count = Counter(steps)
        assert max(count.values()) == 1
        assert {step.stage for step in steps} == set(held(place, rank))
        for stage in held(place, rank):
            for item in range(pipe.items):
                ops = "".join(op for op in ("F", "B", "W", "BW") if count[Step(op, stage, item)])
                assert ops in ("FBW", "F" + "BW"), (rank, stage, item, ops)
    assert sum(map(len, order)) in (3 * pipe.items * pipe.stages, 2 * pipe.items * pipe.stages)


@pytest.mark.parametrize("name", NAMES)
def test_an_order_is_complete_and_runs_at_any_times(name: str) -> None:
    schedule = SCHEDULES[name]
    for pipe in legal(schedule):
        for times in (pipe.times, UNEQUAL):
            made = replace(pipe, times=times)
            order = schedule.order(made)
            check_complete(order, schedule, made)
            timed(order, made)  # raises where the order deadlocks
            assert all(step.op in "FBW" and step.op != "BW" for steps in order for step in steps)


@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_are_those_of_the_order_at_unit_cost(name: str) -> None:
    schedule = SCHEDULES[name]
    for pipe in legal(schedule):
        order = schedule.order(pipe)
        if schedule.makespan:
            assert timed(order, pipe).makespan == schedule.makespan(pipe), pipe
        if schedule.peak:
            assert peaks(order) == schedule.peak(pipe), pipe
    assert schedule.timed or (schedule.makespan and schedule.peak)


@pytest.mark.parametrize("p", RANKS)
def test_bubbles_of_the_longest_rank_are_the_papers(p: int) -> None:
    """(p-1)(F+B-W) and (p-1)(F+B-2W) where F, B and W have the paper's relations, and none of ZB-V at F = B = W."""
    for f, b, w in ((1.0, 1.0, 1.0), (4.0, 5.0, 3.0), (10.0, 10.0, 9.0)):
        for m in (2 * p - 1, 2 * p, 5 * p):
            pipe = Pipe(p, m, times=Times((f,), (b,), (w,)))
            for name, bubble in (("1f1b", f + b + w), ("zb-h1", f + b - w), ("zb-h2", max(0.0, f + b - 2 * w))):
                span = timed(SCHEDULES[name].order(pipe), pipe).longest_rank
                assert span == pytest.approx(m * (f + b + w) + (p - 1) * bubble), (name, pipe)
    for m in (2 * p - 1, 2 * p, 5 * p):
        pipe = Pipe(p, m, 2)
        order = SCHEDULES["zb-v"].order(pipe)
        assert timed(order, pipe).longest_rank == 6 * m
        assert peaks(order) == [2 * p] * p


def test_peaks_with_a_smaller_share_after_the_input_gradient_are_the_papers() -> None:
    """Rank i from 1: (p-i+1) M_B + (i-1) M_W for ZB-H1, (2p-2i+1) M_B + (2i-2) M_W for ZB-H2 (table 2)."""
    for p in RANKS:
        for share in (0.25, 0.5, 1.0):
            pipe = Pipe(p, 4 * p)
            assert peaks(SCHEDULES["zb-h1"].order(pipe), share) == [p - s + s * share for s in range(p)]
            assert peaks(SCHEDULES["zb-h2"].order(pipe), share) == [2 * (p - s) - 1 + 2 * s * share for s in range(p)]


def random_pipes(count: int, seed: int) -> list[Pipe]:
    """Pipes of unequal stages, hops, limits from the smallest up, and shares kept after B."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        p, m = rng.randint(1, 8), rng.randint(1, 24)
        columns = [tuple(rng.uniform(0.3, 3) for _ in range(rng.choice((1, p)))) for _ in range(3)]
        hop, limit = rng.choice((0.0, rng.uniform(0, 1))), rng.choice((0, *range(1, 2 * p + 3)))
        times = Times(columns[0], columns[1], columns[2], hop, rng.choice((1.0, rng.uniform(0.1, 1))))
        found.append(Pipe(p, m, limit=limit, times=times))
    return found


def test_the_automatic_order_never_exceeds_its_limit_and_is_never_behind_the_known_ones() -> None:
    schedule = SCHEDULES["zb-auto"]
    for pipe in random_pipes(300, seed=7):
        order = schedule.order(pipe)
        check_complete(order, schedule, pipe)
        limit = pipe.limit or pipe.ranks
        assert max(peaks(order, pipe.kept)) <= limit + 1e-6, pipe
        for known in ("zb-h1", "zb-h2"):
            other = SCHEDULES[known].order(pipe)
            if max(peaks(other, pipe.kept)) <= limit:
                assert timed(order, pipe).longest_rank <= timed(other, pipe).longest_rank


def test_more_memory_never_slows_the_automatic_order_down() -> None:
    schedule = SCHEDULES["zb-auto"]
    for pipe in random_pipes(100, seed=3):
        spans = []
        for limit in schedule.limits(pipe):
            limited = replace(pipe, limit=limit)
            spans.append(timed(schedule.order(limited), limited).longest_rank)
        assert spans[1] <= spans[0]


def test_a_limit_of_one_runs_one_micro_batch_after_another_on_each_rank() -> None:
    pipe = Pipe(4, 6, limit=1)
    order = SCHEDULES["zb-auto"].order(pipe)
    assert peaks(order) == [1.0] * 4
    assert [step.op for step in order[0]] == ["F", "B", "W"] * 6


@pytest.mark.parametrize(
    ("name", "pipe", "found", "nearest"),
    [
        ("zb-h1", Pipe(4, 8, 2), "found 2", "nearest 1"),
        ("zb-h2", Pipe(4, 8, 3), "found 3", "nearest 1"),
        ("zb-auto", Pipe(4, 8, 2), "found 2", "nearest 1"),
        ("zb-auto", Pipe(4, 8, limit=-3), "found -3", "nearest 1"),
        ("zb-v", Pipe(4, 8), "found 1", "nearest 2"),
        ("2bp-1f1b", Pipe(4, 8, 2), "found 2", "nearest 1"),
        ("2bp-gpipe", Pipe(4, 8, 2), "found 2", "nearest 1"),
        ("2bp-interleaved", Pipe(4, 6, 2), "found 6", "nearest 8"),
    ],
)
def test_what_breaks_a_constraint_is_refused_with_the_nearest_value(
    name: str, pipe: Pipe, found: str, nearest: str
) -> None:
    why = SCHEDULES[name].refuse(pipe)
    assert why is not None and found in why and nearest in why


@pytest.mark.parametrize("base", ["gpipe", "1f1b", "interleaved-1f1b"])
def test_splitting_keeps_the_order_of_forwards_and_backwards(base: str) -> None:
    schedule = SCHEDULES[base]
    for pipe in legal(schedule):
        whole = schedule.order(replace(pipe, times=UNEQUAL))
        for placement in ("immediate", "fill", "end"):
            parts = split(whole, placement, replace(pipe, times=UNEQUAL))
            check_complete(parts, schedule, pipe)
            joined = [[s._replace(op="BW") if s.op == "B" else s for s in steps if s.op != "W"] for steps in parts]
            assert joined == whole


def test_a_weight_gradient_that_fills_a_wait_delays_nothing() -> None:
    for name in ("1f1b", "interleaved-1f1b"):
        for pipe in (Pipe(4, 12, SCHEDULES[name].chunks[0], times=times) for times in (Times(), UNEQUAL)):
            filled = split(SCHEDULES[name].order(pipe), "fill", pipe)
            bare = [[step for step in steps if step.op != "W"] for steps in filled]
            with_weights, without = timed(filled, pipe), timed(bare, pipe)
            for rank, steps in enumerate(filled):
                urgent = [start for start, step in zip(with_weights.start[rank], steps, strict=True) if step.op != "W"]
                assert urgent == pytest.approx(without.start[rank])
            assert any(step.op == "W" for steps in filled for step in steps[: -len(steps) // 4])


def test_weight_gradients_at_the_end_come_stage_by_stage() -> None:
    """What concatenating the micro-batches of a stage into one product needs."""
    pipe = Pipe(4, 8, 2)
    for steps in SCHEDULES["2bp-interleaved"].order(pipe):
        tail = steps[-16:]
        assert [step.op for step in tail] == ["W"] * 16
        assert [step.stage for step in tail] == [tail[0].stage] * 8 + [tail[8].stage] * 8


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: f"{row.setup} {row.name}")
def test_published_bubble_rates_are_ours(row: Row) -> None:
    """Orders that the paper states in full: to its last digit. The searched ones: no worse."""
    if row.name in ("ZB-1p", "ZB-2p"):
        assert round(row.found(), 4) <= row.published
        assert row.published - row.found() < 0.001
    else:
        assert round(row.found(), 4) == row.published


def test_interleaving_pays_two_hops_for_each_stage_but_one() -> None:
    """m S + (p-1) S/v + 2(pv-1) hops, with the S of the published profiles."""
    for profile, _ in ZERO_BUBBLE_ROWS:
        p, m = profile.ranks, profile.items
        whole = profile.forward + profile.input_gradient + profile.weight_gradient
        for v in (2, 3, 4):
            durations = (profile.forward, profile.input_gradient, profile.weight_gradient)
            f, b, w = ((seconds / v,) for seconds in durations)
            pipe = Pipe(p, m, v, times=Times(f, b, w, profile.hop))
            span = timed(SCHEDULES["interleaved-1f1b"].order(pipe), pipe).longest_rank
            assert span == pytest.approx(m * whole + (p - 1) * whole / v + 2 * (p * v - 1) * profile.hop)


def test_a_bubble_rate_counts_waits_and_no_late_start() -> None:
    pipe = Pipe(2, 4)
    order = SCHEDULES["zb-h2"].order(pipe)
    assert bubble_rate(order, pipe) == 0
    assert METRICS["makespan bubble rate"](order, pipe) == pytest.approx(1 / 13)


def test_measuring_what_its_schedule_refuses_says_why() -> None:
    with pytest.raises(ValueError, match=r"two chunks a rank \(found 1; nearest 2\)"):
        measure("zb-v", "peak", Pipe(4, 8))
