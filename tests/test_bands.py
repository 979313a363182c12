"""Bands: what split-conformal intervals promise, which residuals make them, and that no row is judged by its own."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.planners.replay.split import for_fitting
from autotune.planners.replay.tables import TABLES
from autotune.profiles_db.bands.conformal import binomial_bounds, enough, interval, tail_rank
from autotune.profiles_db.bands.coverage import covered, makes_bands
from autotune.profiles_db.bands.kept import of_judgement, run_name
from autotune.profiles_db.bands.pools import BEFORE, HERE, POOLS, SHIPPED, Bands, distinct
from autotune.profiles_db.bands.shipped import FILE, shipped
from autotune.profiles_db.store import Store
from autotune.report.bands import short, span, within
from autotune.report.units import seconds, size
from autotune.runners.residual_sets import PAGE, printed, tables_under
from autotune.runners.validating import of_table
from autotune.spec.band import GRADES, PEAK, PREFILL, STEP, TOKEN, Band, Kind, Residual, residual
from autotune.spec.lock import answer, bands_of
from autotune.spec.plan import Plan
from autotune.spec.validation import Judgement
from tests.stored import DENSE, WORK, machine, prediction

OURS = Kind(STEP, "measured", "cpu", "train")


def residuals(values: list[float], kind: Kind = OURS, origin: str = SHIPPED) -> list[Residual]:
    return [Residual(kind, value, f"{origin} {n}", origin) for n, value in enumerate(values)]


# --- the interval


def skewed(chance: random.Random) -> float:
    """Residuals as they come: a bias, a long tail on one side."""
    return 0.02 + chance.gauss(0, 0.03) + chance.expovariate(20)


def share_inside(n: int, level: float, trials: int) -> float:
    """How often a further residual falls into the interval of n others, over as many seeds."""
    inside = 0
    for seed in range(trials):
        chance = random.Random(seed)
        found = interval([skewed(chance) for _ in range(n)], level)
        assert found is not None
        inside += found[0] <= skewed(chance) <= found[1]
    return inside / trials


@pytest.mark.parametrize(("n", "level"), [(19, 0.9), (25, 0.9), (38, 0.9), (100, 0.9), (39, 0.95), (5, 0.6)])
def test_coverage_is_what_is_claimed(n: int, level: float) -> None:
    """Of exchangeable residuals (n + 1 - 2 k) / (n + 1) fall inside, at least the level: within 5 standard errors of a
    binomial over 6000 seeds."""
    trials, exact = 6000, (n + 1 - 2 * tail_rank(n, level)) / (n + 1)
    assert exact >= level - 1e-12
    error = 5 * math.sqrt(exact * (1 - exact) / trials)
    assert share_inside(n, level, trials) == pytest.approx(exact, abs=error)


def test_it_takes_the_correction_for_few_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rank ceil(n (1 - a / 2)) in the place of ceil((n + 1) (1 - a / 2)) the same seeds fall short of what is
    claimed: 22 of 26 instead of 24 of 26."""
    trials, error = 6000, 5 * math.sqrt(0.9 * 0.1 / 6000)
    assert share_inside(25, 0.9, trials) > 0.9
    monkeypatch.setattr(
        "autotune.profiles_db.bands.conformal.tail_rank", lambda n, level: n + 1 - math.ceil(n * (1 + level) / 2)
    )
    assert share_inside(25, 0.9, trials) < 0.9 - error


def test_both_tails_are_as_likely() -> None:
    """Asymmetric: a bias moves the interval, and as much is left out on either side."""
    low, high, trials = 0, 0, 6000
    for seed in range(trials):
        chance = random.Random(seed)
        found = interval([skewed(chance) for _ in range(39)], 0.9)
        new = skewed(chance)
        assert found is not None
        low, high = low + (new < found[0]), high + (new > found[1])
    error = 5 * math.sqrt(0.05 * 0.95 / trials)
    assert low / trials == pytest.approx(0.05, abs=error) and high / trials == pytest.approx(0.05, abs=error)
    assert found[0] + found[1] > 0.05, "not symmetric about nothing"


@pytest.mark.parametrize(("level", "least"), [(0.9, 19), (0.95, 39), (0.8, 9), (0.5, 3), (0.6, 4)])
def test_too_few_make_none(level: float, least: int) -> None:
    assert enough(level) == least
    values = [float(n) for n in range(least)]
    assert interval(values, level) == (0.0, least - 1.0), "the extremes are the ends"
    assert interval(values[1:], level) is None


