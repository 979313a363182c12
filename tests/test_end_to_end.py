"""The whole way with real processes: search, lock, run, look at it; interrupted, killed and joined from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.planners.search import search
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.machine import Sample
from autotune.spec.recipe import load_recipe
from autotune.spec.work import Memory
from tests.commands import Home

MODEL = """
[model]
architectures = ["LlamaForCausalLM"]
vocab_size = 256
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
rms_norm_eps = 1e-5
max_position_embeddings = 256
"""
TRAIN = (
    MODEL
    + """
[machine]
use = "this"
devices = 2
[workload]
kind = "train"
sequence_length = 32
global_batch = 8
precision = "fp32"
steps = 3
[search]
schedule = "1f1b"
micro_batch = 4
tensor = 1
recompute = "none"
zero = 0
budget = { seconds = 30, measure = 2 }
"""
)
GENERATE = (
    MODEL
    + """
[machine]
use = "this"
devices = 2
[workload]
kind = "generate"
prompt = "def f("
prompt_length = 6
new_tokens = 5
batch = 2
precision = "fp32"
steps = 2
[search]
tensor = 2
attention = "sdpa"
budget = { seconds = 30, measure = 1 }
"""
)


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
    for _ in range(2):
        said = home.run("search", recipe, "-v")
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


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `condition` says once it is true of something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {seconds} s")


def started_by(process: int) -> dict[int, list[str]]:
    """Every process below `process`: id to command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, front = {}, {process}
    while front := {child for child, parent in parents.items() if parent in front}:
        for child in front:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            except OSError:
                continue
    return found


def gone(process: int) -> bool:
    """Whether it has ended; one that only waits to be collected has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


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
    assert again.code == 0 and "2 plans are already measured" in again.stderr
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


def test_a_lock_carries_what_data_ranks_share(experienced: Home) -> None:
    home = experienced
    shared = TRAIN.replace("zero = 0", "zero = 3\nchunks = 2\ngathered = 1").replace('"1f1b"', '"zeropp"')
    recipe = home.write("shared.toml", shared.replace("micro_batch = 4", "micro_batch = 1"))
    found = home.run("search", recipe, "--json")
    assert found.code == 0, found.stderr
    plan = found.json["plan"]
    assert (plan["zero"], plan["gathered"], plan["data"], plan["schedule"]) == (3, 1, 2, "zeropp")
    ran = home.run("run", "shared.lock.json", "--check", "--steps", "1", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["plan_id"] == found.json["plan_id"]


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


PINS = {
    "pp2": ("--pin", "pipeline=2", "--pin", "micro_batch=2"),
    "dp2-shared": (
        *("--pin", "data=2", "--pin", "zero=3", "--pin", "gathered=1", "--pin", "micro_batch=2"),
        *("--pin", "schedule=zeropp", "--pin", "chunks=2", "--pin", "group=1"),
    ),
    "dp2-zero": ("--pin", "data=2", "--pin", "zero=1", "--pin", "micro_batch=2"),
}


@pytest.mark.parametrize("pins", PINS.values(), ids=PINS)
def test_checked_runs(home: Home, pins: tuple[str, ...]) -> None:
    ran = home.run("run", home.write("r.toml", TRAIN), *pins, "--check", "--steps", "1", "--warmup", "0", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["equal"] is True and ran.json["max_difference"] < 1e-5


def test_a_world_that_torchrun_started(home: Home) -> None:
    recipe = home.write("r.toml", TRAIN)
    words = ("run", recipe, "--pin", "tensor=2", "--pin", "sequence_parallel=true", "--pin", "micro_batch=4")
    begin = ("--standalone", "--nproc-per-node=2", "-m", "autotune")
    said = home.run(*begin, *words, "--check", "--json", module="torch.distributed.run")
    assert said.code == 0, said.stderr
    assert said.stdout.count('"schema"') == 1, "rank 0 answers for all"
    assert said.json["equal"] is True and len(said.json["measured"]["peak_bytes"]) == 2
    with home.store() as store:
        assert [run.status for run in store.runs()] == ["finished"]


# --- interrupted and killed


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


def threads(process: int) -> int:
    return len(list(Path(f"/proc/{process}/task").iterdir()))


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
