"""Validations: the split into rows fitted to and rows judged, resuming, bars, reports, and the command."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any
from xml.etree import ElementTree

import pytest

from autotune.cli._validating import Asked, validated
from autotune.planners.predict import Predictor
from autotune.planners.replay import fit
from autotune.planners.replay.aiconfigurator import MODELS, served
from autotune.planners.replay.calibration import dump, load
from autotune.planners.replay.row import replay, summary
from autotune.planners.replay.split import for_fitting
from autotune.planners.replay.tables import TABLES
from autotune.planners.replay.vtrain import CALIBRATION, Teller, runs
from autotune.profiles_db.profile_file import dump_profile, load_profile, shipped
from autotune.report.diagonal import LEFT, SIDE, TOP, Dot, diagonal, ticks
from autotune.report.validation import markdown, page
from autotune.runners.agreement import ranks, regrets, spearman_rho
from autotune.runners.bars import STATED, missed, read
from autotune.runners.job import Job, RunResult
from autotune.runners.ledger import ENDED
from autotune.runners.suites import suites
from autotune.runners.validating import groups, of_table, summaries
from autotune.spec.errors import UsageError
from autotune.spec.families import load_model
from autotune.spec.validation import Judgement, Validation
from tests.commands import Home, two_workers
from tests.pages import Tags


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.make(tmp_path_factory.mktemp("validate"))


@pytest.fixture(scope="module")
def vtrain() -> tuple[Judgement, ...]:
    return tuple(of_table("vtrain", row) for row in TABLES["vtrain"].rows())


# --- published measurements


def test_no_row_is_both_fitted_to_and_judged(vtrain: tuple[Judgement, ...]) -> None:
    fitted = {(r.setup, r.name, r.measured) for r in vtrain if r.fitted}
    judged = {(r.setup, r.name, r.measured) for r in vtrain if not r.fitted}
    assert not fitted & judged and len(fitted) + len(judged) == len(runs()) == 706
    assert min(len(fitted), len(judged)) > 300
    assert load(CALIBRATION).rows == len(fitted)


def test_the_split_is_a_row_s_own() -> None:
    """Known answers: whoever changes the rule moves rows from one side to the other."""
    first = runs()[0]
    assert for_fitting("2,16,8,1024,16,24,1024,1,1,2,372.160408") == first.fitted
    assert [for_fitting(text) for text in ("a", "b", "c", "d")] == [False, False, True, True]


def test_judged_rows_are_within_the_targets(vtrain: tuple[Judgement, ...]) -> None:
    judged = next(s for s in summaries(vtrain) if not s.fitted)
    bars = {figure: limit for _, figure, limit in STATED["vtrain"]}
    assert judged.mean <= bars["mean"] == 0.10
    assert judged.rho is not None and judged.rho >= bars["rho"] == 0.97
    assert judged.regret is not None and 0 <= judged.regret < 0.05 and judged.cases > 50
    assert {row.grade for row in vtrain} == {"datasheet"} and all(row.calibrated for row in vtrain)
    told = groups(vtrain)
    assert sum(g.rows for g in told if g.group.startswith("tensor ")) == judged.rows
    assert [g.group for g in told if g.group.startswith("tensor ")] == ["tensor 1", "tensor 2", "tensor 4", "tensor 8"]


def test_what_the_calibration_leaves_is_what_its_file_says(vtrain: tuple[Judgement, ...]) -> None:
    """The coefficients are written with four digits, the residual with two of a percent."""
    made = load(CALIBRATION)
    fitted = next(s for s in summaries(vtrain) if s.fitted)
    assert fitted.mean == pytest.approx(made.residual, abs=5e-4)
    profile = made.profile()
    assert profile.grade == "calibrated" and load_profile(shipped()[made.base]).grade == "datasheet"
    for one in made.fitted.values():
        assert all(profile.coefficients[name] == one.value for name in one.sets)
        assert all(profile.sources[f"coefficients.{name}"].startswith("fitted to 358 rows") for name in one.sets)


def test_a_table_replays_alike_and_soon() -> None:
    start = process_time()
    tellers = [Teller(load(CALIBRATION).profile()) for _ in range(2)]
    some = runs()[::7]
    first, second = ([teller.predict(run).step_s for run in some] for teller in tellers)
    assert first == second
    assert process_time() - start < 20, "two hundred predictions of small plans"


def test_a_fit_finds_the_coefficients_that_made_the_rows() -> None:
    """Runs that took what known coefficients give: nothing is left, and what the rows tell apart is found again."""
    given = [run for run in runs() if run.fitted][::12]
    values = [free.start for free in fit.FREE.values()]
    names = list(fit.FREE)
    changed = {"host seconds of an instruction": 6e-5, "memory-bound operations": 0.5, "start of a collective": 1e-4}
    values = [changed.get(name, value) for name, value in zip(names, values, strict=True)]
    teller = Teller(fit.calibration(values, [0.0] * len(values), 0.0, 0).profile())
    made = fit.fit([replace(run, iteration_ms=1e3 * teller.predict(run).step_s) for run in given], rounds=6)
    assert made.residual < 0.002
    for name in changed:
        assert made.fitted[name].value == pytest.approx(changed[name], rel=0.05), name


def test_a_calibration_comes_back_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(CALIBRATION)
    dump(made, tmp_path / "again.json")
    monkeypatch.setattr("autotune.planners.replay.calibration.DATA", tmp_path)
    assert load("again") == made
    (tmp_path / "other.json").write_text('{"schema": "autotune.calibration/9"}')
    with pytest.raises(ValueError, match="expected the schema"):
        load("other")


def test_served_models_are_those_of_their_configurations() -> None:
    folder = Path(__file__).parents[1] / "recipes" / "models"
    for name, file in (
        ("Qwen/Qwen3-32B", "Qwen--Qwen3-32B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama--Llama-3.1-8B"),
    ):
        read_, ours = load_model(folder / f"{file}.json"), MODELS[name]
        for key in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "qk_norm"):
            assert getattr(read_, key) == getattr(ours, key), (name, key)
    assert {row.model for row in served()} == set(MODELS) and not any(for_fitting(row.id) for row in served())


# --- what rows say together


def test_ranks_of_ties_and_spearman() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman_rho([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman_rho([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(1 - 6 * 2 / (4 * 15))  # without ties: 1 - 6 d2/n3
    assert math.isnan(spearman_rho([1, 1], [1, 2]))
    with pytest.raises(ValueError, match="2 and 1"):
        spearman_rho([1, 2], [1])


def test_regret_is_the_loss_of_the_choice() -> None:
    rows = [("a", 1.0, 12.0), ("a", 2.0, 10.0), ("b", 1.0, 5.0), ("b", 2.0, 9.0), ("alone", 1.0, 1.0), ("", 1.0, 1.0)]
    assert regrets(rows) == pytest.approx([0.2, 0.0])


def judgement(name: str = "a", predicted: float = 1.1, measured: float = 1.0, **more: Any) -> Judgement:
    words = {"table": "t", "source": "s", "setup": "u", "metric": "step s"} | more
    return Judgement(**words, name=name, predicted=predicted, measured=measured)


def validation(*rows: Judgement, **more: Any) -> Validation:
    told = {"suite": "s", "machine": "m", "profile": "p", "cost_model": "c"} | more
    return Validation(**told, rows=rows, summaries=tuple(summaries(rows)), groups=tuple(groups(rows)))


def test_rows_that_were_fitted_to_are_summed_apart() -> None:
    rows = [
        judgement(),
        judgement("b", 0.9),
        judgement("c", 3.0, fitted=True),
        judgement("d", 2.0, 1.0, metric="peak bytes"),
    ]
    time, fitted, memory = summaries(rows)
    assert (time.rows, time.mean, time.bias) == (2, pytest.approx(0.1), pytest.approx(0))
    assert (fitted.fitted, fitted.worst) == (True, pytest.approx(2.0))
    assert (memory.kind, memory.mean, memory.tau) == ("memory", 1.0, None)
    assert Judgement.from_dict(json.loads(json.dumps(rows[2].to_dict()))) == rows[2]


def test_bars_are_missed_by_what_is_judged() -> None:
    found = validation(judgement(), judgement("c", 3.0, fitted=True), judgement("m", 1.02, 1.0, metric="peak bytes"))
    assert missed(read(["mean=0.11", "worst=0.2", "memory.worst=0.03"], ()), found) == []
    assert [line.split(":")[0] for line in missed(read(["mean=0.05", "memory.mean=0.01"], ()), found)] == [
        "t, step s",
        "t, peak bytes",
    ]
    assert missed(read(["tau=0.9"], ()), found) == ["time.tau >= 0.9: nothing to tell it from"]
    assert missed(read(["targets"], ("vtrain",)), found) == [], "those of another table"
    assert len(missed(read(["targets"], ()), found)) == 1  # the mean of step times
    assert "did not run" in missed(read(["mean=1"], ()), replace(found, failed={"plan": "why"}))[0]
    assert missed((), replace(found, failed={"plan": "why"})) == []


@pytest.mark.parametrize("text", ["meen=0.1", "mean", "mean=x", "mean=-1", "mean=nan", "disk.mean=0.1", "target"])
def test_a_bar_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--require") as caught:
        read([text, "mean=0.1"], ())
    assert len(caught.value.problems) == 1
    assert "targets, or [time|memory.]mean|worst|tau|rho|regret=NUMBER" in str(caught.value)


# --- reports

EVIL = '</title><script>alert(1)</script>|<img src=x onerror="alert(2)">&'


def evil() -> Validation:
    row = judgement(EVIL, table=EVIL, source=EVIL, setup=EVIL, grade=EVIL, traits={EVIL: EVIL}, metric=f"{EVIL} s")
    many = [replace(row, predicted=1 + k / 100) for k in range(70)]  # more than are shown at once
    return validation(*many, suite=EVIL, machine=EVIL, notes=(EVIL,), failed={EVIL: EVIL})


def test_pages_are_whole_and_names_are_never_markup() -> None:
    for found in (evil(), validation(judgement(), judgement("zero", 0.0, 1.0), judgement("no error", relative=False))):
        text = page(found)
        tags = Tags()
        tags.feed(text)
        assert tags.open == [] and not {"script", "img"} & set(tags.seen)
        assert not re.search(r"(src|href)\s*=\s*[\"']|url\(|@import", text.replace(" xmlns", "")), "nothing is loaded"
        assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
        for plot in re.findall(
            r"<svg class=\"plot\".*?</svg></svg>|<svg class=\"plot\".*?</svg>(?=<figcaption)", text, re.S
        ):
            ElementTree.fromstring(plot)
        assert "<figure>" in text


def test_markdown_has_a_cell_a_column_whatever_names_say() -> None:
    lines = markdown(evil()).splitlines()
    for line in lines:
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (7, 10, 11), line
    assert "<script" not in "".join(lines)
    assert sum(line.startswith("| ") for line in lines) == 1 + 1 + 1 + 1 + 1 + 70  # three heads, a summary, a group


def test_a_right_prediction_lies_on_the_diagonal() -> None:
    dots = [Dot(2.0, 2.0, "measured", "right"), Dot(20.0, 10.0, "datasheet", "twice", fitted=True)]
    drawn = ElementTree.fromstring(diagonal(dots, "step s"))
    space = "{http://www.w3.org/2000/svg}"
    (inner,) = drawn.findall(f"{space}svg")
    assert (inner.get("x"), inner.get("y"), inner.get("width")) == (str(LEFT), str(TOP), str(SIDE))
    right, twice = inner.findall(f"{space}circle")
    assert float(right.get("cx", "")) + float(right.get("cy", "")) == pytest.approx(SIDE, abs=0.2)
    assert float(twice.get("cx", "")) + float(twice.get("cy", "")) > 0
    assert float(twice.get("cy", "")) < SIDE - float(twice.get("cx", "")), "too much is above the diagonal"
    assert right.findtext(f"{space}title") == "right" and "fitted" in str(twice.get("class"))
    assert len(inner.findall(f"{space}polygon")) == 2
    with pytest.raises(ValueError, match="above zero"):
        diagonal([Dot(0.0, 1.0, "measured", "")], "x")
    with pytest.raises(ValueError, match="above zero"):
        diagonal([], "x")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert ticks(1.5, 30) == [2, 5, 10, 20]
    assert ticks(1.0, 1.21) == [1.0, 1.05, 1.1, 1.15, 1.2]
    assert all(3 <= len(ticks(low, low * ratio)) <= 9 for low in (1e-4, 0.3, 77.0) for ratio in (1.05, 2, 30, 1e4))


# --- interruptions


def interrupting(after: str) -> Callable[[str], None]:
    """A progress that Ctrl-C meets when it has something to say that holds `after`."""

    def progress(text: str) -> None:
        if after in text:
            raise KeyboardInterrupt

    return progress


def test_published_figures_go_on_where_they_were_interrupted(home: Home) -> None:
    said: list[str] = []
    with home.store() as store:
        with pytest.raises(KeyboardInterrupt):
            validated(Asked("vtrain"), store, interrupting("vtrain: 100 of"))  # type: ignore[arg-type]
        (entry,) = [one for one in store.validations() if one.suite == "vtrain"]
        assert entry.state == "running" and len(entry.visits) == 100
        found, id = validated(Asked("vtrain"), store, said.append)  # type: ignore[arg-type]
        assert id == entry.id and said[0].startswith("going on after 100 rows")
        assert len(found.rows) == 706 and len({(r.setup, r.name) for r in found.rows}) == 706
        (entry,) = [one for one in store.validations() if one.suite == "vtrain"]
        assert entry.state == "finished" and entry.visits == () and len(entry.rows) == 706
        assert entry.cost_model == found.cost_model and any(part["rows"] == 348 for part in entry.summary)


def test_a_suite_goes_on_with_the_plan_that_was_interrupted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C meets the second plan while its workers run: the first is kept, the second really runs at the next go."""
    asked = Asked("cpu-generate", repeats=1, steps=1, as_is=True)
    suite = suites()["cpu-generate"]
    line = Predictor(suite.model, suite.workload, two_workers()).predict(suite.plans[0])
    ran, said = [RunResult((3.0,), 1.0, (2 * line.peak_bytes[0],), timeline=line.timeline)], list[str]()

    def launched(job: Job, **how: Any) -> RunResult:
        if not ran:
            raise KeyboardInterrupt
        return ran.pop()

    with home.store() as store:
        monkeypatch.setattr("autotune.runners.suite.launch", launched)
        with pytest.raises(KeyboardInterrupt):
            validated(asked, store, said.append)  # type: ignore[arg-type]
        monkeypatch.undo()
        (entry,) = [one for one in store.validations() if one.suite == "cpu-generate"]
        assert entry.state == "running" and [row.get("failed") for row in entry.visits] == [None, ENDED]
        said.clear()
        found, id = validated(asked, store, said.append)  # type: ignore[arg-type]
        assert id == entry.id and said[0] == "going on after 2 plans that an interrupted validation has begun"
        assert sum("mb1 |" in text for text in said) == 0, "what was measured is not run again"
        assert found.failed == {} and (found.rows[0].measured, found.rows[1].error) == (3.0, -0.5)
        metrics = ("step s", "peak bytes", "prefill s", "decoded token s")
        assert [(r.name[-3:], r.metric) for r in found.rows[2:]] == [("mb8", metric) for metric in metrics]
        assert abs(found.rows[3].error) < 0.02, "peaks are counted, whatever the profile says of time"
        assert {r.grade for r in found.rows} == {"datasheet", "counted"}
        time = next(part for part in found.summaries if part.metric == "step s")
        assert time.cases == 1 and time.regret is not None and time.regret >= 0


