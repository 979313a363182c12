"""The simulator on small programs whose times and bytes are worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from autotune.planners.passes.communicate import communicate
from autotune.planners.simulate import Shared, memory, resolve, simulate
from autotune.spec.errors import UsageError
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.timeline import Timeline

I = Instruction


@dataclass
class Table:
    """Costs by operation: seconds, transient bytes, bytes sent. `asked` counts the questions."""

    duration: Mapping[str, float]
    extra: Mapping[str, int] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    by_stage: bool = False
    asked: int = 0

    def seconds(self, rank: int, instruction: Instruction) -> float:
        self.asked += 1
        return self.duration.get(instruction.op, 0.0)

    def transient(self, rank: int, instruction: Instruction) -> int:
        return self.extra.get(instruction.op, 0)

    def sent(self, rank: int, instruction: Instruction) -> int:
        return self.bytes.get(instruction.op, 0)


def buffers(*names: str, size: int = 1, **others: Buffer) -> dict[str, Buffer]:
    return {**{name: Buffer(size) for name in names}, **others}


def one(*listing: Instruction, **held: Buffer) -> Program:
    """A one-rank program whose buffers are those named, and tokens for the rest."""
    names = {n for i in listing for n in i.reads + i.writes}
    return Program((listing,), ({**{n: Buffer() for n in names}, **held},))


def times(line: Timeline, rank: int = 0) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in line.spans if span.rank == rank]


# Order


def test_a_lane_is_serial_and_lanes_run_side_by_side() -> None:
    program = one(I("a"), I("b", lane="copy"), I("a"), I("b", lane="copy"))
    line = simulate(program, Table({"a": 2, "b": 3}))
    assert times(line) == [(0, 2), (0, 3), (2, 4), (3, 6)]
    assert line.makespan == 6 and line.busy(0) == 4 and line.busy(0, "copy") == 6


def test_a_read_waits_for_its_writer() -> None:
    program = one(I("b", lane="copy", writes=("x",)), I("a"), I("a", reads=("x",), frees=("x",)))
    assert times(simulate(program, Table({"a": 1, "b": 5}))) == [(0, 5), (0, 1), (5, 6)]


def test_a_token_orders_what_no_data_orders() -> None:
    free = one(I("a"), I("fetch", lane="copy"))
    ordered = one(I("a", writes=("go",)), I("fetch", lane="copy", reads=("go",), frees=("go",)))
    table = Table({"a": 2, "fetch": 1})
    assert times(simulate(free, table)) == [(0, 2), (0, 1)]
    assert times(simulate(ordered, table)) == [(0, 2), (2, 3)]


def test_a_change_in_place_waits_for_who_still_reads_and_who_still_writes() -> None:
    program = one(
        I("a", writes=("x",)),
        I("copy", lane="copy", reads=("x",)),
        I("a", reads=("x",), writes=("x",)),
        I("sum", lane="net", reads=("x",), writes=("x",)),
        I("a", writes=("x",)),
    )
    line = simulate(program, Table({"a": 1, "copy": 4, "sum": 2}))
    assert times(line) == [(0, 1), (1, 5), (5, 6), (6, 8), (8, 9)]


def test_a_new_buffer_of_an_old_name_waits_for_nobody() -> None:
    program = one(
        I("a", writes=("x",)),
        I("copy", lane="copy", reads=("x",), frees=("x",)),
        I("a", writes=("x",)),
        I("a", reads=("x",), frees=("x",)),
    )
    assert times(simulate(program, Table({"a": 1, "copy": 4}))) == [(0, 1), (1, 5), (1, 2), (2, 3)]


def test_a_meeting_starts_when_all_are_ready_and_ends_at_once_for_all() -> None:
    meet = I("sum", lane="net", reads=("x",), writes=("x",), meet="sum", peers=(0, 1, 2))
    ranks = tuple((*[I("a")] * r, I("a", writes=("x",)), meet, I("a", reads=("x",), frees=("x",))) for r in range(3))
    line = simulate(Program(ranks, (buffers("x"),) * 3), Table({"a": 1, "sum": 2}, bytes={"sum": 7}))
    for rank in range(3):
        assert times(line, rank)[-2:] == [(3, 5), (5, 6)]
    assert line.sent == (7, 7, 7)


def test_a_message_takes_as_long_as_its_slower_end() -> None:
    program = Program(
        (
            (I("a", writes=("x",)), I("S", lane="c", reads=("x",), frees=("x",), meet="m", peers=(0, 1))),
            (I("R", lane="c", writes=("x",), meet="m", peers=(0, 1)), I("a", reads=("x",), frees=("x",))),
        ),
        (buffers("x"), buffers("x")),
    )
    assert times(simulate(program, Table({"a": 1, "S": 2, "R": 3})), 1) == [(1, 4), (4, 5)]


def test_inline_issue_waits_for_compute() -> None:
    """On a CPU the host that computes also issues: a copy listed after a compute cannot start before it has ended."""
    program = one(I("a"), I("copy", lane="copy"), I("a"))
    table = Table({"a": 2, "copy": 3})
    assert times(simulate(program, table)) == [(0, 2), (0, 3), (2, 4)]
    assert times(simulate(program, table, inline=True)) == [(0, 2), (2, 5), (2, 4)]


def test_steps_follow_each_other_without_a_barrier() -> None:
    """The update of one lane overlaps with the next step's first compute where no buffer says otherwise."""
    weights = Buffer(4, persistent=True)
    program = one(I("F", reads=("w",)), I("G", lane="net", writes=("g",)), w=weights, g=Buffer(1, persistent=True))
    line = simulate(program, Table({"F": 2, "G": 1}), steps=3)
    assert times(line) == [(0, 2), (0, 1), (2, 4), (1, 2), (4, 6), (2, 3)]
    changed = one(I("F", reads=("w",)), I("U", lane="net", reads=("w",), writes=("w",)), w=weights)
    line = simulate(changed, Table({"F": 2, "U": 1}), steps=2)
    assert times(line) == [(0, 2), (2, 3), (3, 5), (5, 6)]


