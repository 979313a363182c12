"""What timelines say in numbers: their JSON form, figures, predicted against measured, the critical path."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autotune.report.compare import critical_path, differences, lines
from autotune.report.figures import IDLE, figures, visible, working
from autotune.report.picture import pictures
from autotune.report.plot import html, perfetto, svg
from autotune.spec.errors import UsageError
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.timeline import Span, Timeline
from autotune.spec.timeline_file import from_dict, text, to_dict
from tests.timelines import COST, SEND_TIME, WEIGHTS, one_f_one_b, play


@pytest.fixture(scope="module")
def predicted() -> Timeline:
    return play(one_f_one_b(4, 8), COST)


@pytest.fixture(scope="module")
def measured() -> Timeline:
    return play(one_f_one_b(4, 8), {**COST, "BW": 2.4}, "measured", jitter=0.05)


def test_one_f_one_b_is_what_the_closed_form_says() -> None:
    """Without messages' time: makespan (ranks - 1 + items) (F + BW) + OPT, and ranks - r activations held."""
    timeline = play(one_f_one_b(4, 8), {**COST, "SEND": 0.0, "RECV": 0.0})
    assert timeline.makespan == pytest.approx((4 - 1 + 8) * 3 + 0.5)
    held = [max(sum(b >> 26 for b in [size - WEIGHTS]) for size in timeline.memory[r]["device"]) for r in range(4)]
    assert held == [4, 3, 2, 1]


def test_json_form_gives_the_same_timeline_back(predicted: Timeline, measured: Timeline) -> None:
    for timeline in (predicted, measured):
        live = tuple(frozenset({f"a{r}"}) for r in range(4))
        for program in (timeline.program, replace(timeline.program, live=live)):
            assert from_dict(json.loads(json.dumps(to_dict(replace(timeline, program=program))))).program == program
        again = from_dict(json.loads(json.dumps(to_dict(timeline))))
        assert again.spans == timeline.spans
        assert list(again.memory) == list(timeline.memory)
        assert replace(again, memory=()) == replace(timeline, memory=())


def test_json_form_is_compact(predicted: Timeline) -> None:
    raw = to_dict(predicted)
    assert len(json.dumps(raw, separators=(",", ":"))) < 120 * len(predicted.program)


def test_text_form(predicted: Timeline) -> None:
    got = text(predicted.program).splitlines()
    assert len(got) == 4
    assert got[3].split()[:5] == ["3RECV0>2+3", "3F0", "3BW0", "3SEND0>3+2", "3RECV1>2+3"] or got[3].startswith(
        "3RECV0"
    )
    compute = [label for label in got[0].split() if ">" not in label]
    assert compute[:6] == ["0F0", "0F1", "0F2", "0F3", "0BW0", "0F4"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda r: r.update(schema="autotune.timeline/9"), "schema"),
        (lambda r: r.update(kind="mesured"), "kind"),
        (lambda r: r.pop("spans"), "spans"),
        (lambda r: r.update(extra=1), "extra"),
        (lambda r: r["spans"].__setitem__(3, [0, 10**6, 0.0, 1.0]), "spans[3].position"),
        (lambda r: r["spans"].__setitem__(3, [0, 0, float("nan"), 1.0]), "spans[3].start"),
        (lambda r: r["spans"].__setitem__(3, [0, 0, 2.0, 1.0]), "spans[3].end"),
        (lambda r: r["spans"].__setitem__(3, "x"), "spans[3]"),
        (lambda r: r["memory"][1]["device"].pop(), "memory[1].device"),
        (lambda r: r["memory"].pop(), "memory"),
        (lambda r: r["sent"].__setitem__(0, -1), "sent[0]"),
        (lambda r: r["program"]["names"].__setitem__(1, 7), "program.names[1]"),
        (lambda r: r["program"].update(names=[]), "program.names"),
        (lambda r: r["program"]["ranks"][2]["instructions"].__setitem__(5, [0]), "program.ranks[2].instructions[5]"),
        (
            lambda r: r["program"]["ranks"][2]["instructions"][5].__setitem__(0, 999),
            "program.ranks[2].instructions[5].op",
        ),
        (lambda r: r["program"]["ranks"][2]["instructions"][5].__setitem__(2, True), "instructions[5].stage"),
        (lambda r: r["program"]["ranks"][0]["buffers"].append([0, 1, 0]), "program.ranks[0].buffers["),
        (lambda r: r["program"]["ranks"][0]["buffers"].append(r["program"]["ranks"][0]["buffers"][0]), "listed once"),
        (lambda r: r["program"].update(ranks={}), "program.ranks"),
    ],
)
def test_wrong_file_is_refused_with_its_place(predicted: Timeline, change, place: str) -> None:  # type: ignore[no-untyped-def]
    raw = json.loads(json.dumps(to_dict(predicted)))
    change(raw)
    with pytest.raises(UsageError) as caught:
        from_dict(raw, "step.json")
    assert "step.json" in str(caught.value)
    assert place in str(caught.value)


