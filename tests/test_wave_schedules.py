"""Breadth-first, Hanayo's waves and ZeroPP's units. Unit cost (BW twice F), free messages."""

from __future__ import annotations

from itertools import pairwise

import pytest

from autotune.planners.schedules import SCHEDULES, Pipe
from autotune.planners.schedules.hanayo import limit
from autotune.planners.schedules.timing import Timing, timed
from autotune.planners.schedules.zeropp import units
from tests.order_checks import checked


def idle(timing: Timing, pipe: Pipe) -> float:
    """Share of the makespan in which a rank has nothing to do."""
    return 1 - 3 * pipe.items * pipe.chunks / timing.makespan


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 17])
def test_breadth_first(p: int, chunks: int, m: int) -> None:
    pipe = Pipe(p, m, chunks)
    order, timing, held = checked("breadth-first", pipe)
    if m >= p:
        assert timing.makespan == 3 * (m * chunks + p - 1)
    assert held == [m * chunks] * p
    for steps, ends in zip(order, timing.end, strict=True):
        last = [
            end for step, end in zip(steps, ends, strict=True) if step.op == "BW" and step.stage >= p * (chunks - 1)
        ]
        if m >= p:  # all gradients of the last chunk are there while m BW of each other chunk are still to run
            assert ends[-1] - max(last) == 2 * m * (chunks - 1)


@pytest.mark.parametrize("m", [8, 16])
def test_breadth_first_is_as_torchs_looped_schedule(m: int) -> None:
    _, timing, held = checked("breadth-first", Pipe(4, m, 2))
    assert (timing.makespan, held[0]) == ({8: 57, 16: 105}[m], 2 * m)


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("waves", [1, 2, 4])
def test_hanayos_bubble_of_one_wave_of_micro_batches(p: int, waves: int) -> None:
    """The formula is the paper's estimate, too long with one wave."""
    pipe = Pipe(p, p, 2 * waves)
    _, timing, held = checked("hanayo", pipe)
    formula = (2 * p - 2) / (3 * p * waves + p - 1)
    assert idle(timing, pipe) <= formula + (0.015 if waves > 1 else 0)
    assert idle(timing, pipe) < (p - 1) / (2 * p - 1)  # 1F1B's
    assert max(held) <= p * pipe.chunks


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8])
def test_more_waves_shrink_the_bubble(p: int) -> None:
    for m in (p, 2 * p, 4 * p):
        shares = []
        for waves in (1, 2, 4):
            pipe = Pipe(p, m, 2 * waves)
            shares.append(idle(checked("hanayo", pipe)[1], pipe))
        assert shares == sorted(shares, reverse=True) and len(set(shares)) == 3
        assert shares[0] < (p - 1) / (m + p - 1)  # 1F1B's


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 4, 6])
def test_hanayo_keeps_to_its_limit(p: int, chunks: int) -> None:
    for m in (1, 2, p + 1, 3 * p, 7 * p + 1):
        for most in (chunks, chunks + 1, p * chunks, 0):
            pipe = Pipe(p, m, chunks, limit=most)
            assert max(checked("hanayo", pipe)[2]) <= limit(pipe) == (most or 3 * p * chunks // 2)


def test_hanayo_hands_over_where_the_wave_turns_without_a_message() -> None:
    """Neighbouring stages of one rank pay no hop: with a long hop each turn saves one, and nothing waits for itself."""
    place = SCHEDULES["hanayo"].place(Pipe(3, 1, 4))
    assert [rank for (rank,) in place] == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]
    pipe = Pipe(3, 1, 4)
    order = SCHEDULES["hanayo"].order(pipe)
    hops = sum(a != b for a, b in pairwise(place))
    assert hops == 8
    far = Pipe(3, 1, 4, times=type(pipe.times)(hop=10.0))
    assert timed(order, far).makespan - timed(order, pipe).makespan == 2 * hops * 10


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_zeropp_units(p: int, chunks: int) -> None:
    for m in (1, 2, 7, 24):
        for group in (0, *range(1, m + 1, 3), m):
            pipe = Pipe(p, m, chunks, group=group)
            order, _, _ = checked("zeropp", pipe)
            parts = units(pipe)
            assert [item for part in parts for item in part] == list(range(m))
            assert {len(part) for part in parts[:-1]} <= {min(m, group or p)}
            # A stage's weights are gathered when its forwards, or its backwards, begin: once a unit for each.
            unit = {item: number for number, part in enumerate(parts) for item in part}
            for op in "FB":
                gathers = 0
                for steps in order:
                    now = None
                    for step in steps:
                        if step.op == op and (step.stage, unit[step.item]) != now:
                            now = step.stage, unit[step.item]
                            gathers += 1
                assert gathers == len(parts) * pipe.stages


@pytest.mark.parametrize(("p", "chunks"), [(4, 2), (8, 2), (8, 4), (4, 1), (2, 2)])
def test_zeropp_trades_memory_for_bubble_and_gathers(p: int, chunks: int) -> None:
    m = 48
    spans, memory, gathers = [], [], []
    sizes = [size for size in range(1, m + 1) if m % size == 0]
    for size in sizes:
        pipe = Pipe(p, m, chunks, group=size)
        _, timing, held = checked("zeropp", pipe)
        spans.append(timing.makespan)
        memory.append(max(held))
        gathers.append(len(units(pipe)) * pipe.stages)
    assert spans == sorted(spans, reverse=True)
    assert memory == sorted(memory) and len(set(memory[:-1])) == len(sizes) - 1
    assert gathers == sorted(gathers, reverse=True)
    # No bubble between units once one covers the way around the ranks: what stays is the way there and back once.
    enough = max(p, -(-2 * (p - 1) // chunks))
    assert {span for size, span in zip(sizes, spans, strict=True) if size >= enough} == {3 * m * chunks + 2 * (p - 1)}
    assert spans[0] > spans[-1]


def test_zeropp_groups_are_legal() -> None:
    for p in (1, 2, 3, 8):
        for m in (1, 2, 5, 64):
            for group in SCHEDULES["zeropp"].groups(Pipe(p, m, 2)):
                assert SCHEDULES["zeropp"].refuse(Pipe(p, m, 2, group=group)) is None
    assert SCHEDULES["zeropp"].groups(Pipe(8, 64, 2)) == (4, 8, 16, 64)


@pytest.mark.parametrize(
    ("name", "pipe", "message"),
    [
        ("breadth-first", Pipe(4, 8, 1), "at least two chunks a rank (found 1; nearest 2)"),
        ("hanayo", Pipe(1, 8, 2), "at least two pipeline ranks (found 1; nearest 2)"),
        ("hanayo", Pipe(4, 8, 1), "an even number of chunks, two a wave (found 1; nearest 2)"),
        ("hanayo", Pipe(4, 8, 3), "an even number of chunks, two a wave (found 3; nearest 4)"),
        (
            "hanayo",
            Pipe(4, 8, 4, limit=3),
            "a limit that holds one micro-batch, 4 chunk activations (found 3; nearest 4)",
        ),
        ("zeropp", Pipe(4, 8, 2, group=9), "units of at most 8 micro-batches (found 9; nearest 8)"),
    ],
)
def test_refusals_name_the_nearest_legal_value(name: str, pipe: Pipe, message: str) -> None:
    assert SCHEDULES[name].refuse(pipe) == message