def test_reading_what_nothing_wrote_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rank 0: 0a0 reads x, which nothing has written"):
        resolve(one(I("a", reads=("x",))))


def test_an_incomplete_meeting_is_refused() -> None:
    ranks = ((I("S", meet="m", peers=(0, 1)),), (I("a"),))
    with pytest.raises(UsageError, match=r"meeting m: only ranks \[0\] came, naming peers \[\(0, 1\)\]"):
        resolve(Program(ranks, ({}, {})))


# Prices


def test_a_table_that_prices_by_stage_is_asked_once_each() -> None:
    listing = tuple(I(op, stage, item) for item in range(20) for stage in (0, 1) for op in ("F", "BW"))
    seconds = {"F": 1.0, "BW": 2.0}
    each, once = Table(seconds), Table(seconds, by_stage=True)
    assert simulate(one(*listing), each) == simulate(one(*listing), once)
    assert (each.asked, once.asked) == (80, 4)


def test_programs_that_share_their_lists_keep_their_own_sizes() -> None:
    lists = Shared(((I("a", writes=("x",)), I("a", reads=("x",), frees=("x",))),))
    small, large = Program(lists, ({"x": Buffer(1)},)), Program(lists, ({"x": Buffer(9)},))
    table = Table({"a": 1}, {"a": 2})
    for _ in range(2):
        assert simulate(small, table).peaks == (3,) and simulate(large, table).peaks == (11,)
    assert resolve(small) is resolve(large)
    assert resolve(small) == resolve(replace(small, ranks=tuple(lists)))
    assert resolve(small, inline=True) is not resolve(small)
    kept = Program(lists, ({"x": Buffer(9, "host")},))
    assert memory(kept, lambda r, i: 0) == [{"device": [0, 0], "host": [9, 9]}]
    with pytest.raises(UsageError, match="nothing has written"):
        resolve(Program(Shared(((I("a", reads=("w",)),),)), ({"w": Buffer(1)},)))