def test_all_problems_at_once_but_not_thousands(predicted: Timeline) -> None:
    raw = json.loads(json.dumps(to_dict(predicted)))
    raw["spans"][0], raw["spans"][4] = [9, 0, 0, 1], [0, 0, "a", 1]
    with pytest.raises(UsageError) as caught:
        from_dict(raw)
    assert [p.key for p in caught.value.problems] == ["spans[0].rank", "spans[4].start"]
    raw["spans"] = [None] * 30000
    with pytest.raises(UsageError) as caught:
        from_dict(raw)
    assert len(caught.value.problems) == 20
    for junk in (None, 3, "x", [], {"schema": "autotune.timeline/1"}):
        with pytest.raises(UsageError):
            from_dict(junk)


def test_figures_equal_the_timeline_s_own(predicted: Timeline, measured: Timeline) -> None:
    for timeline in (predicted, measured):
        got = figures(timeline)
        assert got.makespan_s == timeline.makespan
        assert got.idle_share == pytest.approx(timeline.idle_share)
        assert got.busy_s == pytest.approx(tuple(timeline.busy(r) for r in range(4)))
        begins = working(timeline)
        trimmed = replace(timeline, spans=tuple(s._replace(start=begins[s]) for s in timeline.spans))
        assert got.exposed_s == pytest.approx(tuple(trimmed.exposed_communication(r) for r in range(4)))
        assert got.peak_bytes == timeline.peaks


def test_waiting_is_not_communication(predicted: Timeline, measured: Timeline) -> None:
    assert working(predicted) == {s: s.start for s in predicted.spans}
    waits = {s: at - s.start for s, at in working(measured).items()}
    assert {measured.instruction(s).op for s, wait in waits.items() if wait > 1e-9} == {"RECV"}
    assert max(figures(measured).exposed_s) < 1.2 * max(figures(predicted).exposed_s)
    assert max(measured.exposed_communication(r) for r in range(4)) > 2 * max(figures(measured).exposed_s)


def test_visible_seconds_are_the_makespan(predicted: Timeline, measured: Timeline) -> None:
    for timeline in (predicted, measured):
        parts = visible(timeline)
        assert sum(parts.values()) == pytest.approx(timeline.makespan)
        assert min(parts.values()) >= -1e-9
    assert visible(predicted)["F", 0] == pytest.approx(8 * 1.0 / 4)
    # Every second of a rank that is not in an instruction is idle: what the largest rank lacks is at most that.
    assert visible(predicted)[IDLE, -1] > 0


