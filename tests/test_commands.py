"""What the commands do, each run in this process: recipes, plans, searches, runs, pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.profiles_db.profile_file import dump_profile, load_profile, shipped
from tests.recipes import RECIPE, ROOT, Autotune

pytestmark = pytest.mark.alone


def test_a_new_recipe_is_ready_to_search(autotune: Autotune) -> None:
    for kind in ("train", "generate"):
        assert autotune("recipe", "new", f"{kind}.toml", "--kind", kind).code == 0
        said = autotune("recipe", "check", f"{kind}.toml", "--json")
        assert said.json["schema"] == "autotune.recipe.check/1" and said.json["kind"] == kind
    config = ROOT / "recipes" / "models" / "meta-llama--Llama-3.2-1B.json"
    assert autotune("recipe", "new", "big.toml", "--config", str(config), "--machine", "h200-sxm").code == 0
    assert tomllib.loads(Path("big.toml").read_text())["machine"]["use"] == "h200-sxm"
    assert "16 layers" in autotune("recipe", "check", "big.toml").stdout


def test_a_recipe_shown_is_a_recipe(autotune: Autotune, recipe: str) -> None:
    said = autotune("recipe", "show", recipe, "--set", "search.tensor=[1, 2]")
    Path("again.toml").write_text(said.stdout)
    first = autotune("recipe", "show", recipe, "--set", "search.tensor=[1, 2]", "--json").json
    second = autotune("recipe", "show", "again.toml", "--json").json
    assert first["digest"] == second["digest"]


def test_schema_is_json(autotune: Autotune) -> None:
    assert json.loads(autotune("recipe", "schema").stdout)["$id"] == "autotune.recipe/1"


def test_simulate(autotune: Autotune, recipe: str) -> None:
    pins = ("--pin", "tensor=2", "--pin", "micro_batch=2")
    said = autotune("simulate", recipe, *pins, "--json")
    assert said.code == 0 and said.json["schema"] == "autotune.simulate/1"
    assert said.json["plan"]["data"] == 2, "data fills the four devices"
    assert set(said.json["predicted"]) >= {"step_s", "tokens_per_s", "peak_bytes"}
    text = autotune("simulate", recipe, *pins)
    assert said.json["plan_id"] in text.stdout and "memory at its peak" in text.stdout


def test_explain_and_plot(autotune: Autotune, recipe: str) -> None:
    pins = ("--pin", "pipeline=2", "--pin", "micro_batch=1")
    said = autotune("explain", recipe, *pins, "--json")
    assert said.code == 0 and said.json["schema"] == "autotune.explain/1" and "time" in said.json
    for form, begins in (("html", "<!doctype html>"), ("svg", "<"), ("json", "{")):
        assert autotune("plot", recipe, *pins, "--out", f"t.{form}").code == 0
        assert Path(f"t.{form}").read_text().startswith(begins)
    assert not list(Path().glob("*.part"))


def test_techniques(autotune: Autotune) -> None:
    rows = autotune("techniques", "--json").json["techniques"]
    assert [row["id"] for row in rows] == [f"S{n:03d}" for n in range(1, 171)]
    works = autotune("techniques", "--state", "works", "--json").json["techniques"]
    assert {"S051", "S078", "S098"} <= {row["id"] for row in works}
    assert all(row["where"] for row in works)
    one = autotune("techniques", "gpipe", "--json").json["techniques"]
    assert [row["id"] for row in one] == ["S078"]
    assert autotune("techniques", "s78").stdout == autotune("techniques", "GPipe").stdout


def test_doctor(autotune: Autotune) -> None:
    said = autotune("doctor", "--json")
    checks = {check["name"]: check for check in said.json["checks"]}
    assert set(checks) == {"python", "packages", "torch", "devices", "database", "profile", "machines", "corpus"}
    assert said.code == 0 and all(check["ok"] for check in checks.values()), checks
    assert "autotune profile" in checks["profile"]["hint"]


def test_search_locks_and_the_lock_is_used(autotune: Autotune, recipe: str) -> None:
    said = autotune("search", recipe, "--json")
    assert said.code == 0, said.stderr
    found = said.json
    assert found["schema"] == "autotune.search/1" and found["lock"] == "small.lock.json"
    assert set(found["predicted"]) >= {"step_s", "tokens_per_s", "peak_bytes"}
    assert set(found["bound"]) >= {"step_s", "gap"} and found["bound"]["step_s"] <= found["predicted"]["step_s"]
    space = found["space"]
    assert space["structures"] - space["feasible"] == sum(space["infeasible"].values())
    assert set(found["evaluated"]) == {"bounded", "simulated", "measured"} and found["evaluated"]["measured"] == 0
    assert found["ranking"][0]["plan_id"] == found["plan_id"]

    simulated = autotune("simulate", recipe, "--json").json
    assert simulated["plan_id"] == found["plan_id"]
    assert simulated["predicted"]["step_s"] == pytest.approx(found["predicted"]["step_s"])
    assert autotune("simulate", "small.lock.json", "--json").json == simulated
    assert autotune("simulate", found["plan_id"], "--json").json["predicted"] == simulated["predicted"]
    explained = autotune("explain", recipe, "--json").json
    assert {"answer", "versus", "space", "proof"} <= set(explained)
    other = found["ranking"][1]["plan_id"]
    assert autotune("explain", recipe, "--versus", other).code == 0
    differ = autotune("plans", "diff", found["plan_id"], other, "--json").json["differences"]
    assert differ and all(mine != theirs for mine, theirs in differ.values())
    listed = autotune("plans", "ls", "--json").json["plans"]
    assert listed and autotune("plans", "show", found["plan_id"], "--json").json["plan_id"] == found["plan_id"]


def test_a_list_of_plans_says_what_it_leaves_out(autotune: Autotune, recipe: str) -> None:
    assert autotune("search", recipe, "-q").code == 0
    every = len(autotune("plans", "ls", "--top", "0", "--limit", "9999", "--json").json["plans"])
    assert every > 21, "more than a list has by default, of one question"
    for words, listed, options in (
        ((), 5, f"--top 0 --limit {every}"),
        (("--limit", "3"), 3, f"--top 0 --limit {every}"),
        (("--top", "0"), 20, f"--limit {every}"),
        (("--top", "7", "--limit", "9999"), 7, "--top 0"),
    ):
        said = autotune("plans", "ls", *words)
        assert len(said.stdout.splitlines()) == 1 + listed
        assert f"{every - listed} more plans are stored: add {options}\n" in said.stderr
        told = autotune("plans", "ls", *words, "--json")
        assert len(told.json["plans"]) == listed and "stored" not in told.stderr
    assert "stored" not in autotune("plans", "ls", "--top", "0", "--limit", str(every)).stderr


def test_the_same_search_twice_writes_the_same_lock(autotune: Autotune, recipe: str) -> None:
    texts = []
    for words in ((), ("--fresh",)):
        assert autotune("search", recipe, *words).code == 0
        lock = json.loads(Path("small.lock.json").read_text())
        lock.pop("generated_at")
        texts.append(lock)
    assert texts[0] == texts[1]


def test_a_stale_lock_is_refused_and_says_what_changed(autotune: Autotune, recipe: str) -> None:
    assert autotune("search", recipe, "-q").code == 0
    before = Path("small.lock.json").read_bytes()
    stale = autotune("simulate", recipe, "--set", "workload.global_batch=16")
    assert stale.code == 8 and "workload.global_batch was 8 and is 16" in stale.stderr
    Path(recipe).write_text(RECIPE.replace("hidden_size = 64", "hidden_size = 128"))
    for name in (recipe, "small.lock.json"):
        said = autotune("run", name)
        assert said.code == 8 and "the model changed" in said.stderr
    assert Path("small.lock.json").read_bytes() == before
    Path(recipe).unlink()
    assert autotune("simulate", "small.lock.json").code == 0, "without its recipe a lock stands for itself"


def test_flags_of_search(autotune: Autotune, recipe: str) -> None:
    said = autotune("search", recipe, "--devices", "2", "--seconds", "5", "--measure", "0", "--no-lock", "--json")
    assert said.json["devices"] == 2 and said.json["lock"] is None
    assert not Path("small.lock.json").exists()
    assert said.json["plan"]["data"] * said.json["plan"]["tensor"] * said.json["plan"]["pipeline"] == 2


def test_no_plan_fits(autotune: Autotune, recipe: str) -> None:
    said = autotune("search", recipe, "--set", "search.tensor=3")
    assert said.code == 3 and said.stdout == "" and not Path("small.lock.json").exists()
    big = str(ROOT / "recipes" / "models" / "meta-llama--Llama-3.1-70B.json")
    Path("big.toml").write_text(f'model = {{ config = "{big}" }}\n' + RECIPE.split("rms_norm_eps = 1e-5")[1])
    said = autotune("search", "big.toml", "--devices", "1")
    assert said.code == 3 and "memory of a device" in said.stderr


def test_interrupting_a_search_keeps_the_database(autotune: Autotune, tmp_path: Path) -> None:
    path = ROOT / "recipes" / "llama-70b-64xh100.toml"
    words = [sys.executable, "-m", "autotune", "search", str(path), "--no-lock"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while process.poll() is None and not Path("db/plans.db").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in stderr, stderr
    assert autotune("db", "info", "--json").json["counts"]["searches"] == 1


def test_an_interrupt_reaches_no_process_that_was_forked(tmp_path: Path) -> None:
    """As at a terminal, where every process of the group gets it."""
    path = ROOT / "recipes" / "llama-70b-64xh100.toml"
    words = [sys.executable, "-m", "autotune", "search", str(path), "--no-lock"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text().split():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in stderr, stderr


@pytest.fixture
def here(tmp_path: Path) -> str:
    """A recipe for a processor with two workers, on prices that need not be this machine's."""
    priced = load_profile(shipped()["l40s"])
    device = replace(priced.device, name="two workers", kind="cpu", count=2)
    dump_profile(replace(priced, name="two-workers", fingerprint="two", device=device), tmp_path / "two.json")
    text = RECIPE.replace('use = "h100-sxm"\ndevices = 4', 'use = "./two.json"\ndevices = 2')
    (tmp_path / "here.toml").write_text(text.replace("[search]", 'precision = "fp32"\n[search]'))
    return "here.toml"


