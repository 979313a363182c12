"""Gates as commands: real launches, real handicaps, another revision's own code; predicted gates; wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from autotune.cli._acceptance import conditions_of
from autotune.gate import calm, measured
from autotune.gate.baseline import MARK
from autotune.gate.calm import Reading, Watch
from autotune.gate.handicap import worker
from autotune.gate.measured import Asked, gate
from autotune.gate.revision import pins
from autotune.gate.subject import locked
from autotune.profiles_db.profile_file import dump_profile, load_profile, shipped
from autotune.runners.job import RunResult
from autotune.spec.digest import digest
from autotune.spec.lock import Launch, load_lock, write_lock
from autotune.spec.plan import Plan
from autotune.spec.recipe import load_recipe
from autotune.spec.workload import Acceptance
from tests.commands import Home, Said, two_workers
from tests.recipes import RECIPE, ROOT, Autotune
from tests.small import GENERATE, TRAIN
from tests.test_cli import modules_after

ONE = TRAIN.replace("devices = 2", "devices = 1").replace("steps = 3", "steps = 6")
TALK = GENERATE.replace("devices = 2", "devices = 1").replace("tensor = 2", "micro_batch = 2")
FEW = ("--launches", "3", "--retries", "0")
Edit = Callable[[dict[str, Any]], None]


def quiet() -> Watch:
    return Watch(lambda: Reading(1.0, 0.05))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.make(tmp_path / "home")


@pytest.fixture
def here(home: Home, autotune: Autotune, monkeypatch: pytest.MonkeyPatch) -> Autotune:
    """The command in this process and in the home's folder, on a machine that looks quiet."""
    monkeypatch.setenv("AUTOTUNE_DB", home.environment["AUTOTUNE_DB"])
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(calm, "read", lambda: Reading(1.0, 0.05))
    return autotune


def edited(file: Path, edit: Edit) -> None:
    """A lock with its content changed."""
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))


def baseline(file: Path, seconds: float = 0.01, peak: int = 1000, **more: Any) -> None:
    """Gives a lock three launches that nobody has measured."""
    lock = load_lock(file)
    launches = tuple(Launch((seconds * x,), (peak,) * lock.plan.world, **more) for x in (0.999, 1.0, 1.001))
    write_lock(file, replace(lock, measured=launches))


# --- with real launches


@pytest.mark.alone  # its launches are timed
def test_a_training_is_gated(home: Home, here: Autotune) -> None:
    """A baseline is measured; workers that compute and hold more regress against it, in time and in memory."""
    recipe, file = home.write("one.toml", ONE), home.folder / "one.lock.json"
    assert here("search", recipe, "--measure", "0").code == 0
    none = here("gate", recipe)
    assert none.code == 2 and "no baseline: one.lock.json has 0 measured launches" in none.stderr
    assert "autotune gate one.toml --update" in none.stderr
    said = here("gate", recipe, "--update", *FEW, "--json")
    assert said.code == 0, said.stderr
    (found,) = said.json["recipes"]
    assert found["verdict"] == "updated" and len(found["launches"]["new"]) == 3
    lock = load_lock(file)
    assert len(lock.measured) == 3 and lock.measured_at and all(len(one.losses) == 8 for one in lock.measured)
    assert lock.measured[0].losses == lock.measured[2].losses and len(lock.measured[0].step_s) == 6
    with home.store() as store:
        run = store.run(lock.measured[0].run_id)
        assert len(run.launches) == 3 and run.status == "finished" and run.peak_bytes
        short, heavy = ("workload.steps=4",), worker(1500, 1 << 20)
        slow = gate(
            recipe, Asked(launches=3, retries=0, threshold=0.5, overrides=short, worker=heavy, watch=quiet), store
        )
    assert (slow.verdict, slow.exit_code) == ("regressed", 7)
    assert slow.found is not None and slow.found.low > 1.5
    assert "slower than the baseline by more than 50.0%" in slow.message and "peak memory: rank 0" in slow.message
    states = {check.name: check.state for check in slow.checks}
    assert states == {"peak memory": "worse", "losses": "ok"}, "it computes the same"
    was, now = lock.measured[0].peak_bytes[0], slow.new[0].peak_bytes[0]
    assert now - was == 1 << 20, "what is held more, and nothing else"


