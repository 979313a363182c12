"""The plan database: what goes in comes out, and ids resolve or say why not."""

from __future__ import annotations

import gzip
import json
import math
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autotune.profiles_db.migrate import VERSION
from autotune.profiles_db.store import Store
from autotune.spec.errors import EnvironmentFault, UsageError
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Space
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.timeline import Span, Timeline
from autotune.spec.workload import Workload
from tests.stored import DENSE, SPARSE, WORK, batch, machine, prediction, question

MOST_OF_JSON = 6.0  # times what making JSON of the same predictions takes


def test_profiles_come_back_by_name_fingerprint_and_digest_newest_first(store: Store) -> None:
    first = store.save_profile(machine())
    newer = machine(created="2026-02-02T00:00:00+00:00", samples=())
    second = store.save_profile(newer)
    assert first != second
    assert store.profile("box") == newer == store.profile("print-of-box")
    assert store.profile(first) == machine() == store.profile(first[:8])
    assert store.save_profile(machine()) == first
    assert store.profile("box") == machine(), "saving the same content again makes it the newest"
    listed = store.profiles()
    assert [entry.digest for entry in listed] == [first, second]
    assert (listed[0].name, listed[0].grade, listed[0].fingerprint) == ("box", "measured", "print-of-box")
    assert store.find_profile("elsewhere") is None
    with pytest.raises(UsageError, match=r"found 'bax'.*expected a name") as error:
        store.profile("bax")
    assert error.value.hint == "nearest: box"


def test_names_with_quotes_and_other_scripts(store: Store) -> None:
    name = 'l\'"ordinateur"; -- 机器 \N{BEAR FACE} %_'
    store.save_profile(machine(name, fingerprint="f'\"%"))
    assert store.profile(name).name == name
    assert store.profile("f'\"%").name == name
    assert store.find_profile("%") is None
    run = store.start_run(Plan(), SPARSE, WORK, machine="f'\"%", facts={"note": name})
    store.finish_run(run, status="failed", error="bad \udcff byte and \0 nul")
    assert store.run(run).model == SPARSE
    assert store.run(run).error == "bad ? byte and ? nul"
    entry = store.search(store.start_search(question(model=SPARSE)))
    assert entry.model == SPARSE.name
    assert store.info().counts["plans"] == 1


def test_a_search_resumes_by_its_question_not_its_budget(store: Store) -> None:
    search = store.start_search(question())
    store.remember_predictions(search, batch(5))
    assert store.start_search(question(seconds=1.0, simulate_budget=3, measure_budget=9)) == search
    assert store.known(search) == {p.plan.id: p.step_s for p in batch(5)}
    others = [
        question(model=replace(DENSE, layers=3)),
        question(workload=replace(WORK, global_batch=16)),
        question(profile=machine(samples=())),
        question(devices=8),
        question(axes={"tensor": (1,)}),
        question(minimize="peak_memory"),
        question(memory_fraction=0.5),
        question(seed=1),
    ]
    digests = [store.start_search(other) for other in others]
    assert len({search, *digests}) == 1 + len(others)
    assert store.known(digests[0]) == {}, "another model's predictions are not known"
    assert store.known(digests[3]) == {}, "nor are those for other devices"
    assert len(store.known(digests[4])) == 5, "a narrower question reuses what the wider one simulated"
    assert store.known(search, cost_model="changed") == {}, "another cost model knows nothing"


def test_predictions_round_trip_and_the_latest_wins(store: Store) -> None:
    search = store.start_search(question())
    store.remember_predictions(search, batch(3))
    assert store.predictions(search) == sorted(batch(3), key=lambda p: p.step_s)
    assert store.predictions(search, 1) == [batch(3)[2]]
    better = replace(batch(1)[0], step_s=0.25, peak_bytes=(7,), tokens_per_s=math.inf)
    store.remember_predictions(search, [better])
    assert store.known(search)[better.plan.id] == 0.25
    again = store.predictions(search, 1)[0]
    assert (again.peak_bytes, again.tokens_per_s) == ((7,), None), "what is not finite has no JSON form"
    assert store.info().counts["predictions"] == 3
    with pytest.raises(ValueError, match="step_s of plan"):
        store.remember_predictions(search, [*batch(1, 50), prediction(Plan(micro_batch=99), math.nan)])
    assert len(store.known(search)) == 3, "a bad batch leaves nothing behind"
    with pytest.raises(UsageError, match="no such search"):
        store.remember_predictions("0" * 64, batch(1))


