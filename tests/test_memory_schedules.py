"""Orders whose memory is chosen: building blocks, V-Min, V-Half and V-ZB, GIS and GIS-H. Unit cost, free messages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.planners.schedules import SCHEDULES, Pipe
from autotune.planners.schedules import controllable_memory as v
from autotune.planners.schedules.block import Block, Slot, collision, lifespan_peak, looped, repeat, weighted
from autotune.planners.schedules.reorder import _built
from autotune.planners.schedules.timing import peaks
from tests.order_checks import checked

OFFSETS = {"v-min": v._v_min, "v-half": v._v_half, "v-zb": v._v_zb}
PEAK = {"v-min": lambda p: 2 * ((p + 4) // 3), "v-half": lambda p: 2 * ((p + 2) // 2), "v-zb": lambda p: 2 * p}

# Share of the longest rank's span that is idle, as the paper's own implementation gives it.
BUBBLES = [
    (4, 8, 0.1864, 0.0943),
    (8, 16, 0.2195, 0.1504),
    (8, 32, 0.1233, 0.0813),
    (16, 32, 0.2351, 0.1760),
    (16, 64, 0.1332, 0.0965),
]


@pytest.mark.parametrize(("p", "m", "v_min", "v_half"), BUBBLES)
def test_bubbles_and_peaks_are_those_of_the_paper(p: int, m: int, v_min: float, v_half: float) -> None:
    for name, bubble in (("v-min", v_min), ("v-half", v_half), ("v-zb", 0.0)):
        _, timing, held = checked(name, Pipe(p, m, 2))
        assert round(1 - 6 * m / timing.longest_rank, 4) == bubble
        assert held == [PEAK[name](p)] * p


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("p", [*range(2, 13), 16, 17])
def test_v_schedules_of_any_size(name: str, p: int) -> None:
    for m in sorted({1, 2, 3, p - 1, p, p + 1, 2 * p - 1, 2 * p, 4 * p + 3}):
        _, timing, held = checked(name, Pipe(p, m, 2))
        assert max(held) <= min(PEAK[name](p), 2 * m)
        if name == "v-zb" and m >= 2 * p - 1:
            assert timing.longest_rank == 6 * m


@pytest.mark.parametrize("name", OFFSETS)
def test_closed_forms_hold_from_twice_as_many_micro_batches_as_ranks(name: str) -> None:
    makespan, peak = SCHEDULES[name].makespan, SCHEDULES[name].peak
    assert makespan is not None and peak is not None
    for p in (2, 3, 8):
        assert makespan(Pipe(p, 2 * p, 2)) is not None and makespan(Pipe(p, 2 * p - 1, 2)) is None
        assert peak(Pipe(p, p, 2)) is not None and peak(Pipe(p, p - 1, 2)) is None


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("p", range(2, 25))
def test_lifespans_in_the_block_predict_the_peak(name: str, p: int) -> None:
    block = weighted(v.block(OFFSETS[name], p))
    assert collision(block) is None
    assert max(lifespan_peak(block)) == PEAK[name](p)


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("p", [2, 3, 5, 7, 8, 12, 16])
def test_a_longer_middle_is_the_order_of_more_micro_batches(name: str, p: int) -> None:
    block, items = v.block(OFFSETS[name], p), 5 * p + 9
    assert SCHEDULES[name].order(Pipe(p, items, 2)) == _built(block, items)


def test_less_memory_costs_time() -> None:
    spans = [checked(name, Pipe(8, 32, 2))[1].longest_rank for name in ("v-min", "v-half", "v-zb")]
    assert spans[0] > spans[1] > spans[2]


@pytest.mark.parametrize(("name", "share"), [("v-min", 1 / 3), ("v-half", 1 / 2), ("v-zb", 1.0)])
def test_share_of_1f1bs_memory_in_deep_pipelines(name: str, share: float) -> None:
    """A chunk is half of a stage, so 1F1B's p activations are 2p of a chunk."""
    p = 32
    _, _, held = checked(name, Pipe(p, p, 2))
    whole = peaks(SCHEDULES["1f1b"].order(Pipe(p, p)))[0]
    assert share <= max(held) / (2 * whole) <= share + 1.5 / p


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_1f1b_is_a_block_repeated(p: int) -> None:
    block = looped(p, 1, 1, hops=(1, 2))
    assert collision(block) is None
    assert lifespan_peak(block) == [p - rank for rank in range(p)]
    for m in (1, 2, 5, 8, 17):
        assert repeat(block, m) == SCHEDULES["1f1b"].order(Pipe(p, m))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_1f1b_is_a_block_repeated(p: int, chunks: int) -> None:
    block = looped(p, chunks, p, hops=(3, 3))
    assert collision(block) is None
    for m in (p, 2 * p, 5 * p):
        order = SCHEDULES["interleaved-1f1b"].order(Pipe(p, m, chunks))
        assert repeat(block, m) == order
        if m > p:
            assert lifespan_peak(block) == peaks(order)