@pytest.mark.alone  # its launches are timed
def test_a_generation_is_gated(home: Home, standing: None, here: Autotune) -> None:
    """Its answers are compared; where they are others, the one-process reference has the last word."""
    recipe, file = home.write("talk.toml", TALK), home.folder / "talk.lock.json"
    assert here("search", recipe, "--measure", "0").code == 0
    assert here("gate", recipe, "--update", *FEW).code == 0
    lock = load_lock(file)
    assert len({one.tokens for one in lock.measured}) == 1 and lock.measured[0].tokens and not lock.measured[0].losses
    write_lock(file, replace(lock, measured=tuple(replace(one, tokens="another") for one in lock.measured)))
    with home.store() as store:
        found = gate(recipe, Asked(launches=3, retries=0, threshold=50.0, watch=quiet), store)
    assert (found.verdict, found.exit_code) == ("pass", 0)
    states = {check.name: check.state for check in found.checks}
    assert states == {"peak memory": "ok", "answers": "ok"}
    assert "other tokens than the baseline's; within the reference's bound" in found.checks[-1].said


SLOWER = "        trainer.interpreter.step(trace)\n"


@pytest.mark.alone  # two sides, launch by launch
def test_a_revision_runs_its_own_code(home: Home, here: Autotune) -> None:
    """The revision's autotune sleeps in each step, and only its own does."""
    recipe = home.write("one.toml", ONE)
    assert here("search", recipe, "--measure", "0").code == 0
    shutil.copytree(ROOT / "autotune", home.folder / "autotune", ignore=shutil.ignore_patterns("__pycache__"))
    run = home.folder / "autotune" / "runners" / "train_run.py"
    text = run.read_text()
    assert text.count(SLOWER) == 1
    run.write_text(text.replace(SLOWER, f"        time.sleep(0.5)\n{SLOWER}"))
    repository(home.folder, "one.toml", "one.lock.json", "autotune")
    said = here(
        "gate", recipe, "--baseline", "git:slow", *FEW, "--threshold", "0.5", "--set", "workload.steps=2", "--json"
    )
    assert said.code == 0, said.stderr
    (found,) = said.json["recipes"]
    assert found["verdict"] == "improved" and min(found["launches"]["baseline"]) > 0.5 > max(found["launches"]["new"])
    assert {check["name"]: check["state"] for check in found["checks"]} == {"peak memory": "ok", "losses": "ok"}
    assert found["notes"] == [] and "git slow" in found["baseline"]
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert listed.count("\n") == 1, "what was checked out is gone"