def test_measured_trials_are_kept_each_and_answered_by_median(store: Store) -> None:
    search = store.start_search(question())
    plan = Plan(micro_batch=2)
    assert [store.remember_measured(search, plan, s) for s in (3.0, 1.0, 2.0)] == [1, 2, 3]
    store.remember_measured(search, Plan(), 5.0)
    assert store.measured(search) == {plan.id: 2.0, Plan().id: 5.0}
    entry = store.search(search[:9])
    assert (entry.digest, entry.measured, entry.predicted, entry.state) == (search, 4, 0, "running")
    with pytest.raises(ValueError, match="finite"):
        store.remember_measured(search, plan, math.inf)


def test_the_answer_of_a_search_is_kept(store: Store) -> None:
    asked = question()
    search = store.start_search(asked)
    ranking = tuple(sorted(batch(3), key=lambda p: p.step_s))
    space = Space(9, 6, {"heads do not divide": 3})
    found = Found(asked, ranking, Bound(1.0, 0.25), space, 6, 3, {ranking[0].plan.id: 1.5}, True)
    store.finish_search(search, found)
    entry = store.search(search)
    assert entry.state == "finished" and entry.result is not None
    assert entry.result["ranking"][0] == {"plan": ranking[0].plan.id, "step_s": ranking[0].step_s}
    assert entry.result["bound"] == {"step_s": 1.0, "gap": 0.25}
    assert entry.result["space"]["infeasible"] == {"heads do not divide": 3}
    store.finish_search(search, replace(found, finished=False))
    assert store.search(search).state == "interrupted"
    assert store.start_search(asked) == search and store.search(search).state == "running"
    assert store.search(search).result is not None, "resuming keeps the last answer until there is a new one"
    assert [e.digest for e in store.searches()] == [search]


def test_plans_resolve_by_prefix_or_say_what_is_near(store: Store) -> None:
    plans = [Plan(micro_batch=i) for i in range(1, 60)]
    for plan in plans:
        assert store.save_plan(plan) == plan.digest
    assert store.plan(plans[3].id) == plans[3] == store.plan(plans[3].digest.upper())
    first = next(p.digest for p in plans if sum(q.digest[0] == p.digest[0] for q in plans) > 1)[0]
    with pytest.raises(UsageError, match=r"found several plans.*expected one"):
        store.plan(first)
    wrong = plans[3].id[:9] + ("0" if plans[3].id[9] != "0" else "1")
    with pytest.raises(UsageError, match="found no such plan") as error:
        store.plan(wrong)
    assert error.value.hint == f"nearest: {plans[3].id}"
    for odd in ("", "%", "zz", "' OR 1=1"):
        with pytest.raises(UsageError, match="found no such plan"):
            store.plan(odd)


def test_an_empty_database_says_so(store: Store) -> None:
    for ask, what in ((store.plan, "plan"), (store.run, "run"), (store.search, "search")):
        with pytest.raises(UsageError) as error:
            ask("abc")
        assert error.value.hint == f"there is no {what} in it yet"
    assert (store.plans(), store.runs(), store.searches(), store.profiles()) == ([], [], [], [])


def test_listing_plans_by_question(store: Store) -> None:
    first = store.start_search(question())
    store.remember_predictions(first, batch(10))
    second = store.start_search(question(model=SPARSE, workload=Workload(kind="generate", prompt_length=8)))
    store.remember_predictions(second, batch(3))
    store.remember_measured(first, batch(10)[9].plan, 7.0)
    store.start_run(batch(10)[9].plan, DENSE, WORK, machine="here")
    listed = store.plans()
    assert [(e.model, e.workload) for e in listed] == [(SPARSE.name, "generate")] * 3 + [("tiny", "train")] * 5
    assert [e.predicted_s for e in listed[3:]] == sorted(p.step_s for p in batch(10))[:5]
    assert (listed[3].measured_s, listed[3].runs, listed[3].peak_bytes) == (7.0, 1, (100, 90))
    assert (listed[0].measured_s, listed[0].runs) == (None, 0)
    assert len(store.plans(top=0)) == 13 and len(store.plans(2)) == 2
    assert len(store.plans(top=0, model="tiny")) == 10 == len(store.plans(top=0, kind="train"))
    assert len(store.plans(top=0, search=second[:12])) == 3
    assert (store.count_plans(), store.count_plans(top=5), store.count_plans(top=2, model="tiny")) == (13, 8, 2)
    assert store.count_plans(measured=True) == 1
    assert {e.plan for e in store.plans(measured=True)} == {batch(10)[9].plan}
    here = store.origin(batch(10)[9].plan.id)
    assert (here.model, here.workload, here.devices) == (DENSE, WORK, 4)
    assert here.profile and store.profile(here.profile) == machine()