def test_a_collision_is_named() -> None:
    block = Block([[Slot("F", 0, 0, 0), Slot("BW", 0, 0, 2)]], 3)
    assert collision(block) == "rank 0: BW of stage 0 meets F of stage 0"
    assert collision(replace(block, period=4)) is None


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_gis(p: int, chunks: int) -> None:
    for m in (p, 2 * p, 6 * p):
        pipe = Pipe(p, m, chunks)
        order, timing, held = checked("gis", pipe)
        assert timing.makespan - 3 * m * chunks == 2 * (p - 1)
        assert held[0] == p * chunks
        assert lifespan_peak(looped(p, chunks, p, (1, 2), split=True)) == held
        # One activation a hop less than interleaved 1F1B, and less idle time.
        assert max(peaks(SCHEDULES["interleaved-1f1b"].order(pipe))) == min(m * chunks, held[0] + p - 1)
        for rank, steps in enumerate(order):
            assert [step.op for step in steps].index("B") == p * (chunks - 1) + p - rank


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_gis_h_trades_memory_for_time(p: int, chunks: int) -> None:
    for group in range(-(-p // 2), p + 1):
        for m in (group, 2 * group, 6 * group):
            _, timing, held = checked("gis-h", Pipe(p, m, chunks, group=group))
            assert held[0] == min(m * chunks, group * (chunks - 1) + p)
            assert timing.makespan - 3 * m * chunks == 2 * (p - 1) + (p - group) * (chunks - 1)
    smallest = -(-p // 2)
    assert SCHEDULES["gis-h"].order(Pipe(p, 2 * smallest, chunks)) == SCHEDULES["gis-h"].order(
        Pipe(p, 2 * smallest, chunks, group=smallest)
    )
    assert SCHEDULES["gis-h"].order(Pipe(p, 2 * p, chunks, group=p)) == SCHEDULES["gis"].order(Pipe(p, 2 * p, chunks))


def test_groups_that_the_search_tries_are_legal() -> None:
    for p in (2, 3, 4, 8, 16):
        for m in range(1, 65):
            for group in SCHEDULES["gis-h"].groups(Pipe(p, m, 2)):
                assert SCHEDULES["gis-h"].refuse(Pipe(p, m, 2, group=group)) is None
    assert SCHEDULES["gis-h"].groups(Pipe(8, 24, 2)) == (4, 6)


@pytest.mark.parametrize(
    ("name", "pipe", "message"),
    [
        ("v-half", Pipe(4, 8, 1), "two chunks a rank (found 1; nearest 2)"),
        ("v-min", Pipe(4, 8, 4), "two chunks a rank (found 4; nearest 2)"),
        ("v-zb", Pipe(1, 8, 2), "at least two pipeline ranks (found 1; nearest 2)"),
        ("gis", Pipe(4, 6, 2), "micro-batches a multiple of 4 (found 6; nearest 8)"),
        ("gis", Pipe(4, 8, 1), "at least two chunks a rank (found 1; nearest 2)"),
        ("gis-h", Pipe(8, 8, 2, group=3), "groups of 4 to 8 micro-batches (found 3; nearest 4)"),
        ("gis-h", Pipe(8, 8, 2, group=9), "groups of 4 to 8 micro-batches (found 9; nearest 8)"),
        ("gis-h", Pipe(8, 14, 2, group=5), "micro-batches a multiple of the group of 5 (found 14; nearest 15)"),
        ("gis-h", Pipe(8, 6, 2), "micro-batches a multiple of the group of 4 (found 6; nearest 8)"),
        ("gis-h", Pipe(1, 6, 2), "at least two pipeline ranks (found 1; nearest 2)"),
    ],
)
def test_refusals_name_the_nearest_legal_value(name: str, pipe: Pipe, message: str) -> None:
    assert SCHEDULES[name].refuse(pipe) == message