def repository(folder: Path, *names: str) -> None:
    """A repository with these files, whose commit has the tag `slow`."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "-f", *names), (*identity, "commit", "-q", "-m", "m"), ("tag", "slow")):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


# --- predicted


@pytest.fixture
def planned(autotune: Autotune, recipe: str) -> Callable[..., Said]:
    """`gate small.toml --predicted` for a recipe with a lock, in an empty folder."""
    assert autotune("search", recipe).code == 0
    return lambda *words: autotune("gate", recipe, "--predicted", *words)


LOCK = Path("small.lock.json")


def test_predicted_as_locked_is_a_pass_wherever(planned: Callable[..., Said]) -> None:
    said = planned("--json")
    assert said.code == 0, said.stderr
    (found,) = said.json["recipes"]
    assert (found["verdict"], found["mode"]) == ("pass", "predicted")
    assert [check["state"] for check in found["checks"]] == ["ok", "ok", "ok"] and found["notes"] == []
    again = planned("--json").json["recipes"][0]
    assert {**again, "wall_s": 0} == {**found, "wall_s": 0}, "nothing is measured, and nothing is noise"


@pytest.mark.parametrize(
    ("edit", "code", "text"),
    [
        (lambda raw: raw["predicted"].update(step_s=raw["predicted"]["step_s"] * 0.9), 7, "predicted time: "),
        (lambda raw: raw["predicted"].update(peak_bytes=[1 << 10]), 7, "predicted memory: "),
        (lambda raw: raw["predicted"].update(step_s=raw["predicted"]["step_s"] * 1.1), 0, "improved"),
    ],
)  # fmt: skip
def test_another_prediction_than_the_locks(planned: Callable[..., Said], edit: Edit, code: int, text: str) -> None:
    edited(LOCK, edit)
    said = planned()
    assert said.code == code and text in said.stdout + said.stderr
    assert planned("--update").code == 0
    assert planned().code == 0 and "pass" in planned().stdout, "what was accepted is the lock's"


def test_a_better_plan_than_the_locked_one(planned: Callable[..., Said]) -> None:
    """A slower plan in the lock, as if it had won: the search finds the winner, unless that was measured and lost."""
    best, slower = load_lock(LOCK).plan, Plan(data=2, pipeline=2, micro_batch=2)

    def replaced(raw: dict[str, Any]) -> None:
        raw.update(plan=slower.to_dict(), plan_id=slower.id, plan_digest=slower.digest)

    edited(LOCK, replaced)
    assert planned("--update").code == 0
    edited(LOCK, lambda raw: raw["bound"].update(closed=False))
    found = planned("--threshold", "0.0001")
    assert found.code == 7 and "better plan: " in found.stderr and best.id in found.stderr, found.stdout
    assert planned("--threshold", "0.9").code == 0
    edited(LOCK, lambda raw: raw["evaluated"].update(measured={best.id: 2.0, raw["plan_id"]: 1.0}))
    assert best.id not in planned("--threshold", "0.0001").stderr, "measured, and slower"
    edited(LOCK, lambda raw: raw["evaluated"].update(measured={}))
    edited(LOCK, lambda raw: raw["bound"].update(closed=True))
    assert planned("--threshold", "0.0001").code == 0, "it was as much better when the lock was made"


def test_a_predicted_gate_needs_no_torch(planned: Callable[..., Said], tmp_path: Path) -> None:
    assert planned().code == 0
    code, modules = modules_after("gate", "small.toml", "--predicted", cwd=tmp_path)
    assert code == 0 and "torch" not in modules


def test_a_search_that_time_ends_says_so(planned: Callable[..., Said]) -> None:
    said = planned("--set", "search.budget.seconds=0.000001", "--json")
    assert said.code == 0, said.stderr
    states = {check["name"]: check["state"] for check in said.json["recipes"][0]["checks"]}
    assert states == {"predicted time": "ok", "predicted memory": "ok", "better plan": "unknown"}
    few = planned("--set", "search.budget.simulate=1")
    assert few.code == 0 and "the budget ended the search: a better plan may have been missed" in few.stdout


def test_a_profile_that_is_another_by_now(home: Home, here: Autotune) -> None:
    text = RECIPE.replace('"h100-sxm"', '"machine.json"')
    recipe = home.write("small.toml", text)
    profile = load_profile(shipped()["h100-sxm"])
    dump_profile(profile, home.folder / "machine.json")
    assert here("search", recipe).code == 0 and here("gate", recipe, "--predicted").code == 0
    dump_profile(
        replace(profile, coefficients={**profile.coefficients, "launch_seconds": 1e-3}), home.folder / "machine.json"
    )
    assert here("gate", recipe, "--predicted").code == 0, "the database still has what the lock rests on"
    other = here("gate", recipe, "--predicted", "--db", "empty.db")
    assert other.code == 8 and "the machine's profile changed: it rests on profile" in other.stderr
    edited(home.folder / "small.lock.json", lambda raw: raw["machine"].pop("profile"))
    older = here("gate", recipe, "--predicted", "--db", "empty.db")
    assert older.code == 7, "a lock of before there was a digest is compared with what is there"


def test_a_predicted_speculation_needs_its_acceptance(home: Home, here: Autotune) -> None:
    """Without it the plan would seem slower than the lock says, though no code has changed."""
    axes = 'micro_batch = 2\ndecoding = "ngram"\nspeculate = 2\nmatch = 1\nbranches = 1'
    recipe = home.write("talk.toml", TALK.replace("micro_batch = 2", axes))
    with home.store() as store:
        conditions = conditions_digest(recipe)
        store.save_acceptance(conditions, load_recipe(recipe).model(), Acceptance("ngram match=1", (0.5, 0.4)), {})
    assert here("search", recipe, "--measure", "0").code == 0
    assert here("gate", recipe, "--predicted").code == 0
    copy = Home.make(home.folder / "elsewhere")
    with copy.store() as store:
        store.save_profile(two_workers())
    other = here("gate", recipe, "--predicted", "--db", str(copy.folder / "plans.db"))
    assert other.code == 4 and "needs the acceptance of 'ngram match=1'" in other.stderr


def conditions_digest(recipe: str) -> str:
    """What names the conditions of a recipe's acceptances in the plan database."""
    found = load_recipe(recipe)
    return digest(conditions_of(found, found.workload_spec()))


