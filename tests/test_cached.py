"""A search asked again: answered at once where nothing has changed, and what has changed is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.profiles_db import cost_model
from autotune.profiles_db.basis import Change, Versions
from autotune.profiles_db.profile_file import dump_profile, load_profile, shipped
from autotune.profiles_db.store import Store
from autotune.spec.lock import Launch
from autotune.spec.prediction import Bound, Found, Question, Space
from tests.recipes import RECIPE, Autotune
from tests.stored import DENSE, WORK, batch, machine, question

HERE = Versions("1.0", "c0", {"torch": "2.11", "nccl": "2.27", "executor": "e0"})


def found(asked: Question) -> Found:
    ranking = tuple(sorted(batch(3), key=lambda p: p.step_s))
    return Found(asked, ranking, Bound(1.0, 0.0), Space(9, 6, {"why": 3}), 6, 3, {ranking[0].plan.id: 1.5}, True)


def answered(store: Store, asked: Question, versions: Versions = HERE, recipe: str = "r") -> str:
    """A search of `asked` that came to its end."""
    name = store.start_search(asked, versions)
    store.remember_predictions(name, batch(3), cost_model=versions.cost_model)
    store.finish_search(name, found(asked), recipe=recipe, launches=(Launch((1.4, 1.5, 1.6), (10, 20)),))
    return name


def test_an_answer_comes_back_whole(store: Store) -> None:
    asked = question(measure_budget=2)
    assert store.before(asked, HERE, "r") == type(store.before(asked, HERE, "r"))(), "nothing is known yet"
    name = answered(store, asked)
    known = store.before(replace(asked, seconds=1.0, simulate_budget=3), HERE, "another name")
    assert known.answer and not known.changed
    assert known.answer.found == replace(found(asked), question=replace(asked, seconds=1.0, simulate_budget=3))
    assert (known.answer.search, known.answer.launches) == (name, (Launch((1.4, 1.5, 1.6), (10, 20)),))
    assert known.answer.searched == store.search(name).updated


CHANGED: dict[str, tuple[Callable[[Question], Question], Versions, set[str]]] = {
    "model": (lambda q: replace(q, model=replace(DENSE, layers=3)), HERE, {"model.layers"}),
    "another model": (lambda q: replace(q, model=replace(DENSE, name="big", layers=3)), HERE, {"model"}),
    "workload": (lambda q: replace(q, workload=replace(WORK, global_batch=16)), HERE, {"workload.global_batch"}),
    "devices": (lambda q: replace(q, devices=8), HERE, {"machine.devices"}),
    "objective": (lambda q: replace(q, minimize="peak_memory"), HERE, {"objective"}),
    "limit": (lambda q: replace(q, memory_fraction=0.5), HERE, {"objective.limits.memory_fraction"}),
    "space": (lambda q: replace(q, axes={"tensor": (1,)}), HERE, {"search.tensor", "search.schedule"}),
    "seed": (lambda q: replace(q, seed=1), HERE, {"search.seed"}),
    "measure": (lambda q: replace(q, measure_budget=4), HERE, {"search.budget.measure"}),
    "profile": (lambda q: replace(q, profile=machine(samples=())), HERE, {"profile"}),
    "profile's software": (
        lambda q: replace(q, profile=machine(software={"torch": "2.14"})),
        HERE,
        {"profile", "profile.software.torch"},
    ),
    "machine": (lambda q: replace(q, profile=machine("elsewhere")), HERE, {"machine"}),
    "cost model": (lambda q: q, replace(HERE, cost_model="c1"), {"cost model"}),
    "autotune": (lambda q: q, replace(HERE, autotune="1.1"), {"autotune"}),
    "torch": (lambda q: q, replace(HERE, libraries={**HERE.libraries, "torch": "2.13"}), {"software.torch"}),
    "no nccl": (
        lambda q: q,
        replace(HERE, libraries={"torch": "2.11", "executor": "e0"}),
        {"software.nccl"},
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_whatever_changed_is_named_and_the_answer_not_used(store: Store, case: str) -> None:
    asked = question(measure_budget=2)
    change, versions, names = CHANGED[case]
    answered(store, asked)
    known = store.before(change(asked), versions, "r")
    assert known.answer is None and {one.what for one in known.changed} == names
    assert all("\n" not in str(one) and one.was != one.now for one in known.changed)
    answered(store, change(asked), versions)
    assert store.before(change(asked), versions, "r").answer, "searched anew, it is an answer itself"


def test_old_and_new_are_said(store: Store) -> None:
    answered(store, question())
    asked = question(workload=replace(WORK, global_batch=16), axes={"tensor": (1, 2)})
    known = store.before(asked, replace(HERE, libraries={**HERE.libraries, "torch": "2.13"}), "r")
    assert list(map(str, known.changed)) == [
        "workload.global_batch was 8 and is 16",
        'search.schedule was ["1f1b"] and is everything valid',
        "software.torch was 2.11 and is 2.13",
    ]
    other = store.before(replace(asked, model=replace(DENSE, name="big")), HERE, "r").changed
    assert other[0] == Change("model", "tiny", "big"), "the recipe's name tells which search was its own"
    assert store.before(replace(asked, model=replace(DENSE, name="big")), HERE, "stranger").since == ""


def test_what_ended_early_is_no_answer(store: Store) -> None:
    asked = question(measure_budget=2)
    name = answered(store, asked)
    for ending in (None, replace(found(asked), finished=False), replace(found(asked), whole=False)):
        store.start_search(asked, HERE)
        store.finish_search(name, ending, recipe="r")
        known = store.before(asked, HERE, "r")
        assert known.answer is None and known.since and not known.changed
    answered(store, asked)
    assert store.before(asked, HERE, "r").answer
    store.start_search(asked, HERE)
    assert store.before(asked, HERE, "r").answer is None, "one that runs, or was killed"


def test_plans_measured_with_other_versions_are_run_again(store: Store) -> None:
    asked, plan = question(), batch(1)[0].plan
    store.remember_measured(answered(store, asked), plan, 7.0)
    narrower = store.start_search(replace(asked, axes={"tensor": (1,)}), HERE)
    assert store.measured_alike(narrower) == {plan.id: 7.0}
    newer = store.start_search(asked, replace(HERE, libraries={**HERE.libraries, "torch": "2.13"}))
    assert store.measured_alike(newer) == {}
    assert store.asked(asked) == newer and store.asked(replace(asked, seed=9)) is None


# --- the command

MODULES = (
    "import sys\nfrom autotune.cli.main import main\n"
    "try:\n    main({words!r})\nexcept SystemExit as end:\n    code = end.code\n"
    "print(' '.join([str(code), *sys.modules]), file=sys.stderr)"
)


def test_the_same_search_is_answered_at_once(autotune: Autotune, recipe: str) -> None:
    first = autotune("search", recipe)
    lock = Path("small.lock.json").read_bytes()
    Path("small.lock.json").unlink()
    again = autotune("search", recipe)
    assert again.stdout == first.stdout and Path("small.lock.json").read_bytes() == lock
    assert "from the plan database, searched on 20" in again.stderr
    assert "from the plan database" not in first.stderr
    code = MODULES.format(words=["search", recipe])
    seconds, loaded = [], set[str]()
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
        seconds.append(time.perf_counter() - began)
        assert done.stdout == first.stdout
        loaded = set(done.stderr.splitlines()[-1].split())
    assert "0" in loaded and loaded.isdisjoint({"torch", "optuna", "autotune.planners.search"})
    assert min(seconds) < 1.5, "0.6 s where nothing else runs"


def test_json_says_whether_it_was_searched_for(autotune: Autotune, recipe: str) -> None:
    first = autotune("search", recipe, "--json").json
    assert (first["cached"], first["searched"], first["changed"]) == (False, None, [])
    again = autotune("search", recipe, "--json").json
    assert again["cached"] is True and again["searched"] and again["changed"] == []
    told = ("cached", "searched", "changed")
    assert {k: v for k, v in again.items() if k not in told} == {k: v for k, v in first.items() if k not in told}
    fresh = autotune("search", recipe, "--fresh", "--json")
    assert fresh.json == first and "simulated" in fresh.stderr
    newer = autotune("search", recipe, "--json").json
    assert newer["searched"] > again["searched"], "the fresh answer is the one that is kept"


def test_a_changed_recipe_says_what_changed(autotune: Autotune, recipe: str) -> None:
    assert autotune("search", recipe).code == 0
    words = ("--set", "workload.global_batch=16", "--set", "search.tensor=[1, 2]", "--devices", "2", "--no-lock")
    said = autotune("search", recipe, *words)
    assert "searching: the plan database has a search of this recipe of 20" in said.stderr
    for line in (
        "  workload.global_batch was 8 and is 16",
        "  machine.devices was 4 and is 2",
        "  search.tensor was everything valid and is [1, 2]",
    ):
        assert f"{line}\n" in said.stderr
    assert autotune("search", recipe, "--json").json["cached"], "what was asked first is still known"
    Path(recipe).write_text(RECIPE.replace("hidden_size = 64", "hidden_size = 128"))
    changed = autotune("search", recipe, "--json").json
    assert changed["cached"] is False
    assert [one["what"] for one in changed["changed"]] == ["model"]


def test_another_profile_or_cost_model_is_searched_for(
    autotune: Autotune, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(shipped()["h100-sxm"])
    dump_profile(profile, Path("box.json"))
    Path(recipe).write_text(RECIPE.replace('"h100-sxm"', '"./box.json"'))
    assert autotune("search", recipe).code == 0
    dump_profile(replace(profile, software={**profile.software, "torch": "9.9"}), Path("box.json"))
    said = autotune("search", recipe)
    assert "  profile.software.torch was " in said.stderr and " and is 9.9\n" in said.stderr
    before = cost_model.cost_model_version()
    monkeypatch.setattr(cost_model, "cost_model_version", lambda: "another")
    assert f"  cost model was {before} and is another\n" in autotune("search", recipe).stderr


def test_a_recipe_under_another_name_shares_the_answer(autotune: Autotune, recipe: str) -> None:
    assert autotune("search", recipe).code == 0
    Path("copy.toml").write_text(RECIPE)
    assert autotune("search", "copy.toml", "--json").json["cached"]
    lock = json.loads(Path("copy.lock.json").read_text())
    assert lock["recipe"]["file"] == "copy.toml" and lock["recipe"]["merged"]["name"] == "copy"
    assert autotune("simulate", "copy.toml").code == 0