def test_known_ranks() -> None:
    """ceil((n + 1) (1 - a / 2)) of n from below, and the same from above."""
    values = [float(n) for n in range(1, 101)]
    assert interval(values[::-1], 0.9) == (5.0, 96.0)
    assert math.ceil(101 * 0.95) == 96
    assert interval([1.0] * 30, 0.9) == (1.0, 1.0)


def test_binomial_bounds_are_those_of_clopper_and_pearson() -> None:
    """Known answers (R's binom.test), and the closed form where all or none are inside."""
    assert binomial_bounds(7, 10) == pytest.approx((0.3475471, 0.9332605), abs=1e-6)
    assert binomial_bounds(138, 154)[0] < 138 / 154 < binomial_bounds(138, 154)[1]
    assert binomial_bounds(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0), abs=1e-9)
    assert binomial_bounds(0, 10) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)), abs=1e-9)
    with pytest.raises(ValueError, match="3 of 2"):
        binomial_bounds(3, 2)


# --- which residuals make it


def test_a_figure_s_own_class_comes_first_and_from_here() -> None:
    here, ships = residuals([0.01 * n for n in range(20)], origin=HERE), residuals([0.5] * 40)
    found = Bands([*ships, *here]).ratio(OURS)
    assert found is not None and found.residuals == 20 and found.high == pytest.approx(math.exp(0.19))
    assert not found.pooled and found.rests_on == "measured"
    both = Bands([*ships, *here[2:]]).ratio(OURS)
    assert both is not None and both.residuals == 58 and not both.pooled, "too few here: with those that ship"


def test_a_pool_widens_and_says_so() -> None:
    others = residuals([0.01 * n for n in range(20)], Kind(STEP, "measured", "cpu", "generate"))
    found = Bands([*residuals([0.0] * 5), *others]).ratio(OURS)
    assert found is not None and found.pooled and found.residuals == 25 and found.pool == "all workloads"


def test_no_pool_holds_a_surer_grade() -> None:
    """What measured prices are off by says nothing of a datasheet's."""
    sure = residuals([0.01] * 50)
    assert Bands(sure).ratio(replace(OURS, grade="datasheet")) is None
    assert Bands(sure).ratio(replace(OURS, quantity=PEAK, grade="counted")) is None, "times are no memory"
    weak = residuals([0.3] * 50, replace(OURS, grade="datasheet"))
    found = Bands(weak).ratio(OURS)
    assert found is not None and found.pooled and found.low == pytest.approx(math.exp(0.3))
    for pool in POOLS:
        for kind in (OURS, replace(OURS, grade="interpolated", device="cuda")):
            for grade in GRADES:
                if GRADES.index(grade) < GRADES.index(kind.grade):
                    assert not pool.takes(kind, Residual(replace(kind, grade=grade), 0.0, "x", HERE)), pool.words


def test_runs_of_one_plan_are_one_observation() -> None:
    many = [Residual(OURS, 0.1 * n, "same", origin) for n, origin in enumerate((SHIPPED, BEFORE, HERE, HERE))]
    assert [r.value for r in distinct(many)] == [pytest.approx(0.2)], "the newest of this cost model"
    assert Bands(many * 10).ratio(OURS) is None


def test_a_row_can_be_left_out() -> None:
    some = residuals([0.0] * 19 + [9.0])
    bands = Bands([replace(r, row=f"{r.row}\0{STEP}") for r in some])
    whole, but = bands.ratio(OURS), bands.ratio(OURS, "shipped 19")
    assert whole is not None and but is not None
    assert (whole.residuals, but.residuals) == (20, 19) and but.high == 1.0 < whole.high


def test_rates_are_times_turned_over() -> None:
    """A step that takes a tenth longer has a rate that is a tenth too high."""
    facts = {"grade": "measured", "device": "cuda", "workload": "train", "row": "r", "origin": HERE}
    time, rate = residual("step s", 1.0, 1.1, **facts), residual("MFU %", 1.1, 1.0, **facts)
    assert (
        time is not None
        and rate is not None
        and time.value == pytest.approx(rate.value) == pytest.approx(math.log(1.1))
    )
    assert residual("bubble rate", 1.0, 1.1, **facts) is None
    assert residual("step s", 1.0, 0.0, **facts) is None
    assert residual("step s", 1.0, 1.0, **facts | {"grade": "stated"}) is None