# --- wrong input: a message and a code, and never a pass


@pytest.fixture
def held(home: Home, here: Autotune, monkeypatch: pytest.MonkeyPatch) -> Iterator[Autotune]:
    """A recipe whose lock has a baseline of 10 ms, and workers that need not start: they take 10 ms too."""
    home.write("r.toml", ONE)
    assert here("search", "r.toml", "--measure", "0").code == 0
    baseline(home.folder / "r.lock.json", losses=(5.0, 4.0))
    result = RunResult((0.01,), 1.0, (1000,), (5.0, 4.0))
    monkeypatch.setattr(measured, "launch", lambda job, **given: result)
    yield here


def test_a_gate_that_is_held(held: Autotune) -> None:
    said = held("gate", "r.toml", "--json")
    assert said.code == 0 and said.json["recipes"][0]["verdict"] == "pass", said.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--baseline", "lok"), 2, "--baseline: found 'lok'; expected lock, db, db:RUN or git:REF"),
        (("--baseline", "git:"), 2, "--baseline: found 'git:'"),
        (("--baseline", "lock:x"), 2, "--baseline: found 'lock:x'"),
        (("--threshold", "3"), 2, "--threshold: found 3; expected a fraction between 0 and 1"),
        (("--launches", "2"), 2, "--launches"),
        (("--predicted", "--launches", "5"), 2, "--launches: nothing is launched with --predicted"),
        (("--update", "--baseline", "git:main"), 2, "--update writes the lock's or the database's baseline"),
        (("--update", "--allow-other-machine"), 2, "a baseline is of the lock's own machine"),
        (("--baseline", "db"), 2, "no baseline: "),
        (("--baseline", "db:ffff"), 2, "no such run"),
        (("--baseline", "git:main"), 2, "not a git repository"),
        (("--set", "workload.global_batch=4"), 8, "workload.global_batch was 8 and is 4"),
        (("--set", "workload.global_bach=4"), 2, "nearest: global_batch"),
    ],
)
def test_flags_that_are_wrong(held: Autotune, words: tuple[str, ...], code: int, text: str) -> None:
    said = held("gate", "r.toml", *words)
    assert said.code == code and text in " ".join(said.stderr.split()), said.stderr
    assert said.stdout == "" and "Traceback" not in said.stderr


