"""Schedules with micro-batches from both ends, and the V that comes of cutting one in half: orders, times, activations.

Times are those of `planners.schedules.timing`, the small simulator of compute and hops; the published forms of the
overlapped pairs are checked with the pairs as one step.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from autotune.planners.schedules import SCHEDULES, Order, Pipe, Step
from autotune.planners.schedules.times import Times
from autotune.planners.schedules.timing import peaks, timed

EQUAL = Times((1.0,), (0.5,), (0.5,))  # BW = F
NAMES = ("chimera", "bitpipe", "dualpipe", "dualpipe-v")
UNITS = [
    (name, Pipe(p, p * k, chunks, group))
    for name, chunks in (("chimera", 1), ("bitpipe", 2))
    for p in (2, 4, 6, 8, 12)
    for k in (1, 2, 3, 4, 5, 8)
    for group in (0, p, 2 * p)
    if group <= p * k
]
DUAL = [("dualpipe", Pipe(p, 2 * p + more)) for p in (2, 4, 6, 8, 10, 16) for more in (0, 2, 4, 8, 2 * p, 6 * p)]
DUAL_V = [
    ("dualpipe-v", Pipe(p, 2 * p + more, 2)) for p in (1, 2, 3, 4, 5, 7, 8, 16) for more in (0, 1, 2, 3, 2 * p, 6 * p)
]
CASES = [*UNITS, *DUAL, *DUAL_V]


def bubble_ratio(name: str, pipe: Pipe) -> float:
    """The idle share of the whole, all ranks together."""
    made = timed(SCHEDULES[name].order(pipe), pipe)
    busy = sum(map(sum, made.end)) - sum(map(sum, made.start))
    return 1.0 - busy / (pipe.ranks * made.makespan)


@pytest.mark.parametrize(("name", "pipe"), CASES)
def test_every_stage_of_every_item_once_on_a_rank_that_holds_it(name: str, pipe: Pipe) -> None:
    schedule = SCHEDULES[name]
    assert schedule.refuse(pipe) is None
    place = schedule.place(pipe)
    assert len(place) == pipe.stages
    assert all(len(set(ranks)) == len(ranks) for ranks in place)
    replicas = len(place[0])
    assert Counter(rank for ranks in place for rank in ranks) == dict.fromkeys(
        range(pipe.ranks), replicas * pipe.chunks
    )
    ranks_of: dict[tuple[int, int], set[int]] = {}
    for rank, steps in enumerate(schedule.order(pipe)):
        done: dict[tuple[int, int], str] = {}
        for op, stage, item in steps:
            assert rank in place[stage]
            ranks_of.setdefault((stage, item), set()).add(rank)
            before = done.get((stage, item), "")
            assert before == {"F": "", "B": "F", "W": "FB", "BW": "F"}[op], (rank, op, stage, item)
            done[stage, item] = before + op
        assert set(done.values()) <= {"FBW"}  # B and then W, or BW
    assert set(ranks_of) == {(stage, item) for stage in range(pipe.stages) for item in range(pipe.items)}
    for item in range(pipe.items):  # one direction from end to end
        path = [ranks_of[stage, item] for stage in range(pipe.stages)]
        assert path in [[{ranks[way]} for ranks in place] for way in range(replicas)]
    ways = Counter(place[0].index(next(iter(ranks_of[0, item]))) for item in range(pipe.items))
    assert ways == dict.fromkeys(range(replicas), pipe.items // replicas)


@pytest.mark.parametrize(("name", "pipe"), CASES)
def test_makespan_and_peak_are_the_closed_forms(name: str, pipe: Pipe) -> None:
    schedule = SCHEDULES[name]
    order = schedule.order(pipe)
    assert schedule.makespan is not None
    assert schedule.peak is not None
    assert timed(order, pipe).makespan == schedule.makespan(pipe)
    assert peaks(order) == schedule.peak(pipe)
    timed(order, replace(pipe, times=Times((3.0,), (2.0,), (5.0,), 0.7)))  # no deadlock at other times


@pytest.mark.parametrize("d", [2, 4, 6, 8, 16])
@pytest.mark.parametrize(("name", "directions"), [("chimera", 1), ("bitpipe", 2)])
def test_published_bubble_ratios_of_two_way_pipelines(name: str, directions: int, d: int) -> None:
    """Chimera: (D-2)/(2N+D-2) at BW = F for any N, (D-2)/(1.5N+D-2) at BW = 2F for N = D; BitPipe: N twice."""
    one = Pipe(d, d, directions, d)
    assert bubble_ratio(name, one) == pytest.approx((d - 2) / (1.5 * directions * d + d - 2), abs=1e-12)
    for k in (1, 2, 3, 4):
        for group in (d, 2 * d) if k > 1 else (d,):
            pipe = Pipe(d, d * k, directions, group, times=EQUAL)
            expected = (d - 2) / (2 * directions * d * k + d - 2)
            assert bubble_ratio(name, pipe) == pytest.approx(expected, abs=1e-12)
    for k in (2, 4, 6):  # forward doubling keeps to the BW = 2F ratio for more than D micro-batches, and beats it
        assert bubble_ratio(name, Pipe(d, d * k, directions, 2 * d)) <= (d - 2) / (1.5 * directions * d * k + d - 2)


def test_chimera_figures() -> None:
    assert [round(bubble_ratio("chimera", Pipe(d, d, times=EQUAL)), 4) for d in (4, 8)] == [0.2, 0.2727]
    assert [round(bubble_ratio("chimera", Pipe(d, d)), 4) for d in (4, 8)] == [0.25, 0.3333]
    assert peaks(SCHEDULES["chimera"].order(Pipe(8, 8))) == [5, 6, 7, 8, 8, 7, 6, 5]
    assert peaks(SCHEDULES["chimera"].order(Pipe(8, 32, 1, 8))) == [5, 6, 7, 8, 8, 7, 6, 5]


def test_chimera_of_four_ranks_and_four_items() -> None:
    """The paper's figure 3, at BW = F: the two directions of 1F1B, merged without a collision."""
    assert [" ".join(f"{op}{item}" for op, _, item in steps) for steps in SCHEDULES["chimera"].order(Pipe(4, 4))] == [
        "F0 F2 F1 BW1 F3 BW3 BW0 BW2",
        "F0 F1 F2 F3 BW1 BW0 BW3 BW2",
        "F1 F0 F3 F2 BW0 BW1 BW2 BW3",
        "F1 F3 F0 BW0 F2 BW2 BW1 BW3",
    ]


