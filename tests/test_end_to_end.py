"""The whole way with real processes: search, lock, run, look at it; interrupted, and joined from outside."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.profiles_db.profile_file import load_profile
from autotune.runners.checkpoint import open_checkpoint
from autotune.spec.families import load_model
from autotune.spec.graph import blocks
from autotune.spec.machine import Sample
from autotune.spec.work import Memory
from tests.commands import Home, Inside
from tests.processes import gone, started_by, wait_for
from tests.small import GENERATE, TRAIN

pytestmark = pytest.mark.alone


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.make(tmp_path / "home")


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the profile of a machine on which a search has measured what the training plans are made of."""
    home = Home.make(tmp_path_factory.mktemp("refined"))
    recipe = home.write("other.toml", TRAIN.replace("steps = 3", "steps = 3\nlearning_rate = 0.5"))
    said = home.run("search", recipe, "--measure", "1", "-v")
    assert said.code == 0 and "operations of the best plans with 2 workers" in said.stderr, said.stderr
    return home.folder / "plans.db"


def test_a_profile_file_is_not_measured_again(refined: Path, home: Home) -> None:
    shutil.copy(refined, home.folder / "plans.db")
    text = TRAIN.replace('use = "this"', 'use = "two.json"').replace("measure = 2", "measure = 1")
    recipe = home.write("file.toml", text)
    with home.store() as store:
        base = load_profile(home.folder / "two.json")
        before = store.refined(base)
        assert before.refines(base) and len(before.samples) > len(base.samples)
    for words in ((), ("--fresh",)):
        said = home.run("search", recipe, "-v", *words)
        assert said.code == 0, said.stderr
        assert "operations of the best plans" not in said.stderr
    with home.store() as store:
        assert store.refined(base) == before


def test_a_new_profile_of_the_same_machine_is_not_a_refinement(home: Home) -> None:
    base = load_profile(home.folder / "two.json")
    more = replace(base, samples=(*base.samples, Sample(Memory("add", 4096, "fp32"), 1e-6)))
    with home.store() as store:
        store.save_profile(more)
        store.save_profile(replace(more, coefficients={**base.coefficients, "launch_seconds": 1.0}))
        store.save_profile(replace(more, created="later"))
        assert store.refined(base) == more
        assert store.refined(replace(base, name="another")).samples == base.samples


@pytest.fixture
def experienced(home: Home, refined: Path) -> Home:
    """A home where nothing was run of this workload, but its operations are already measured."""
    shutil.copy(refined, home.folder / "plans.db")
    return home


# --- the whole way


def test_training_from_recipe_to_pictures(experienced: Home) -> None:
    home, recipe = experienced, experienced.write("small.toml", TRAIN)
    said = home.run("search", recipe, "--json")
    assert said.code == 0, said.stderr
    found, lock = said.json, json.loads((home.folder / "small.lock.json").read_text())
    assert found["lock"] == "small.lock.json" and lock["plan_id"] == found["plan_id"]
    assert found["evaluated"]["measured"] == 2 and lock["measured"]
    times = {row["plan_id"]: row["measured_s"] for row in found["ranking"] if row["measured_s"]}
    assert found["plan_id"] == min(times, key=lambda plan: times[plan]), "what was measured decides"

    again = home.run("search", recipe, "--json", "-v")
    assert again.code == 0 and "measuring" not in again.stderr
    assert {row["plan_id"]: row["measured_s"] for row in again.json["ranking"] if row["measured_s"]} == times
    assert not list(home.folder.glob("**/*.part"))

    ran = home.run("run", "small.lock.json", "--check", "--json")
    assert ran.code == 0, ran.stderr
    report = ran.json
    assert report["plan_id"] == found["plan_id"] and report["equal"] is True and report["max_difference"] < 1e-5
    assert len(report["measured"]["step_s_all"]) == 3 and len(report["measured"]["peak_bytes"]) == 2
    assert report["measured"]["losses"][0] == pytest.approx(5.55, abs=0.3), "the entropy of a byte, to begin with"
    with home.store() as store:
        (run,) = store.runs()
        assert (run.id, run.status, run.plan.id) == (report["run_id"], "finished", found["plan_id"])
        assert list(run.launches[0].steps) == report["measured"]["step_s_all"]
        assert run.prediction is not None and run.environment["software"]["torch"]
        timeline = store.timeline(run.id)
        assert timeline is not None and timeline.makespan > 0

    explained = home.run("explain", "small.lock.json", "--json").json
    assert {"time", "answer", "versus", "measured"} <= set(explained)
    for name in ("t.html", "t.json"):
        drawn = home.run("plot", "small.lock.json", "--out", name, "--json")
        assert drawn.code == 0 and drawn.json["timelines"] == ["predicted", "measured"], drawn.stderr
    assert (home.folder / "t.html").read_text().startswith("<!doctype html>")
    assert json.loads((home.folder / "t.json").read_text())["traceEvents"]

    home.write("small.toml", TRAIN.replace("hidden_size = 32", "hidden_size = 64"))
    stale = home.run("run", "small.lock.json")
    assert stale.code == 8 and "the model changed" in stale.stderr and "autotune search" in stale.stderr