def test_a_recipe_that_no_longer_parses(held: Autotune, home: Home) -> None:
    for mode in ((), ("--predicted",)):
        home.write("r.toml", ONE.replace("global_batch", "global_bach"))
        said = held("gate", "r.toml", *mode)
        assert said.code == 2 and "nearest: global_batch" in said.stderr and said.stdout == ""
        home.write("r.toml", ONE[: len(ONE) // 2] + '"')
        assert held("gate", "r.toml", *mode).code == 2
        assert "no lock, and so no plan to gate" in held("gate", home.write("new.toml", ONE), *mode).stderr
        (home.folder / "r.lock.json").write_text("{")
        home.write("r.toml", ONE)
        assert held("gate", "r.toml", *mode).code == 2
        assert held("gate", "-", *mode).code == 2


def test_a_stale_lock(held: Autotune, home: Home) -> None:
    home.write("r.toml", ONE.replace("hidden_size = 32", "hidden_size = 64"))
    for mode in ((), ("--predicted",), ("--update",)):
        said = held("gate", "r.toml", *mode, "--junit", "j.xml", "--github")
        assert said.code == 8 and "the model changed" in said.stderr
        assert "::error file=r.toml,title=autotune gate%3A error::r.lock.json is stale%3A"[:60] in said.stdout
        assert ElementTree.parse("j.xml").getroot()[0].get("errors") == "1"


def test_software_that_changed(held: Autotune, home: Home) -> None:
    with home.store() as store:
        store.save_profile(replace(two_workers(), software={**two_workers().software, "driver": "9"}))
    said = held("gate", "r.toml")
    assert said.code == 8 and "the software changed" in said.stderr


def test_a_baseline_of_other_hardware(held: Autotune, home: Home) -> None:
    edited(home.folder / "r.lock.json", lambda raw: raw["machine"].update(fingerprint="another", name="elsewhere"))
    said = held("gate", "r.toml")
    assert said.code == 4 and "the baseline is of another machine: elsewhere (another); this is" in said.stderr
    assert held("gate", "r.toml", "--update").code == 4
    with home.store() as store:
        store.save_profile(replace(two_workers(), fingerprint="another"))
    edited(home.folder / "r.lock.json", lambda raw: raw["machine"].pop("profile"))
    shown = held("gate", "r.toml", "--allow-other-machine", "--json", "--junit", "j.xml")
    (found,) = shown.json["recipes"]
    assert shown.code == 0 and found["verdict"] == "reported" and "nothing is judged" in found["message"], shown.stderr
    assert ElementTree.parse("j.xml").getroot()[0].get("skipped") == "1"


def test_a_database_row_is_a_baseline(held: Autotune, home: Home) -> None:
    db = ("--baseline", "db")
    assert held("gate", "r.toml", "--update", *db).code == 0
    said = held("gate", "r.toml", *db, "--json")
    assert said.code == 0 and said.json["recipes"][0]["baseline"].startswith("run "), said.stderr
    found = locked("r.toml")
    work = found.recipe.workload_spec()

    def run(machine: str, plan: Plan = found.lock.plan, launches: int = 3, **facts: Any) -> str:
        with home.store() as store:
            name = store.start_run(plan, found.recipe.model(), work, machine=machine)
            for _ in range(launches):
                store.add_launch(name, [0.005])
            store.finish_run(name, peak_bytes=[1000], facts=facts)
        return name

    mine = two_workers().fingerprint
    for name, text in (
        (run(mine, replace(found.lock.plan, micro_batch=8)), "is of plan"),
        (run(mine, launches=2), "2 launches"),
    ):
        wrong = held("gate", "r.toml", "--baseline", f"db:{name}")
        assert wrong.code == 2 and text in wrong.stderr
    other = held("gate", "r.toml", "--baseline", f"db:{run('elsewhere')}")
    assert other.code == 4 and "ran on elsewhere" in other.stderr
    run(mine)
    assert held("gate", "r.toml", *db).code == 0, "runs that no gate made are not taken for baselines"
    slower = held("gate", "r.toml", "--baseline", f"db:{run(mine)}")
    assert slower.code == 7 and "slower than the baseline" in slower.stderr, "unless they are named"
    run("elsewhere", **{MARK: True})
    assert held("gate", "r.toml", *db).code == 0


def test_a_machine_under_load(held: Autotune, monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    before = (home.folder / "r.lock.json").read_bytes()
    for reading, text in (
        (Reading(0.4, 0.05), "under load"),
        (Reading(1.0, 0.05, "device 0 is throttled"), "throttled"),
    ):
        monkeypatch.setattr(calm, "read", lambda reading=reading: reading)
        for words in ((), ("--update",)):
            said = held("gate", "r.toml", *words, "--json")
            assert said.code == 9 and said.json["recipes"][0]["verdict"] == "inconclusive" and text in said.stderr
    assert (home.folder / "r.lock.json").read_bytes() == before, "such launches become no baseline"


@pytest.mark.parametrize(
    ("result", "code", "text"),
    [
        (RunResult((0.0102,), 1.0, (1000,), (5.0, 4.0)), 0, "pass"),
        (RunResult((0.0106,), 1.0, (1000,), (5.0, 4.0)), 7, "slower than the baseline by more than 3.0% (+6.0%"),
        (RunResult((0.009,), 1.0, (1000,), (5.0, 4.0)), 0, "improved"),
        (RunResult((0.01,), 1.0, (1031,), (5.0, 4.0)), 7, "peak memory: rank 0"),
        (RunResult((0.01,), 1.0, (1000,), (5.0, 4.1)), 6, "losses: step 1 differs"),
        (RunResult((0.02,), 1.0, (1000,), (5.0, float("nan"))), 6, "losses: step 1 differs"),
    ],
)
def test_what_is_found(
    held: Autotune, monkeypatch: pytest.MonkeyPatch, result: RunResult, code: int, text: str
) -> None:
    monkeypatch.setattr(measured, "launch", lambda job, **given: result)
    said = held("gate", "r.toml")
    assert said.code == code and text in said.stdout + said.stderr
    if code:
        assert said.stderr.count("error: ") == 1 and text in said.stderr


def test_answers_that_the_reference_does_not_give(held: Autotune, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write("talk.toml", TALK)
    assert held("search", "talk.toml", "--measure", "0").code == 0
    baseline(home.folder / "talk.lock.json", tokens="those")
    checked: list[bool] = []

    def launch(job: Any, **given: Any) -> RunResult:
        checked.append(job.check)
        return RunResult((0.01,), 1.0, (1000,), tokens=((1, 2),), equal=False, max_difference=0.5)

    monkeypatch.setattr(measured, "launch", launch)
    said = held("gate", "talk.toml", *FEW)
    assert (
        said.code == 6 and "answers: other tokens than the baseline's; not within the reference's bound" in said.stderr
    )
    assert checked == [False] * 3 + [True], "the reference is asked once, where answers differ"


def test_several_recipes_and_the_worst_code(held: Autotune, home: Home) -> None:
    for name, seconds in (("slow.toml", 0.005), ("fine.toml", 0.01)):
        home.write(name, ONE)
        shutil.copy("r.lock.json", name.replace(".toml", ".lock.json"))
        baseline(home.folder / name.replace(".toml", ".lock.json"), seconds)
    said = held("gate", "slow.toml", "missing.toml", "fine.toml", "--json", "--junit", "j.xml", "--github")
    assert said.code == 7 and said.json["exit_code"] == 7
    assert [one["verdict"] for one in said.json["recipes"]] == ["regressed", "error", "pass"]
    assert said.stderr.count("error: ") == 2 and said.stderr.count("::error file=") == 2
    suite = ElementTree.parse("j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert held("gate", "missing.toml", "fine.toml").code == 2


def test_a_failed_launch_is_no_pass_and_is_kept(held: Autotune, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from autotune.spec.errors import RunError

    def launch(job: Any, **given: Any) -> RunResult:
        raise RunError("worker 0 of 1 failed: out of memory")

    monkeypatch.setattr(measured, "launch", launch)
    said = held("gate", "r.toml")
    assert said.code == 5 and "out of memory" in said.stderr and said.stdout == ""
    with home.store() as store:
        assert store.runs(1)[0].status == "failed"


def test_revisions_that_are_none(held: Autotune, home: Home) -> None:
    repository(home.folder, "r.toml", "r.lock.json")
    wrong = held("gate", "r.toml", "--baseline", "git:slov")
    assert wrong.code == 2 and "found 'slov'; expected a commit, branch or tag (nearest: slow)" in wrong.stderr
    home.write("r.toml", ONE.replace("global_batch = 8", "global_batch = 16"))
    assert held("search", "r.toml", "--measure", "0").code == 0
    other = held("gate", "r.toml", "--baseline", "git:slow")
    assert other.code == 2 and "of another model or other work: there is nothing to compare" in other.stderr
    assert held("gate", "r.toml", "--baseline", "git:--help").code == 2
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert listed.count("\n") == 1


def test_a_plan_as_pins_is_that_plan() -> None:
    from autotune.cli._target import pinned

    for plan in (Plan(), Plan(data=4, zero=2), Plan(tensor=2, pipeline=2, schedule="interleaved-1f1b", chunks=2)):
        assert pinned(pins(plan), plan.world) == plan
    order = Plan(pipeline=2, schedule="given", order="0F0 0BW0\n1F0 1BW0\n")
    assert pinned(pins(order), 2) == order