# Memory


def peak(program: Program, tier: str = "device", **extra: int) -> list[int]:
    return memory(program, lambda rank, instruction: extra.get(instruction.op, 0))[0][tier]


def test_memory_by_hand() -> None:
    """w 10 persists; F makes x 4 and a 7; BW reads them, makes d 4, frees x and a after it has been issued."""
    program = one(
        I("F", reads=("w",), writes=("x", "a")),
        I("BW", reads=("w", "x", "a"), writes=("d",), frees=("x", "a")),
        I("S", lane="net", reads=("d",), frees=("d",)),
        w=Buffer(10, persistent=True),
        x=Buffer(4),
        a=Buffer(7),
        d=Buffer(4),
    )
    assert peak(program) == [21, 25, 14]
    assert peak(program, F=100, S=1) == [121, 25, 15]
    assert simulate(program, Table({}, {"BW": 5})).peaks == (30,)


def test_memory_is_counted_in_issue_order_not_in_time() -> None:
    """A slow copy holds its buffer no longer on paper than a fast one: the allocator frees at issue."""
    program = one(
        I("a", writes=("x",)),
        I("copy", lane="copy", reads=("x",), frees=("x",)),
        I("a", writes=("y",)),
        I("a", reads=("y",), frees=("y",)),
        x=Buffer(8),
        y=Buffer(8),
    )
    for copy in (0.1, 100.0):
        assert simulate(program, Table({"a": 1, "copy": copy})).memory[0]["device"] == [8, 8, 8, 8]


def test_writing_in_place_allocates_nothing() -> None:
    grown = one(
        I("a", writes=("g",)),
        *[I("a", reads=("g",), writes=("g",))] * 3,
        I("a", reads=("g", "w"), writes=("w",), frees=("g",)),
        I("a"),
        g=Buffer(6),
        w=Buffer(10, persistent=True),
    )
    assert peak(grown) == [16, 16, 16, 16, 16, 10]


def test_what_is_live_at_the_start_counts_until_it_is_freed() -> None:
    program = replace(one(I("a"), I("a", reads=("x",), frees=("x",)), I("a"), x=Buffer(5)), live=(frozenset({"x"}),))
    assert peak(program) == [5, 5, 0]


def test_tiers_are_counted_apart() -> None:
    """Offloading: x 8 goes to the host and comes back; transient bytes are the device's."""
    program = one(
        I("F", writes=("x",)),
        I("OUT", lane="d2h", reads=("x",), writes=("x.host",), frees=("x",)),
        I("F"),
        I("IN", lane="h2d", reads=("x.host",), writes=("x.back",), frees=("x.host",)),
        I("BW", reads=("x.back",), frees=("x.back",)),
        x=Buffer(8),
        **{"x.host": Buffer(8, "host"), "x.back": Buffer(8), "w": Buffer(3, "disk", persistent=True)},
    )
    line = simulate(program, Table({}, {"F": 1}))
    assert line.memory[0] == {"device": [9, 8, 1, 8, 8], "host": [0, 8, 8, 8, 0], "disk": [3] * 5}
    assert (line.peak(0), line.peak(0, "host"), line.peak(0, "disk"), line.peak(0, "peer")) == (9, 8, 3, 0)


def test_a_rank_with_nothing_on_its_device_still_has_transient_bytes() -> None:
    program = one(I("a", reads=("x",)), x=Buffer(8, "host", persistent=True))
    assert memory(program, lambda rank, instruction: 5) == [{"device": [5], "host": [8]}]
    assert memory(Program(((),), ({},)), lambda rank, instruction: 5) == [{"device": []}]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_lag_holds_older_versions(lag: int) -> None:
    """A persistent buffer of 10 read k steps late has k + 1 versions; two readers share what the older one holds."""
    program = one(
        I("F", reads=("w",), lag=lag),
        I("F", reads=("w",), lag=min(lag, 1)),
        I("U", writes=("w",)),
        w=Buffer(10, persistent=True),
    )
    assert peak(program) == [10 * (1 + lag)] * 3
    # A buffer that does not persist: k old versions before this step writes its own.
    passing = one(I("a"), I("W", writes=("h",)), I("a", reads=("h",), lag=lag), h=Buffer(4))
    assert peak(passing) == [4 * lag, 4 * (lag + 1), 4 * (lag + 1)]