@pytest.mark.parametrize("d", [2, 4, 8, 16])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8])
def test_bitpipe_has_fewer_bubbles_than_interleaved_1f1b_and_a_bounded_peak(d: int, k: int) -> None:
    pipe = Pipe(d, d * k, 2)
    interleaved = SCHEDULES["interleaved-1f1b"].order(pipe)
    for hop in (0.0, 0.1) if k < 5 else (0.0,):  # messages delay the start of every further unit
        at = replace(pipe, times=Times(hop=hop))
        assert timed(SCHEDULES["bitpipe"].order(at), at).makespan < timed(interleaved, at).makespan
    assert max(peaks(SCHEDULES["bitpipe"].order(pipe))) <= 4 * d
    assert max(peaks(SCHEDULES["bitpipe"].order(replace(pipe, group=d)))) <= 2 * d


def as_pairs(order: Order) -> list[list[tuple[Step, ...]]]:
    """A forward with the whole backward that follows it directly as one action: the overlapped pairs."""
    actions: list[list[tuple[Step, ...]]] = []
    for steps in order:
        mine: list[tuple[Step, ...]] = []
        for step in steps:
            if step.op == "BW" and mine and len(mine[-1]) == 1 and mine[-1][0].op == "F":
                mine[-1] = (*mine[-1], step)
            else:
                mine.append((step,))
        actions.append(mine)
    return actions


def paired_makespan(actions: list[list[tuple[Step, ...]]], times: Times) -> float:
    """When all is done if an action starts with all its inputs there and gives nothing before its end."""
    done: dict[tuple[str, int, int], float] = {}
    last = max(step.stage for mine in actions for action in mine for step in action)
    clock, at = [0.0] * len(actions), [0] * len(actions)
    while any(at[rank] < len(mine) for rank, mine in enumerate(actions)):
        before = list(at)
        for rank, mine in enumerate(actions):
            while at[rank] < len(mine):
                action = mine[at[rank]]
                needs = [need for step in action for need in inputs(step, last)]
                if not all(need in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)])
                clock[rank] += sum(times.of(step.op, step.stage) for step in action)
                done.update({(step.op[0], step.stage, step.item): clock[rank] for step in action})
                at[rank] += 1
        assert at != before, "deadlock"
    return max(clock)


def inputs(step: Step, last: int) -> list[tuple[str, int, int]]:
    op, stage, item = step
    if op == "F":
        return [("F", stage - 1, item)] if stage else []
    if op == "W":
        return [("B", stage, item)]
    return [("F", stage, item), *([("B", stage + 1, item)] if stage < last else [])]


@pytest.mark.parametrize("cost", [(1, 1, 1), (10, 11, 9), (20, 21, 19), (10, 10, 7)])
@pytest.mark.parametrize(("name", "pipe"), [*DUAL, *DUAL_V])
def test_published_bubbles_of_overlapped_pairs(name: str, pipe: Pipe, cost: tuple[float, float, float]) -> None:
    """(PP/2-1)(F&B + BW - 3W), PP the number of stages: with a pair as one action of F + BW, and W <= F <= B."""
    f, b, w = cost
    order, turns, work = SCHEDULES[name].order(pipe), pipe.stages // 2 - 1, pipe.items * pipe.chunks * (f + b + w)
    times = Times((f,), (b,), (w,))
    paired, apart = paired_makespan(as_pairs(order), times), timed(order, replace(pipe, times=times)).makespan
    assert paired == work + turns * ((f + b + w) + (b + w) - 3 * w)
    # Apart, forward first, the forward's output leaves earlier: F + B - W, with B the input gradient alone.
    assert work + turns * (f + b - w) <= apart <= paired
    if f == b:
        assert apart == work + turns * (f + b - w)