def test_difference_names_the_mispriced_class(predicted: Timeline, measured: Timeline) -> None:
    rows = differences(predicted, measured)
    assert sum(d.contribution_s for d in rows) == pytest.approx(predicted.makespan - measured.makespan)
    assert sum(abs(d.share) for d in rows) == pytest.approx(1)
    assert [abs(d.contribution_s) for d in rows] == sorted((abs(d.contribution_s) for d in rows), reverse=True)
    assert {d.op for d in rows[:4]} <= {"BW", "idle"}
    worst = next(d for d in rows if d.op == "BW")
    assert worst.count == 8
    assert worst.predicted_s == pytest.approx(2.0)
    assert 2.4 <= worst.measured_s <= 2.4 * 1.05
    assert worst.ratio == pytest.approx(worst.predicted_s / worst.measured_s)
    # A meeting's wait is not taken for a slow link.
    for row in rows:
        if row.op in ("SEND", "RECV"):
            assert row.measured_s <= SEND_TIME * 1.05 + 1e-9
    table = lines(rows)
    assert len(table) == 1 + min(12, len(rows))
    assert rows[0].label in table[1]


def test_a_timeline_does_not_differ_from_itself(predicted: Timeline) -> None:
    rows = differences(predicted, predicted)
    assert all(d.contribution_s == 0 and d.share == 0 for d in rows)
    assert all(d.ratio == 1 for d in rows if d.count)


def test_timelines_of_two_programs_are_refused(predicted: Timeline) -> None:
    with pytest.raises(UsageError, match="4 ranks and 2 ranks"):
        differences(predicted, play(one_f_one_b(2, 8), COST))
    with pytest.raises(UsageError, match="rank 0 position"):
        differences(predicted, play(one_f_one_b(4, 6), COST))


def test_critical_path_of_1f1b_has_no_gap(predicted: Timeline, measured: Timeline) -> None:
    for timeline in (predicted, measured):
        path = critical_path(timeline)
        assert path[0].start == pytest.approx(min(s.start for s in timeline.spans))
        assert path[-1].end == max(s.end for s in timeline.spans)
        # Nothing in this program waits for anything but lanes, buffers and meetings: the path covers the whole step.
        ends = [path[0].start]
        for span in path:
            assert span.start <= ends[-1] + 1e-9
            ends.append(span.end)
        assert ends == sorted(ends)
    path = critical_path(predicted)
    assert sum(s.end - s.start for s in path) == pytest.approx(predicted.makespan)


def test_critical_path_sees_what_overwrites_and_what_was_issued_later() -> None:
    """OPT overwrites what the copy on another lane still reads; the host issues the copy after it computed."""
    listing = (
        Instruction("F", 0, 0),
        Instruction("COPY", 0, 0, lane="d2h", reads=("weights",)),
        Instruction("OPT", 0, 0, writes=("weights",)),
    )
    program = Program((listing,), ({"weights": Buffer(8, persistent=True)},))
    spans = (Span(0, 0, 0.0, 1.0), Span(0, 1, 1.0, 5.0), Span(0, 2, 5.0, 6.0))
    timeline = Timeline("measured", program, spans, ({"device": (8, 8, 8)},), (0,))
    assert [s.position for s in critical_path(timeline)] == [0, 1, 2]


def test_several_steps_in_one_timeline(measured: Timeline) -> None:
    """Each step has its own meetings, its own memory over time and its own turn on the critical path."""
    period = measured.makespan
    later = tuple(s._replace(start=s.start + period, end=s.end + period) for s in measured.spans)
    both = replace(measured, spans=measured.spans + later)
    assert visible(both) == pytest.approx({key: 2 * value for key, value in visible(measured).items()})
    path = critical_path(both)
    assert path[0].start == pytest.approx(0.0)
    assert sum(s.end - s.start for s in path if s.start >= period - 1e-9) > 0.5 * period
    for once, twice in zip(pictures(measured), pictures(both), strict=True):
        assert twice.memory["device"][: len(once.memory["device"])] == once.memory["device"]
        assert max(t for t, _ in twice.memory["device"]) > 1e9 * period
        assert sum(map(len, twice.rows)) == 2 * sum(map(len, once.rows))


def test_critical_path_of_nothing() -> None:
    empty = Timeline("predicted", Program(((),), ({},)), (), ({},), (0,))
    assert critical_path(empty) == []
    assert visible(empty) == {}
    assert "<svg" in svg([empty], "nothing")
    assert "<canvas" in html([empty], "nothing")
    assert [e for e in perfetto([empty])["traceEvents"] if e["ph"] != "M"] == []