# --- the command


def test_the_command_reports_and_requires(home: Home) -> None:
    words = ("--suite", "vocabulary", "--json", "--report", "r.html", "--report", "r.md", "--require")
    said = home.run("validate", *words, "memory.worst=0.03")
    assert said.code == 7 and "vocabulary, peak GiB: worst 0.0617, required memory.worst <= 0.03" in said.stderr
    told = said.json
    assert told["schema"] == "autotune.validate/1"
    keys = {"schema", "validation_id", "suite", "machine", "profile", "cost_model", "rows", "summary", "groups"}
    assert set(told) == keys | {"failed", "notes", "reports", "required", "coverage"}
    assert told["required"]["kept"] is False and len(told["required"]["missed"]) == 1
    assert len(told["rows"]) == 32
    first, results = told["rows"][0], replay(TABLES["vocabulary"])
    assert {"predicted", "measured", "error", "grade", "fitted", "source"} <= set(first)
    assert first["error"] == pytest.approx(results[0][2] / 100)
    assert told["summary"][0]["mean"] == pytest.approx(summary(results)["MFU %"][0] / 100)
    assert (home.folder / "r.html").read_text().startswith("<!doctype html>")
    assert "| p=8 V=32k | vocab-1 |" in (home.folder / "r.md").read_text()


