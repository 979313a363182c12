"""Searches, runs and workers that are killed: what was found stays, nobody is left behind, and the reason is told."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from autotune.planners.search import search
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.recipe import load_recipe
from tests.commands import Home
from tests.processes import gone, started_by, threads, wait_for
from tests.small import MODEL, TRAIN

pytestmark = pytest.mark.alone


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.make(tmp_path / "home")


MANY = (
    MODEL.replace("num_hidden_layers = 2", "num_hidden_layers = 16")
    + """
[machine]
use = "h100-sxm"
devices = 8
[workload]
kind = "train"
sequence_length = 1024
global_batch = 256
[objective]
minimize = "peak_memory"
[search]
schedule = ["gpipe", "1f1b", "interleaved-1f1b"]
vocabulary = "ends"
offload = 0
budget = { seconds = 60, measure = 0 }
"""
)


def test_kill_9_in_the_middle_of_a_search(home: Home) -> None:
    recipe = home.write("many.toml", MANY)
    process = home.start("search", recipe)
    database = home.folder / "plans.db"

    def kept() -> list[str]:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as file:
            return [row[0] for row in file.execute("SELECT substr(plan, 1, 10) FROM predictions ORDER BY rowid")]

    wait_for(lambda: len(kept()) >= 16)
    below = list(started_by(process.pid))
    process.kill()
    process.wait(10)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: all(map(gone, below)), 10)
    info = home.run("db", "info", "--json")
    assert info.code == 0 and info.json["counts"]["searches"] == 1, info.stderr
    assert not (home.folder / "many.lock.json").exists()
    with home.store() as store:
        assert [entry.state for entry in store.searches()] == ["running"]
        assert store.info(check=True).counts["predictions"] == len(kept())

    batches: list[list[str]] = []
    question = load_recipe(home.folder / recipe).question(load_profile(shipped()["h100-sxm"]))
    search(question, remember=lambda batch: batches.append([prediction.plan.id for prediction in batch]))
    whole = [set().union(*batches[: n + 1]) for n in range(len(batches))]
    assert len(kept()) < len(whole[-1]), "it was killed before the end"
    assert set(kept()) in whole, "batches are there whole or not at all"
    assert home.run("search", recipe, "-q").code == 0
    with home.store() as store:
        assert [entry.state for entry in store.searches()] == ["finished"]


def test_a_worker_that_is_killed_ends_the_run(home: Home) -> None:
    recipe = home.write("r.toml", TRAIN)
    words = ("--pin", "tensor=2", "--pin", "micro_batch=4", "--steps", "1000000")
    process = home.start("run", recipe, *words)

    def workers() -> dict[str, int]:
        """Rank to process, once both train."""
        found = {}
        for child, command in started_by(process.pid).items():
            if "autotune.runners.worker" in command and "torch.distributed.run" not in command:
                variables = Path(f"/proc/{child}/environ").read_text().split("\0")
                found.update({v[5:]: child for v in variables if v.startswith("RANK=")})
        return found if len(found) == 2 and all(threads(child) > 2 for child in found.values()) else {}

    both = wait_for(workers)
    time.sleep(1.0)
    begin = time.monotonic()
    os.kill(both["1"], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == 5, stderr
    assert "worker 1 of 2 was ended by signal 9" in stderr and "Traceback" not in stderr
    log = Path(stderr.split("the whole log is ")[1].split()[0])
    assert log.is_file() and log.is_relative_to(home.folder)
    assert all(map(gone, both.values()))
    with home.store() as store:
        (run,) = store.runs()
    assert run.status == "failed" and "worker 1" in str(run.error)


def test_a_worker_that_raises_ends_the_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")  # a network interface that only a worker looks for
    recipe = home.write("r.toml", TRAIN)
    begin = time.monotonic()
    said = home.run("run", recipe, "--pin", "pipeline=2", "--pin", "micro_batch=4")
    assert time.monotonic() - begin < 30
    assert said.code == 5 and "nowhere0" in said.stderr, said.stderr
    assert "of 2 failed" in said.stderr
    trace = Path(said.stderr.split("(traceback in ")[1].split(")")[0])
    assert trace.name in ("rank-0.error", "rank-1.error") and "Traceback" in trace.read_text()
    with home.store() as store:
        (run,) = store.runs()
    assert run.status == "failed" and "nowhere0" in str(run.error)


def test_a_killed_run_leaves_no_workers(home: Home) -> None:
    recipe = home.write("r.toml", TRAIN)
    process = home.start("run", recipe, "--pin", "tensor=2", "--pin", "micro_batch=4", "--steps", "1000000")
    wait_for(lambda: sum("autotune.runners.worker" in c for c in started_by(process.pid).values()) == 3)
    below = list(started_by(process.pid))
    process.kill()
    process.wait(10)
    wait_for(lambda: all(map(gone, below)), 30)