def test_dualpipe_v_figures_of_four_ranks() -> None:
    for items, paired, apart in ((8, 54, 51), (16, 102, 99)):
        order = SCHEDULES["dualpipe-v"].order(Pipe(4, items, 2))
        assert paired_makespan(as_pairs(order), Times()) == paired
        assert timed(order, Pipe(4, items, 2)).makespan == apart
        assert peaks(order) == [9, 9, 9, 9]


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (2, 7), (3, 6), (4, 8), (4, 16), (5, 13), (8, 16), (8, 40)])
def test_dualpipe_v_is_torch_s_order(p: int, m: int) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs = getattr(schedules, "ScheduleDualPipeV", None)
    if not hasattr(theirs, "_calculate_single_rank_operations"):
        pytest.skip("this torch has no DualPipeV, or makes its order elsewhere")
    ops = {"FORWARD": "F", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "BW"}
    expected: Order = []
    for rank in range(p):
        given = theirs._calculate_single_rank_operations(SimpleNamespace(pp_group_size=p, _n_microbatches=m), rank)
        flat = [each for action in given for each in (action.sub_actions or (action,))]
        expected.append([Step(ops[a.computation_type.name], a.stage_index, a.microbatch_index) for a in flat])
    assert SCHEDULES["dualpipe-v"].order(Pipe(p, m, 2)) == expected


def test_dualpipe_is_dualpipe_v_on_half_the_ranks() -> None:
    """Cut in half: a rank runs the kinds of steps, near and far, of the rank of the V at its distance from the end."""
    for p, m in ((2, 4), (4, 10), (8, 20), (16, 40)):
        whole, cut = SCHEDULES["dualpipe"].order(Pipe(p, m)), SCHEDULES["dualpipe-v"].order(Pipe(p // 2, m // 2, 2))
        for rank, steps in enumerate(whole):
            matching = cut[min(rank, p - 1 - rank)]
            assert [(op, stage, item // 2) for op, stage, item in steps] == matching


@pytest.mark.parametrize(
    ("name", "pipe", "reason"),
    [
        ("chimera", Pipe(4, 4, 2), "1 chunk a rank (found 2; nearest 1)"),
        ("chimera", Pipe(3, 6), "an even number of pipeline ranks (found 3; nearest 4)"),
        ("chimera", Pipe(1, 4), "an even number of pipeline ranks (found 1; nearest 2)"),
        ("chimera", Pipe(4, 6), "micro-batches a multiple of 4 (found 6; nearest 8)"),
        ("chimera", Pipe(4, 1), "micro-batches a multiple of 4 (found 1; nearest 4)"),
        ("chimera", Pipe(4, 8, 1, 3), "group 4 or 8, or 0 for the wider that fits (found 3; nearest 4)"),
        ("chimera", Pipe(4, 4, 1, 8), "at least 8 micro-batches with group 8 (found 4; nearest 8)"),
        ("bitpipe", Pipe(4, 4, 1), "2 chunks a rank (found 1; nearest 2)"),
        ("bitpipe", Pipe(5, 5, 2), "an even number of pipeline ranks (found 5; nearest 6)"),
        ("bitpipe", Pipe(4, 9, 2), "micro-batches a multiple of 4 (found 9; nearest 8)"),
        ("dualpipe", Pipe(4, 8, 2), "one chunk a rank (found 2; nearest 1)"),
        ("dualpipe", Pipe(5, 20), "an even number of pipeline ranks (found 5; nearest 6)"),
        ("dualpipe", Pipe(4, 7), "at least 8 micro-batches (found 7; nearest 8)"),
        ("dualpipe", Pipe(4, 9), "an even number of micro-batches (found 9; nearest 10)"),
        ("dualpipe-v", Pipe(4, 8, 1), "two chunks a rank (found 1; nearest 2)"),
        ("dualpipe-v", Pipe(4, 7, 2), "at least 8 micro-batches (found 7; nearest 8)"),
    ],
)
def test_refusals_name_the_nearest_value(name: str, pipe: Pipe, reason: str) -> None:
    assert SCHEDULES[name].refuse(pipe) == reason


@pytest.mark.parametrize("name", NAMES)
def test_what_the_search_tries_is_legal(name: str) -> None:
    schedule = SCHEDULES[name]
    for p, m in ((2, 4), (4, 8), (4, 16), (8, 16), (8, 24), (4, 4), (6, 18)):
        for chunks in schedule.chunks:
            pipe = Pipe(p, m, chunks)
            if schedule.refuse(pipe) is None:
                assert all(schedule.refuse(replace(pipe, group=group)) is None for group in schedule.groups(pipe))


@pytest.mark.alone
@pytest.mark.parametrize("name", NAMES)
def test_a_large_order_is_made_in_milliseconds(name: str) -> None:
    pipe = Pipe(16, 128, SCHEDULES[name].chunks[0])
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        SCHEDULES[name].order(pipe)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.06
