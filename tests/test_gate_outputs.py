"""What a gate writes: lines, JSON, JUnit XML that is read back, GitHub's commands and summary, whatever the text."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from autotune.cli import _gating, _settings
from autotune.gate.checks import Check
from autotune.gate.github import CUT, MOST, SUMMARY_BYTES, commands, summary
from autotune.gate.junit import junit
from autotune.gate.outcome import Outcome, failed
from autotune.gate.rule import Interval
from autotune.gate.table import lines
from autotune.spec.errors import EnvironmentFault, StaleLock
from autotune.spec.lock import Launch

NASTY = "a<b> & \"c\" 'd' ]]> \x00\x1b[31m\ufffe %25 é 🐻\r\nsecond: line, ::error::x"
SIDE = (Launch((1.0, 1.1, 0.9)), Launch((1.02,)), Launch((0.98,)))
HELD = Outcome(
    "recipes/a.toml",
    "regressed",
    7,
    "slower than the baseline by more than 3.0% (+8.0%, +5.0% to +11.0%)",
    plan_id="0123456789",
    baseline="a.lock.json",
    threshold=0.03,
    found=Interval(1.08, 1.05, 1.11),
    new=SIDE,
    base=SIDE,
    set_aside=2,
    checks=(Check("losses", "ok", "equal"),),
    notes=("driver was 1 and is 2",),
    wall_s=12.5,
)
FINE = Outcome("recipes/b.toml", "pass", 0, "no slower", plan_id="ab", wall_s=1.0)
STALE = failed("recipes/c,d:e.toml", StaleLock(f"c is stale: {NASTY}", hint="search again"), "measured")
SHOWN = Outcome("recipes/d.toml", "reported", 0, "another machine's", plan_id="cd")
ALL = (HELD, FINE, STALE, SHOWN)


def test_junit_is_read_back() -> None:
    suite = ElementTree.fromstring(junit(ALL))[0]
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "1", "time": "13.500",
    }  # fmt: skip
    held, fine, stale, shown = suite.findall("testcase")
    failure = held.find("failure")
    assert failure is not None and failure.get("message") == HELD.message and "exit code 7" in failure.get("type", "")
    out = held.find("system-out")
    assert out is not None and "ratio" in (out.text or "")
    assert [one.tag for one in fine] == ["system-out"] and fine.get("classname") == "autotune.gate.measured"
    error = stale.find("error")
    assert error is not None and stale.get("name") == STALE.recipe
    assert "a<b> & \"c\" 'd' ]]> \ufffd\ufffd[31m\ufffd %25 é 🐻" in (error.text or "") and "second: line" in (
        error.text or ""
    )
    assert shown.find("skipped") is not None, "what nobody judged is no pass"


def test_commands_cannot_be_forged() -> None:
    found = commands(ALL)
    assert len(found) == 3 and not any("\n" in line or "\r" in line for line in found)
    (stale,) = [line for line in found if "is stale" in line]
    assert stale.startswith("::error file=recipes/c%2Cd%3Ae.toml,title=autotune gate%3A error::c is stale: ")
    assert "%2525 é" in stale and "%0D%0Asecond: line, ::error::x%0Asearch again" in stale
    assert found[-1].startswith("::notice file=recipes/d.toml,") and "b.toml" not in "".join(found)


def test_ten_annotations_at_most() -> None:
    many = [failed(f"r{n}.toml", StaleLock("stale"), "measured") for n in range(25)]
    found = commands([FINE, *many])
    assert len(found) == MOST and "16 more recipes" in found[-1]
    assert len(commands(many[:MOST])) == MOST and "more recipes" not in commands(many[:MOST])[-1]
    late = commands([*[SHOWN] * 12, HELD])
    assert late[0].startswith("::error file=recipes/a.toml"), "what failed comes before notices"


def test_a_summary_is_a_table_whatever_the_text() -> None:
    text = summary([*ALL, failed("p|q`*.toml", StaleLock("x | y\n<script>"), "measured")])
    rows = text.strip().splitlines()
    assert len(rows) == 4 + 5 and all(row.startswith("|") and row.endswith("|") for row in rows[2:])
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows[2:])
    assert "<script>" not in text and "1.0800 | 1.0500 to 1.1100" in text


def test_a_summary_has_its_bounds() -> None:
    long = [failed(f"{n}.toml", StaleLock("é" * 5000), "measured") for n in range(200)]
    text = summary(long)
    assert len(text.encode()) <= SUMMARY_BYTES and text.endswith(CUT)
    assert text[: -len(CUT)].splitlines()[-1].endswith("|"), "no row is cut in its middle"


def test_a_summary_is_added_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.md"
    monkeypatch.setenv(_gating.SUMMARY, str(file))
    _settings.begin(quiet=True)
    for _ in range(2):
        _gating.written([FINE], None, github=True)
    assert file.read_text().count("### autotune gate") == 2
    file.write_text("x" * (SUMMARY_BYTES + 1))
    _gating.written([FINE], None, github=True)
    assert file.stat().st_size == SUMMARY_BYTES + 1
    monkeypatch.setenv(_gating.SUMMARY, str(tmp_path))
    with pytest.raises(EnvironmentFault, match="cannot write the step's summary"):
        _gating.written([FINE], None, github=True)


def test_a_junit_file_that_cannot_be_written(tmp_path: Path) -> None:
    _settings.begin(quiet=True)
    _gating.written([FINE], tmp_path / "new" / "j.xml", github=False)
    assert ElementTree.parse(tmp_path / "new" / "j.xml").getroot().tag == "testsuites"
    with pytest.raises(EnvironmentFault, match="cannot write the JUnit file"):
        _gating.written([FINE], tmp_path, github=False)


def test_lines_and_json_have_every_figure() -> None:
    text = "\n".join(lines(HELD))
    for part in (
        "recipes/a.toml: regressed",
        "1.0800 (1.0500 to 1.1100); 3.0% counts",
        "2 launches: the machine was under load",
        "ok: equal",
        "driver was 1",
    ):
        assert part in text
    found = HELD.to_dict()
    assert found["interval"] == [1.05, 1.11] and found["launches"]["new"] == [1.0, 1.02, 0.98]
    assert FINE.to_dict()["ratio"] is None and FINE.to_dict()["launches"]["set_aside"] == 0