# --- judging


def judgements(n: int, **changes: Any) -> list[Judgement]:
    row = Judgement("t", "source", "setup", "", "step s", 1.0, 1.0, "measured", device="cpu", workload="train")
    chance = random.Random(3)
    rows = [replace(row, name=str(k), measured=math.exp(skewed(chance))) for k in range(n)]
    return [replace(each, **changes) for each in rows]


def test_no_row_is_judged_by_a_band_that_it_made() -> None:
    rows = judgements(400)
    found, (told,), without = covered(rows, [])
    judged = [row for row in found if row.interval]
    assert without == 0 and told.judged == len(judged) and told.residuals == 400 - len(judged)
    assert 150 < len(judged) < 250
    assert told.inside == sum(bool(row.inside) for row in judged)
    assert told.low < told.share < told.high and not told.short
    # Whatever the judged rows measure, their bands stay: nothing of them goes in.
    spoilt = [replace(row, measured=9.0) if row.interval else row for row in found]
    again, (worse,), _ = covered([replace(row, interval=None) for row in spoilt], [])
    assert [row.interval for row in again] == [row.interval for row in found]
    assert worse.inside == 0 and worse.short
    # The same plan measured before is of the same half, and makes no band for it either.
    known = [r for row in spoilt if (r := of_judgement(row, BEFORE))]
    assert [row.interval for row in covered(rows, known)[0]] == [row.interval for row in found]


def test_rows_that_were_fitted_to_neither_make_nor_judge() -> None:
    assert covered(judgements(100, fitted=True), []) == (tuple(judgements(100, fitted=True)), (), 0)
    rows, told, without = covered(judgements(20), [])
    assert not told and 5 < without < 15 and not any(row.interval for row in rows), "too few"


def test_the_split_is_not_that_of_rows_fitted_to() -> None:
    """Of the judged half of vtrain's rows, about a half makes bands: the hashes are not one another's."""
    judged = [of_table("vtrain", row) for row in list(TABLES["vtrain"].rows())[:160] if not row.fitted]
    makes = [makes_bands(r) for row in judged if (r := of_judgement(row, HERE))]
    assert len(makes) == len(judged) > 50 and 0.3 < sum(makes) / len(makes) < 0.7
    names = [str(n) for n in range(400)]
    agree = sum(for_fitting(n) == makes_bands(Residual(OURS, 0.0, n, HERE)) for n in names)
    assert 160 < agree < 240


# --- what ships


def test_what_ships_is_what_the_page_and_the_tables_say() -> None:
    """Made again by `python -m autotune.runners.residual_sets`: all printed rows, and replayed ones of quick tables."""
    sets = {(each["table"], each["source"]): each for each in json.loads(FILE.read_text())["sets"]}
    page = json.loads(json.dumps(list(printed(PAGE.read_text()))))
    assert len(page) == 13 and all(sets[each["table"], each["source"]] == each for each in page)
    for name in ("megatron", "megatron-clusters", "vocabulary"):
        (kept,) = (each for (table, _), each in sets.items() if table == name)
        ours = {(r.setup, r.name, r.metric): r for r in (of_table(name, row) for row in TABLES[name].rows())}
        assert len(ours) == len(kept["rows"])
        for setup, plan, metric, predicted, measured in kept["rows"]:
            row = ours[setup, plan, metric]
            assert measured == row.measured and predicted == float(f"{row.predicted:.6g}"), (
                name,
                plan,
                "make it again",
            )
            assert (kept["device"], kept["workload"], kept["grade"]) == (row.device, row.workload, row.rests_on)


def test_no_row_that_was_fitted_to_ships() -> None:
    fitted = {(row.setup, row.name) for row in TABLES["vtrain"].rows() if row.fitted}
    (kept,) = (each for each in json.loads(FILE.read_text())["sets"] if each["table"] == "vtrain")
    assert kept["grade"] == "calibrated" and len(kept["rows"]) == 348
    assert not fitted & {(setup, name) for setup, name, *_ in kept["rows"]}