def test_people_read_a_table_of_signed_errors(home: Home) -> None:
    said = home.run("validate", "--suite", "vocabulary", "--require", "memory.mean=0.05", "-q")
    assert said.code == 0 and said.stderr == ""
    row = r"p=8 V=256k +vocab-2 +MFU % +58\.46 +49\.69 +\+17\.6 % +[0-9.]+ to [0-9.]+ +inside +datasheet"
    assert re.search(row, said.stdout)
    assert re.search(r"^vocabulary +peak GiB +16 +1\.8 % +\+1\.6 % +\+6\.2 % +0\.950 +0\.991 +– +–$", said.stdout, re.M)


def test_listed_names_are_known(home: Home) -> None:
    told = home.run("validate", "--list", "--json").json
    assert told["schema"] == "autotune.validate.list/1"
    assert {"cpu", "h200", "h200x2"} <= {suite["name"] for suite in told["suites"]}
    assert {table["name"] for table in told["tables"]} == set(TABLES)


def test_what_cannot_be_validated_is_refused_at_once(home: Home, tmp_path: Path) -> None:
    l40s, elsewhere = tmp_path / "l40s.json", tmp_path / "elsewhere.json"
    dump_profile(load_profile(shipped()["l40s"]), l40s)
    dump_profile(replace(two_workers(), fingerprint="another"), elsewhere)
    wrong = {
        ("--suite", "papres"): (2, "(nearest: papers)"),
        ("--suite", "cpu", "--plans", "0,99"): (2, "found '99'; expected numbers from 0 to 13"),
        ("--suite", "papers", "--plans", "0"): (2, "--plans: of a suite that runs"),
        ("--suite", "papers", "--report", "r.pdf"): (2, "expected one of .html, .md"),
        ("--suite", "papers", "--report", "none/r.md"): (2, "there is no folder"),
        ("--suite", "papers", "--require", "meen=1"): (2, "(nearest: mean)"),
        ("--suite", "cpu", "--profile", str(l40s)): (4, "expected 2 x processors"),
        ("--suite", "cpu", "--profile", str(elsewhere)): (4, "which is not this machine"),
    }
    if not has_gpu():
        wrong["--suite", "h200x2"] = (4, "found no GPU; expected 2 x NVIDIA GPUs")
    for words, (code, message) in wrong.items():
        said = home.run("validate", *words)
        assert (said.code, said.stdout) == (code, "") and message in said.stderr, said.stderr


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