def test_run_measures_stores_and_compares(autotune: Autotune, here: str) -> None:
    pins = ("--pin", "tensor=2", "--pin", "micro_batch=4")
    assert "needs 2 workers" in autotune("run", here, *pins, "--nproc", "3").stderr
    said = autotune("run", here, *pins, "--steps", "2", "--warmup", "1", "--check", "--json", "--trace", "t.json")
    assert said.code == 0, said.stderr
    ran = said.json
    assert ran["schema"] == "autotune.run/1" and ran["equal"] is True and ran["max_difference"] < 1e-4
    measured, error = ran["measured"], ran["error"]
    assert len(measured["step_s_all"]) == 2 and len(measured["peak_bytes"]) == 2 and measured["losses"]
    assert error["step_s"] == pytest.approx(ran["predicted"]["step_s"] / measured["step_s"] - 1)
    assert json.loads(Path("t.json").read_text())["traceEvents"]

    shown = autotune("plans", "show", ran["plan_id"], "--json").json
    assert shown["plan"]["tensor"] == 2 and [run["run_id"] for run in shown["runs"]] == [ran["run_id"]]
    assert shown["runs"][0]["launches"] == measured["launches"]
    both = autotune("plot", here, *pins, "--out", "both.html", "--json").json
    assert both["timelines"] == ["predicted", "measured"]
    assert autotune("plot", ran["run_id"], "--json").json["timelines"] == ["measured"]
    assert "measured" in autotune("explain", here, *pins, "--json").json
    assert autotune("db", "export", "all.json").code == 0
    assert ran["run_id"] in Path("all.json").read_text()
    assert autotune("db", "info", "--json").json["counts"]["runs"] == 1


def test_a_worker_that_dies_takes_the_run_down(autotune: Autotune, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")  # a network interface that only a worker looks for
    words = ("run", here, "--pin", "data=2", "--steps", "1")
    start = time.monotonic()
    said = autotune(*words)
    assert time.monotonic() - start < 30
    assert said.code == 5 and "worker" in said.stderr and "nowhere0" in said.stderr
    (run,) = autotune("plans", "show", next(iter(plans_of(autotune))), "--json").json["runs"]
    assert run["status"] == "failed" and "nowhere0" in run["error"]


def plans_of(autotune: Autotune) -> list[str]:
    """Ids of every plan in the database."""
    autotune("db", "export", "plans.json")
    return [row["id"] for row in json.loads(Path("plans.json").read_text())["tables"]["plans"]]


def test_shipped_profiles_are_known_to_recipes(autotune: Autotune, recipe: str) -> None:
    for name, path in shipped().items():
        assert load_profile(path).name == name
        assert autotune("simulate", recipe, "--set", f"machine.use={name}", "--pin", "tensor=2", "-q").code == 0