def test_runs_with_launches_and_steps(store: Store) -> None:
    recipe = store.save_recipe("recipes/quick ' start.toml", {"version": 1, "model": {"config": "x"}})
    said = prediction(Plan(tensor=2), 1.5)
    run = store.start_run(
        Plan(tensor=2),
        SPARSE,
        WORK,
        machine="here",
        facts={"cpu": "x"},
        recipe=recipe,
        git_sha="abc",
        environment={"torch": "2.13", "threads": 1},
        prediction=said,
    )
    assert re.fullmatch("[0-9a-f]{10}", run)
    assert store.run(run).status == "running" and store.run(run).step_s is None
    assert store.add_launch(run, [3.0, 1.0, 2.0], log_dir="logs/0") == 0
    assert store.add_launch(run, [4.0, 6.0]) == 1
    store.finish_run(
        run,
        losses=[2.5, math.nan, math.inf],
        peak_bytes=[1 << 40, 3],
        mfu=0.5,
        tokens_per_s=100.0,
        equal=True,
        max_difference=math.nan,
        facts={"texts": ["héllo"]},
    )
    entry = store.run(run[:6])
    assert [launch.steps for launch in entry.launches] == [(3.0, 1.0, 2.0), (4.0, 6.0)]
    assert entry.launches[0].log_dir == "logs/0"
    assert entry.step_s == 3.5, "the median over launches of the median step"
    assert (entry.plan, entry.model, entry.workload, entry.prediction) == (Plan(tensor=2), SPARSE, WORK, said)
    assert (entry.machine, entry.recipe, entry.git_sha) == ("here", recipe, "abc")
    assert entry.environment == {"torch": "2.13", "threads": 1}
    assert entry.losses == (2.5, None, None) and entry.peak_bytes == (1 << 40, 3)
    assert (entry.mfu, entry.tokens_per_s, entry.equal, entry.max_difference) == (0.5, 100.0, True, math.inf)
    assert entry.facts == {"texts": ["héllo"]} and entry.timeline is None and entry.finished is not None
    other = store.start_run(Plan(), DENSE, WORK, machine="here")
    assert [e.id for e in store.runs()] == [other, run] and len(store.runs(1)) == 1
    assert [e.id for e in store.runs(plan=Plan(tensor=2).id)] == [run]
    with pytest.raises(UsageError, match="no such run"):
        store.add_launch("nothing", [1.0])
    with pytest.raises(ValueError, match="status"):
        store.finish_run(run, status="well")


def test_a_timeline_is_kept_beside_the_database_and_verified(store: Store) -> None:
    forward = Instruction("F", 0, 1, writes=("a",))
    send = Instruction("send", 0, 1, lane="link", reads=("a",), frees=("a",), meet="m", peers=(0, 1), lag=1)
    program = Program(
        ((forward, send), (send,)), ({"a": Buffer(8)}, {"a": Buffer(8, "host", True)}), facts={"schedule": "1f1b"}
    )
    spans = (Span(0, 0, 0.0, 1.0), Span(0, 1, 1.0, 1.5), Span(1, 0, 1.0, 1.5))
    timeline = Timeline("measured", program, spans, ({"device": (8, 8)}, {"device": (0,)}), (8, 0), {"steps": 3})
    run = store.start_run(Plan(), DENSE, WORK, machine="here")
    assert store.timeline(run) is None
    store.finish_run(run, timeline=timeline)
    back = store.timeline(run)
    assert back is not None
    assert (back.program, back.spans, back.sent, back.facts) == (program, spans, (8, 0), {"steps": 3})
    assert (back.makespan, back.peaks, back.kind) == (timeline.makespan, timeline.peaks, "measured")
    (file,) = store.place.files.rglob("*.json.gz")
    info = store.info()
    assert (info.files, info.files_size, info.counts["artefacts"]) == (1, file.stat().st_size, 1)
    file.write_bytes(gzip.compress(b'{"schema": "autotune.timeline/1"}'))
    with pytest.raises(EnvironmentFault, match="its digest is not its name"):
        store.timeline(run)
    file.write_bytes(b"not gzip")
    with pytest.raises(EnvironmentFault, match="damaged"):
        store.timeline(run)
    file.unlink()
    with pytest.raises(EnvironmentFault, match="missing"):
        store.timeline(run)


def test_info_names_place_version_sizes_and_journal(store: Store) -> None:
    store.save_plan(Plan())
    info = store.info(check=True)
    assert info.path == str(store.place.path) == info.shown
    assert info.version == info.supported == VERSION
    assert (info.dialect, info.journal_mode, info.notices) == ("sqlite", "wal", ())
    assert info.counts["plans"] == 1 and info.counts["runs"] == 0 and info.size > 0


