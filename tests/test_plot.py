"""The pictures of timelines: the HTML page, SVG, Perfetto's trace, colours and units."""

from __future__ import annotations

import json
import re
from time import perf_counter
from xml.etree import ElementTree

import pytest

from autotune.report.palette import HASHED, KNOWN, colour, ink
from autotune.report.picture import memory_times, pictures, steps
from autotune.report.plot import html, perfetto, svg
from autotune.report.units import percent, seconds, size
from autotune.spec.program import COMPUTE, Buffer, Instruction, Program
from autotune.spec.timeline import Span, Timeline
from autotune.spec.timeline_file import from_dict, to_dict
from tests.timelines import COST, one_f_one_b, play


@pytest.fixture(scope="module")
def predicted() -> Timeline:
    return play(one_f_one_b(4, 8), COST)


@pytest.fixture(scope="module")
def measured() -> Timeline:
    return play(one_f_one_b(4, 8), {**COST, "BW": 2.4}, "measured", jitter=0.05)


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


@pytest.mark.alone
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