# The communication pass


def sent_and_received(program: Program) -> list[list[str]]:
    return [[i.label for i in listing] for listing in program.ranks]


def test_messages_are_added_where_buffers_cross_ranks() -> None:
    ranks = (
        (I("F", 0, 0, writes=("x.1.0",)), I("F", 0, 1, writes=("x.1.1",))),
        (
            I("F", 1, 0, reads=("x.1.0",), frees=("x.1.0",)),
            I("F", 1, 1, reads=("x.1.1",), frees=("x.1.1",)),
        ),
    )
    program = communicate(Program(ranks, (buffers("x.1.0", "x.1.1", size=4), {})))
    # Each receive is posted one compute before its reader: both before the first here, in the sender's order.
    assert sent_and_received(program) == [
        ["0F0", "0SEND0>0+1", "0F1", "0SEND1>0+1"],
        ["1RECV0>0+1", "1RECV1>0+1", "1F0", "1F1"],
    ]
    assert program.buffers[1] == program.buffers[0]
    assert [i.frees for i in program.ranks[0] if i.op == "SEND"] == [("x.1.0",), ("x.1.1",)]
    assert times(simulate(program, Table({"F": 1, "SEND": 2})), 1) == [(1, 3), (3, 5), (3, 4), (5, 6)]


def test_a_receive_never_waits_behind_a_later_message() -> None:
    """Rank 1 reads the second message first: receives still follow the sender's order."""
    ranks = (
        (I("F", writes=("x.a",)), I("F", writes=("x.b",))),
        (
            I("a"),
            I("a"),
            I("F", reads=("x.b",), frees=("x.b",)),
            I("F", reads=("x.a",), frees=("x.a",)),
        ),
    )
    program = communicate(Program(ranks, (buffers("x.a", "x.b"), {})))
    assert [i.writes for i in program.ranks[1] if i.op == "RECV"] == [("x.a",), ("x.b",)]
    resolve(program), resolve(program, inline=True)


def test_what_its_own_rank_reads_too_is_not_freed_by_the_send() -> None:
    ranks = (
        (I("F", writes=("x",)), I("G", reads=("x",), frees=("x",))),
        (I("F", reads=("x",), frees=("x",)),),
        (I("F", reads=("x",), frees=("x",)),),
    )
    program = communicate(Program(ranks, (buffers("x"), {}, {})))
    sends = [i for i in program.ranks[0] if i.op == "SEND"]
    assert [(i.peers, i.frees) for i in sends] == [((0, 1), ()), ((0, 2), ())]
    only_others = communicate(Program(((ranks[0][0],), *ranks[1:]), (buffers("x"), {}, {})))
    assert [i.frees for i in only_others.ranks[0] if i.op == "SEND"] == [(), ("x",)]


def test_the_reader_of_a_message_may_be_on_any_lane() -> None:
    ranks = (
        (I("F", writes=("x",)),),
        (I("a"), I("copy", lane="copy", reads=("x",), frees=("x",)), I("a")),
    )
    listed = {
        ahead: sent_and_received(communicate(Program(ranks, (buffers("x"), {})), ahead))[1] for ahead in (0, 1, 9)
    }
    assert listed[0] == ["0a0", "0RECV0>0+1", "0copy0", "0a0"]
    assert listed[1] == listed[9] == ["0RECV0>0+1", "0a0", "0copy0", "0a0"]
    last = (ranks[0], (I("a"), I("copy", lane="copy", reads=("x",), frees=("x",))))
    assert sent_and_received(communicate(Program(last, (buffers("x"), {})), 0))[1] == ["0a0", "0RECV0>0+1", "0copy0"]