def test_every_usual_figure_has_a_band_that_holds_most_of_its_class() -> None:
    """In the sample itself a band leaves out k at either end, or fewer where residuals tie."""
    bands, counts = Bands(shipped()), Counter(r.kind for r in shipped())
    for device in ("cpu", "cuda", "rocm"):
        for workload in ("train", "generate"):
            for quantity in (STEP, PREFILL, TOKEN):
                for grade in GRADES[1:]:
                    assert bands.ratio(Kind(quantity, grade, device, workload)), (quantity, grade, device, workload)
            assert bands.ratio(Kind(PEAK, "counted", device, workload))
    for kind, count in counts.items():
        band = bands.ratio(kind)
        if band and not band.pooled:
            assert band.residuals == count
            inside = sum(band.holds(math.exp(r.value)) for r in shipped() if r.kind == kind)
            assert inside >= count + 2 - 2 * tail_rank(count, 0.9) >= 0.9 * count


def test_tables_of_a_page_are_found() -> None:
    page = "# A\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n| z |\n|---|\n## B\n| w |\n"
    assert tables_under(page, "A") == [[["x", "y"], ["1", "2"]], [["z"]]]
    with pytest.raises(ValueError, match="0 sections 'C'"):
        tables_under(page, "C")


# --- in the plan database


def test_runs_and_validations_make_bands(tmp_path: Path) -> None:
    profile, said = machine(), prediction(Plan(), 1.0)
    said = replace(said, grades={"measured": 0.9, "datasheet": 0.1}, prefill_s=0.0, decode_s=0.0)
    with Store(tmp_path / "plans.db") as store:
        store.save_profile(profile)
        for number, step in enumerate((1.2, 1.3)):
            run = store.start_run(Plan(), DENSE, WORK, machine=profile.fingerprint, prediction=said)
            store.add_launch(run, [step, step, step])
            store.finish_run(run, status="finished" if number == 0 else "failed", peak_bytes=[110, 90])
        store.start_run(Plan(data=2), DENSE, WORK, machine=profile.fingerprint, prediction=said)
        row = Judgement("cpu", "here", "m", "p", "step s", 2.0, 1.0, "measured", device="cpu", workload="train")
        entry = store.begin_validation("q", suite="cpu", machine="", profile="", cost_model="another")
        rows = [row, replace(row, name="f", fitted=True), replace(row, name="old", device="")]
        store.finish_validation(entry.id, [each.to_dict() for each in rows], [])
        found = store.residuals()
    assert {(r.kind, r.origin) for r in found} == {
        (Kind(STEP, "measured", "cpu", "train"), BEFORE),
        (Kind(PEAK, "counted", "cpu", "train"), BEFORE),
    }
    assert sorted(r.value for r in found) == pytest.approx([math.log(0.5), math.log(110 / 100), math.log(1.2)])
    assert run_name(DENSE, WORK, Plan()) in {r.row.partition("\0")[0] for r in found}


# --- as people and programs read it


def test_a_band_as_text() -> None:
    band = Band(0.441, 0.489, 0.9, "interpolated", 45, "its class", pooled=False)
    assert within(0.458, band, seconds) == "458 ms (441 to 489 at 90 %, interpolated)"
    assert within(0.458, replace(band, pooled=True), seconds) == "458 ms (441 to 489 at 90 %, interpolated, pooled)"
    assert span(1.02, replace(band, low=0.98, high=1.1), seconds) == "980 ms to 1.10 s"
    assert short(3 << 30, replace(band, low=3 << 30, high=4 << 30), size) == "3.00 GiB (3.00 to 4.00)"
    assert within(0.458, None, seconds) == "458 ms"


def test_an_answer_says_its_bands_and_older_ones_are_read() -> None:
    bands = Bands(residuals([0.01 * n for n in range(-10, 10)], Kind(STEP, "measured", "cpu", "train")))
    said = replace(prediction(Plan(), 2.0), grades={"measured": 1.0})
    figures = json.loads(json.dumps(answer(bands.upon(said, machine(), "train"))))
    assert figures["rests_on"] == "measured"
    assert figures["interval"] == pytest.approx([2 * math.exp(-0.1), 2 * math.exp(0.09)])
    read = bands_of(figures)
    assert read["step_s"].holds(2.0) and not read["step_s"].holds(2.4)
    rate = said.tokens_per_s
    assert (read["tokens_per_s"].low, read["tokens_per_s"].high) == pytest.approx(
        (rate / math.exp(0.09), rate / math.exp(-0.1))
    )
    assert bands_of(answer(said)) == {}
    calibrated = bands.upon(said, replace(machine(), grade="calibrated"), "train")
    assert calibrated.bands == {}, "measured residuals are no band of a calibrated profile"
