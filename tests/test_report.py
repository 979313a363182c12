"""The page on a recipe: what is on it, that it stands alone, and that no name in it can act."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planners.predict import Predictor
from autotune.report.explain import explain_prediction
from autotune.report.scatter import Axis, Point, front, scatter
from autotune.report.sheet import PastRun, Sheet, page
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.commands import two_workers
from tests.pages import Tags
from tests.recipes import Autotune

MODEL = ModelSpec("tiny", "LlamaForCausalLM", 32, 4, 4, 2, 8, 48, 256)
WORK = Workload(sequence_length=16, global_batch=4, precision="fp32")


def sheet(**changed: object) -> Sheet:
    predictor = Predictor(MODEL, WORK, two_workers())
    plans = [predictor.predict(Plan(micro_batch=m)) for m in (1, 2, 4)]
    runs = [
        PastRun(f"2026-11-0{n} 10:00:00", f"run{n}", plans[0].plan.id, n / 10, -0.02, 1 << 20, "abc") for n in (1, 2)
    ]
    made = Sheet(
        "tiny on two cores",
        explain_prediction(plans[0], two_workers()),
        plans,
        [plans[0].timeline] if plans[0].timeline else [],
        runs,
        two_workers(),
        {plans[0].plan.id: 0.15},
        0.01,
        0.9,
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def test_the_page_is_whole_and_alone() -> None:
    text = page(sheet())
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("svg") == 2 and tags.seen.count("circle") == 3 + 2
    assert not re.search(r"(src|href)=", text) and "http://" not in text and "https://" not in text
    for words in ("Time and memory", "Where the time goes", "Timelines", "The machine", "Runs", "1.0 %", "run2"):
        assert words in text, words
    assert text.index("run2") < text.index("run1</td>"), "the newest run first"


def test_names_cannot_act() -> None:
    bad = '<img src=x onerror="alert(1)">'
    runs = [PastRun(bad, bad, bad, 0.1, None, 1, bad)]
    text = page(sheet(title=bad, runs=runs))
    assert "<img" not in text and "&lt;img" in text


def test_without_timelines_there_is_no_script() -> None:
    text = page(sheet(timelines=[], runs=[]))
    assert "<script" not in text and "script-src 'none'" in text
    assert "None of this work is stored yet" in text


def test_a_front() -> None:
    points = [Point(3, 1, "c"), Point(1, 3, "a"), Point(2, 2, "b"), Point(2, 3, "worse"), Point(3, 2, "worse")]
    assert [p.label for p in front(points)] == ["a", "b", "c"]
    assert front([]) == []


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 5e9], [-3.0, 7.0], [1e12, 1e12 + 1]])
def test_points_lie_inside_the_picture(values: list[float]) -> None:
    form = "{:g}".format
    text = scatter([Point(v, v, str(v)) for v in values], Axis("x", form), Axis("y", form))
    places = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert len(places) == len(values)
    assert all(74 <= x <= 606 and 12 <= y <= 278 for x, y in places)
    assert scatter([], Axis("x", form), Axis("y", form)) == ""


def test_whole_numbers_have_whole_ticks() -> None:
    text = scatter(
        [Point(n, 1.0, "") for n in (1, 2, 3)], Axis("run", "{:.0f}".format, least=1.0), Axis("y", "{:g}".format)
    )
    assert re.findall(r'text-anchor="middle">(\d+)<', text) == ["1", "2", "3"]


def test_the_command(autotune: Autotune, recipe: str) -> None:
    said = autotune("report", recipe, "--pin", "data=4", "--out", "x.txt")
    assert said.code == 2 and ".html" in said.stderr and not Path("x.txt").exists()
    said = autotune("report", recipe, "--pin", "data=4", "--out", "x.html", "--json")
    assert said.code == 0 and said.json["file"] == "x.html" and said.json["runs"] == 0
    assert "where the time goes" in Path("x.html").read_text().lower()