def test_generation_from_recipe_to_pictures(home: Home) -> None:
    recipe = home.write("talk.toml", GENERATE)
    found = home.run("search", recipe, "--json")
    assert found.code == 0, found.stderr
    assert found.json["plan"]["tensor"] == 2 and found.json["evaluated"]["measured"] == 1
    ran = home.run("run", recipe, "--check", "--json", "--trace", "t.svg")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and [len(row) for row in ran.json["tokens"]] == [5, 5]
    assert ran.json["tokens"][0] == ran.json["tokens"][1], "one prompt stands for both sequences"
    measured = ran.json["measured"]
    assert measured["decode_s"] > 0 and measured["step_s"] >= measured["prefill_s"] > 0
    assert (home.folder / "t.svg").read_text().startswith("<svg")
    assert home.run("plot", ran.json["run_id"], "--out", "t.html").code == 0
    assert home.run("explain", recipe).code == 0


def test_a_world_that_torchrun_started(home: Home) -> None:
    recipe = home.write("r.toml", TRAIN)
    words = ("run", recipe, "--pin", "tensor=2", "--pin", "sequence_parallel=true", "--pin", "micro_batch=4")
    begin = ("--standalone", "--nproc-per-node=2", "-m", "autotune")
    said = home.run(*begin, *words, "--check", "--save", "out", "--json", module="torch.distributed.run")
    assert said.code == 0, said.stderr
    open_checkpoint(home.folder / "out").verify(w for b in blocks(load_model(home.folder / "out")) for w in b.weights())
    assert said.stdout.count('"schema"') == 1, "rank 0 answers for all"
    assert said.json["equal"] is True and len(said.json["measured"]["peak_bytes"]) == 2
    with home.store() as store:
        assert [run.status for run in store.runs()] == ["finished"]


# --- asked again


def test_a_measured_answer_is_given_again(refined: Path, inside: Inside) -> None:
    """With every launch of the lock and no worker started; --fresh runs the plans again."""
    shutil.copy(refined, inside.folder / "plans.db")
    home, recipe = inside, inside.write("small.toml", TRAIN)
    file, log = home.folder / "small.lock.json", home.store().place.files / "logs"
    first = home.run("search", recipe)
    assert first.code == 0, first.stderr
    lock, logs = file.read_bytes(), sorted(log.rglob("*"))
    assert json.loads(lock)["measured"][0]["step_s"] and logs
    again = home.run("search", recipe)
    assert again.stdout == first.stdout and "from the plan database" in again.stderr
    assert file.read_bytes() == lock and sorted(log.rglob("*")) == logs
    more = home.run("search", recipe, "--measure", "3", "--json", "-v")
    assert [one["what"] for one in more.json["changed"]] == ["search.budget.measure"]
    assert "2 plans are already measured" in more.stderr and more.json["evaluated"]["measured"] == 3
    with home.store() as store:
        (entry,) = [entry for entry in store.searches() if entry.measured == 3]
    fresh = home.run("search", recipe, "--fresh", "--json", "-v")
    assert fresh.json["cached"] is False and "already measured" not in fresh.stderr
    with home.store() as store:
        assert store.search(entry.digest).measured == 5


# --- interrupted


def test_ctrl_c_while_measuring_keeps_what_was_measured(experienced: Home) -> None:
    home, recipe = experienced, experienced.write("small.toml", TRAIN)
    process = home.start("search", recipe, "-v")
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if sum(text.startswith("measuring d") for text in said) == 2:
            break
    wait_for(lambda: [c for c in started_by(process.pid).values() if "autotune.runners.worker" in c])
    workers = list(started_by(process.pid))
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in rest, rest
    assert "interrupted: keeping what was measured" in rest
    wait_for(lambda: all(map(gone, workers)), 5)
    with home.store() as store:
        entry, _ = store.searches()
        first = store.measured(entry.digest)
    assert len(first) == 1 and json.loads((home.folder / "small.lock.json").read_text())["plan_id"] in first
    again = home.run("search", recipe, "--json", "-v")
    assert again.code == 0 and "1 plans are already measured" in again.stderr
    assert again.json["evaluated"]["measured"] == 2
    with home.store() as store:
        kept = store.measured(entry.digest)
    assert len(kept) == 2 and first.items() <= kept.items()
