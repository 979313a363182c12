"""The pictures of timelines: their JSON form, the HTML page, SVG, Perfetto's trace, and predicted against measured."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from dataclasses import replace
from time import perf_counter
from xml.etree import ElementTree

import pytest

from autotune.report.compare import critical_path, differences, lines
from autotune.report.figures import IDLE, figures, visible, working
from autotune.report.palette import HASHED, KNOWN, colour, ink
from autotune.report.picture import memory_times, pictures, steps
from autotune.report.plot import html, perfetto, svg
from autotune.report.units import percent, seconds, size
from autotune.spec.errors import UsageError
from autotune.spec.program import COMPUTE, Buffer, Instruction, Program
from autotune.spec.timeline import Span, Timeline
from autotune.spec.timeline_file import from_dict, text, to_dict

ACTIVATION, MESSAGE, WEIGHTS = 64 << 20, 8 << 20, 512 << 20
SEND_TIME = 0.2


def one_f_one_b(ranks: int, items: int, name: str = "stage") -> Program:
    """1F1B (PipeDream-flush): rank r warms up with ranks - 1 - r forwards, then alternates, then drains."""
    listings = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, items)
        order = [("F", i) for i in range(ahead)]
        for i in range(items - ahead):
            order += [("F", ahead + i), ("BW", i)]
        order += [("BW", i) for i in range(items - ahead, items)]
        listing: list[Instruction] = []
        for op, item in order:
            listing += around(op, item, rank, ranks)
        listing.append(Instruction("OPT", rank, reads=("weights",), writes=("weights",)))
        listings.append(tuple(listing))
    sizes: list[dict[str, Buffer]] = []
    for listing in listings:
        names = {n for i in listing for n in i.writes if n != "weights"}
        sizes.append({n: Buffer(MESSAGE if n[0] in "xg" else ACTIVATION) for n in sorted(names)})
        sizes[-1]["weights"] = Buffer(WEIGHTS, persistent=True)
    return Program(tuple(listings), tuple(sizes), facts={"schedule": "1f1b", "name": name})


def around(op: str, item: int, rank: int, ranks: int) -> list[Instruction]:
    """A forward or backward of one stage with the messages before and after it."""
    made: list[Instruction] = []
    forward = op == "F"
    source, target = (rank - 1, rank + 1) if forward else (rank + 1, rank - 1)
    kind = "x" if forward else "g"
    if 0 <= source < ranks:
        made.append(message("RECV", kind, item, rank, source, rank, writes=(f"{kind}{item}",)))
    reads = (f"{kind}{item}",) if 0 <= source < ranks else ()
    out = (f"{kind}o{item}",) if 0 <= target < ranks else ()
    if forward:
        made.append(Instruction("F", rank, item, reads=reads, writes=(f"a{item}", *out), frees=reads))
    else:
        freed = (f"a{item}", *reads)
        made.append(Instruction("BW", rank, item, reads=(f"a{item}", *reads), writes=out, frees=freed))
    if out:
        made.append(message("SEND", kind, item, rank, rank, target, reads=out, frees=out))
    return made


def message(
    op: str,
    kind: str,
    item: int,
    rank: int,
    source: int,
    target: int,
    reads: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    frees: tuple[str, ...] = (),
) -> Instruction:
    meet, lane = f"{kind}{item}:{source}>{target}", f"p2p {kind} {source}>{target}"
    return Instruction(op, rank, item, 0, lane, reads, writes, frees, meet, (source, target))


COST = {"F": 1.0, "BW": 2.0, "OPT": 0.5, "SEND": SEND_TIME, "RECV": SEND_TIME}


def play(program: Program, cost: dict[str, float], kind: str = "predicted", jitter: float = 0.0) -> Timeline:
    """Start each instruction when its lane, what it reads and its meeting allow: a plain event loop over ranks."""
    noise = random.Random(7)
    world = program.world
    lane_free: list[dict[str, float]] = [defaultdict(float) for _ in range(world)]
    ready: list[dict[str, float]] = [defaultdict(float) for _ in range(world)]
    done: dict[tuple[int, int], Span] = {}
    arrived: dict[str, dict[int, tuple[int, float]]] = defaultdict(dict)
    pending = [list(enumerate(listing)) for listing in program.ranks]
    while any(pending):
        progressed = False
        for rank in range(world):
            blocked: set[str] = set()
            unwritten = {n for p, i in pending[rank] for n in i.writes if n != "weights"}
            for position, i in list(pending[rank]):
                if i.lane in blocked or unwritten & set(i.reads):
                    blocked.add(i.lane)
                    continue
                start = max([lane_free[rank][i.lane], *(ready[rank][n] for n in i.reads)])
                long = cost[i.op] * (1 + jitter * noise.random())
                if i.meet is not None:
                    arrived[i.meet][rank] = (position, start)
                    if len(arrived[i.meet]) < len(i.peers):
                        blocked.add(i.lane)
                        continue
                    start = max(at for _, at in arrived[i.meet].values())
                    members = [(r, p, at) for r, (p, at) in arrived[i.meet].items()]
                else:
                    members = [(rank, position, start)]
                for r, p, at in members:
                    # What was measured holds the wait for the other side; what is predicted begins when all are there.
                    done[r, p] = Span(r, p, at if kind == "measured" else start, start + long)
                    lane_free[r][program.ranks[r][p].lane] = start + long
                    ready[r].update((n, start + long) for n in program.ranks[r][p].writes)
                    pending[r] = [entry for entry in pending[r] if entry[0] != p]
                unwritten = {n for p, i in pending[rank] for n in i.writes if n != "weights"}
                progressed = True
        assert progressed, "the test's own program is deadlocked"
    memory, sent = [], []
    for rank, listing in enumerate(program.ranks):
        held, sizes = WEIGHTS, []
        buffers = program.buffers[rank]
        for i in listing:
            held += sum(buffers[n].size for n in i.writes if not buffers[n].persistent)
            sizes.append(held)
            held -= sum(buffers[n].size for n in i.frees)
        memory.append({"device": tuple(sizes)})
        sent.append(sum(MESSAGE for i in listing if i.op == "SEND"))
    spans = tuple(sorted(done.values(), key=lambda s: (s.start, s.rank, s.position)))
    return Timeline(kind, program, spans, memory, tuple(sent), {"jitter": jitter})


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


def test_page_is_self_contained(predicted: Timeline, measured: Timeline) -> None:
    page = html([predicted, measured], "llama on 4 ranks")
    assert page.count("<script") == 2
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", page)
    block = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    assert [t["kind"] for t in block["timelines"]] == ["predicted", "measured"]
    drawn = sum(len(row["start"]) for t in block["timelines"] for r in t["ranks"] for row in r["rows"])
    assert drawn == len(predicted.spans) + len(measured.spans)
    assert seconds(predicted.makespan) in page
    assert percent(measured.idle_share) in page
    assert size(max(predicted.peaks)) in page
    assert "prefers-color-scheme" in page


EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&\u2028'


def evil() -> Timeline:
    """A timeline whose every name tries to be markup."""
    lane, buffer = f"lane {EVIL}", f"buffer {EVIL}"
    instruction = Instruction(EVIL, 0, 0, lane=lane, writes=(buffer,), meet=EVIL, peers=(0,))
    program = Program(((instruction,),), ({buffer: Buffer(7, EVIL)},), facts={EVIL: EVIL})
    return Timeline("predicted", program, (Span(0, 0, 0.0, 1.0),), ({"device": (7,), EVIL: (7,)},), (0,), {EVIL: 1})


def test_names_never_become_markup() -> None:
    timeline = from_dict(json.loads(json.dumps(to_dict(evil()))))
    page = html([timeline], EVIL)
    assert page.count("<script") == 2 and page.count("</script") == 2
    assert "<img" not in page
    assert "<script>alert" not in page
    picture = svg([timeline], EVIL)
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()}
    assert tags <= {"svg", "title", "style", "rect", "text", "polyline"}
    assert perfetto([timeline])["traceEvents"][-1]["name"].startswith(EVIL[:5])


def test_policy_allows_exactly_the_page_s_own_script(predicted: Timeline) -> None:
    from base64 import b64encode
    from hashlib import sha256

    page = html([predicted], "x")
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    assert f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in page
    assert "default-src 'none'" in page


def test_svg_shows_every_rank_and_label(predicted: Timeline, measured: Timeline) -> None:
    root = ElementTree.fromstring(svg([predicted, measured], "two & two"))
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert "two & two" in texts
    assert {"0BW0", "3BW7"} <= set(texts)
    assert sum(t.startswith("peak ") for t in texts) == 8
    shown = sum(1 for element in root.iter() if element.tag.endswith("rect") and len(element))
    assert shown == len(predicted.spans) + len(measured.spans)


def test_perfetto_events(predicted: Timeline, measured: Timeline) -> None:
    events = perfetto([predicted, measured])["traceEvents"]
    json.dumps(events)
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(predicted.spans) + len(measured.spans)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(processes.values()) == sorted(f"{k} rank {r}" for k in ("predicted", "measured") for r in range(4))
    assert {p for p, name in processes.items() if name.startswith("predicted")} == {0, 1, 2, 3}
    first = max(predicted.spans, key=lambda s: s.end - s.start)
    origin = min(s.start for s in predicted.spans)
    found = next(e for e in spans if e["pid"] == first.rank and e["args"]["position"] == first.position)
    assert found["ts"] == pytest.approx(1e6 * (first.start - origin))
    assert found["dur"] == pytest.approx(1e6 * (first.end - first.start))
    for rank in range(4):
        counters = [e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == rank]
        assert max(counters) == predicted.peak(rank)


def test_memory_over_time_keeps_every_peak_and_never_goes_back(measured: Timeline) -> None:
    for picture in pictures(measured):
        times = [t for t, _ in picture.memory["device"]]
        assert times == sorted(times)
        assert max(b for _, b in picture.memory["device"]) == measured.peak(picture.rank)
    # A receive that was posted at 0 takes its memory between the two computations it stands between.
    listing = (Instruction("F"), Instruction("RECV", lane="p2p", meet="m", peers=(0,)), Instruction("F", 0, 1))
    spans = (Span(0, 0, 1.0, 2.0), Span(0, 1, 0.0, 5.0), Span(0, 2, 5.0, 6.0))
    timeline = Timeline("measured", Program((listing,), ({},)), spans, ({"device": (1, 2, 3)},), (0,))
    assert memory_times(timeline, 0, {s: s.start for s in spans}) == [0.0, 0.0, 5.0]
    assert memory_times(timeline, 0, {s: max(s.start, 4.0) for s in spans}) == [0.0, 4.0, 5.0]
    assert steps([0, 1, 1, 2], [5, 9, 5, 5]) == ((0, 5), (1, 9), (1, 5))


def test_thirty_thousand_spans() -> None:
    """A page of 30,000 instructions is made in seconds and stays a few megabytes."""
    listing = tuple(
        Instruction(f"op{k % 7}", k % 3, k, lane=COMPUTE if k % 4 else "h2d", writes=(f"b{k % 50}",))
        for k in range(7500)
    )
    buffers = {f"b{k}": Buffer(1 << 20) for k in range(50)}
    program = Program((listing,) * 4, (buffers,) * 4)
    spans = tuple(Span(r, k, k * 1e-4, k * 1e-4 + 9e-5) for r in range(4) for k in range(7500))
    memory = tuple({"device": tuple((k % 97) << 20 for k in range(7500))} for _ in range(4))
    timeline = Timeline("predicted", program, spans, memory, (0,) * 4)
    began = perf_counter()
    page = html([timeline], "large")
    raw = json.dumps(to_dict(timeline), separators=(",", ":"))
    assert from_dict(json.loads(raw)).spans == spans
    assert perf_counter() - began < 20
    assert len(page) < 4_000_000
    assert len(svg([timeline], "large")) < 6_000_000


def test_colours_are_stable_and_readable() -> None:
    assert colour("SEND_F") == KNOWN["SEND"]
    assert colour("anything") == colour("anything") and colour("anything") in HASHED
    assert len(set(KNOWN.values())) >= 7

    def contrast(a: str, b: str) -> float:
        def luminance(c: str) -> float:
            parts = [int(c[k : k + 2], 16) / 255 for k in (1, 3, 5)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for each in [*KNOWN.values(), *HASHED]:
        assert contrast(each.light, "#ffffff") >= 2.9  # a graphical object against its page (WCAG 1.4.11: 3:1)
        assert contrast(each.dark, "#14171a") >= 2.9
        for shade in each:
            assert contrast(shade, ink(shade)) >= 4.5


def test_units() -> None:
    assert [seconds(v) for v in (0, 1.5, 0.0123, 4.2e-6, 3e-9, -0.5, 0.99999)] == [
        "0 s",
        "1.50 s",
        "12.3 ms",
        "4.20 µs",
        "3.00 ns",
        "-500 ms",
        "1.00 s",
    ]
    assert [size(v) for v in (0, 1023, 1024, 3.2 * 2**30, 2**40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "3.20 GiB",
        "1.00 TiB",
    ]