def filled(store: Store) -> str:
    search = store.start_search(question())
    store.remember_predictions(search, batch(20))
    store.remember_measured(search, Plan(micro_batch=3), 1.25)
    run = store.start_run(Plan(micro_batch=3), SPARSE, WORK, machine="here")
    store.add_launch(run, [1.0, 2.0])
    store.finish_run(run, timeline=Timeline("measured", Program(((),), ({},)), (), ({},), (0,)))
    return search


def test_export_json_and_csv_hold_every_row(store: Store, tmp_path: Path) -> None:
    filled(store)
    counts = dict(store.info().counts)
    whole = json.loads(store.export("json", tmp_path / "all.json").read_text("utf-8"))
    assert whole["schema"] == "autotune.export/1"
    assert {name: len(rows) for name, rows in whole["tables"].items()} == counts
    assert whole["tables"]["models"][1]["spec"]["name"] in (DENSE.name, SPARSE.name)
    folder = store.export("csv", tmp_path / "tables")
    lines = {file.stem: file.read_text("utf-8").count("\n") - 1 for file in folder.glob("*.csv")}
    assert lines == counts
    with pytest.raises(UsageError, match="exists already"):
        store.export("json", tmp_path / "all.json")
    with pytest.raises(UsageError, match="found 'cvs'") as error:
        store.export("cvs", tmp_path / "x")
    assert error.value.hint == "nearest: csv"
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        store.export("json", tmp_path / "absent" / "x.json")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_export_sqlite_is_a_plan_database(store: Store, tmp_path: Path) -> None:
    search = filled(store)
    copy = store.export("sqlite", tmp_path / "copy of plans.db")
    with Store(copy, create=False) as other:
        assert other.info().counts == store.info().counts
        assert other.known(search) == store.known(search)
        assert other.runs()[0] == store.runs()[0]
        assert other.timeline(other.runs()[0].id) is not None


def test_export_optuna_opens_in_optuna(store: Store, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    search = filled(store)
    names = store.export_optuna(tmp_path / "optuna.db", best=8)
    assert names == [f"tiny {search[:10]} predicted", f"tiny {search[:10]} measured"]
    address = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.load_study(study_name=names[0], storage=address)
    assert len(study.trials) == 8 and study.best_value == min(p.step_s for p in batch(20))
    assert study.best_params == {"micro_batch": 20}
    assert study.best_trial.user_attrs["plan"] == Plan(micro_batch=20).id
    assert optuna.load_study(study_name=names[1], storage=address).best_value == 1.25
    with pytest.raises(UsageError, match="exists already"):
        store.export_optuna(tmp_path / "optuna.db")


@pytest.mark.alone
def test_ten_thousand_predictions_take_a_few_times_what_their_json_takes(store: Store) -> None:
    """About 2 s on an idle core; hosts differ by more than that, so the yardstick is slowed down as much."""
    search = store.start_search(question())
    many = batch(10_000)
    start = time.perf_counter()
    for each in many:
        json.dumps(asdict(each))
    written = time.perf_counter()
    for i in range(0, len(many), 500):
        store.remember_predictions(search, many[i : i + 500])
    yardstick, seconds = written - start, time.perf_counter() - written
    assert len(store.known(search)) == 10_000
    assert seconds < MOST_OF_JSON * yardstick, f"{seconds:.1f} s, as JSON {yardstick:.1f} s"


def test_an_unfinished_validation_is_gone_on_with(store: Store) -> None:
    asked = {"suite": "cpu", "machine": "print", "profile": "box", "cost_model": "abc"}
    first = store.begin_validation("question", **asked)
    assert (first.state, first.visits, first.rows) == ("running", (), ())
    store.keep_validation(first.id, [{"plan": "a", "steps": [1.0]}])
    again = store.begin_validation("question", **asked)
    assert again.id == first.id and again.visits == ({"plan": "a", "steps": [1.0]},)
    assert store.begin_validation("another", **asked).id != first.id
    store.finish_validation(first.id, [{"name": "a", "predicted": 1.0}], [{"metric": "step s", "mean": 0.5}])
    done = next(entry for entry in store.validations() if entry.id == first.id)
    assert done.state == "finished" and done.rows[0]["name"] == "a" and done.summary[0]["mean"] == 0.5
    assert store.begin_validation("question", **asked).id != first.id, "a whole one is begun anew"
    with pytest.raises(UsageError, match="expected one stored"):
        store.keep_validation("nothing", [])
