"""Locks: what a search found survives the file, damage is refused, and every change since is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from autotune.planners.predict import predict
from autotune.profiles_db.profile_file import load_profile, shipped
from autotune.spec.errors import EnvironmentFault, UsageError
from autotune.spec.lock import Launch, Lock, load_lock, lock_of, lock_path, stale, why_lost, write_lock
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Bound, Found, Prediction, Space
from autotune.spec.recipe import Recipe, load_recipe

TEXT = """
[model]
architectures = ["LlamaForCausalLM"]
vocab_size = 256
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
rms_norm_eps = 1e-5
[machine]
use = "h200-sxm"
devices = 2
[workload]
kind = "train"
sequence_length = 64
global_batch = 4
"""
NOW = datetime(2026, 11, 22, 20, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(shipped()["h200-sxm"])


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "small.toml"
    path.write_text(TEXT)
    return load_recipe(path, environ={})


def search_of(recipe: Recipe, profile: Profile, measured: Mapping[str, float] | None = None) -> Found:
    """An answer with two plans, each really predicted."""
    question = recipe.question(profile)
    plans = (Plan(data=2), Plan(tensor=2))
    rows = [predict(question.model, question.workload, profile, plan, question.devices) for plan in plans]
    rows.sort(key=lambda row: row.step_s)
    bound = Bound(rows[0].step_s * 0.9, 0.1)
    return Found(question, tuple(rows), bound, Space(9, 5, {"too much": 4}), 5, 2, measured or {}, True)


@pytest.fixture
def locked(recipe: Recipe, profile: Profile) -> tuple[Path, Lock]:
    lock = lock_of(recipe, search_of(recipe, profile), NOW)
    lock = replace(lock, measured=(Launch((0.5, 0.6), (10, 11), "abc"),))
    path = lock_path(recipe.path)
    write_lock(path, lock)
    return path, lock


def test_round_trip(locked: tuple[Path, Lock]) -> None:
    path, lock = locked
    assert path.name == "small.lock.json"
    again = load_lock(path)
    assert again.to_dict() == json.loads(json.dumps(lock.to_dict()))
    assert again.plan == lock.plan and again.measured == lock.measured and again.devices == 2


def test_one_value_a_line_and_sorted(locked: tuple[Path, Lock]) -> None:
    text = locked[0].read_text()
    raw = json.loads(text)

    def leaves(value: Any) -> int:
        if isinstance(value, dict | list) and value:
            return sum(map(leaves, value.values() if isinstance(value, dict) else value))
        return 1

    lines = [line for line in text.splitlines() if line.strip().rstrip(",") not in "{}[]"]
    opening = [line for line in lines if line.endswith(("{", "["))]
    assert len(lines) - len(opening) == leaves(raw)
    assert list(raw) == sorted(raw)
    assert raw["generated_at"] == "2026-11-22T20:00:00+00:00"
    assert raw["schema"] == "autotune.lock/1"


def test_holds_no_path_of_this_machine(locked: tuple[Path, Lock]) -> None:
    assert str(locked[0].parent) not in locked[0].read_text()


def test_two_searches_write_one_text(recipe: Recipe, profile: Profile, tmp_path: Path) -> None:
    first, second = tmp_path / "a.lock.json", tmp_path / "b.lock.json"
    for path in (first, second):
        write_lock(path, lock_of(recipe, search_of(recipe, profile), NOW))
    assert first.read_bytes() == second.read_bytes()


def test_fresh_lock_is_not_stale(locked: tuple[Path, Lock], recipe: Recipe, profile: Profile) -> None:
    assert stale(load_lock(locked[0]), recipe, profile) == []


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("search.tensor=2", "search.tensor was 'absent' and is 2"),
        ("workload.global_batch=8", "workload.global_batch was 4 and is 8"),
        ("machine.devices=1", "machine.devices was 2 and is 1"),
        ("objective.limits.memory_fraction=0.5", "objective.limits.memory_fraction was 0.92 and is 0.5"),
        ("model.hidden_size=128", "the model changed"),
    ],
)
def test_stale_recipe(locked: tuple[Path, Lock], recipe: Recipe, profile: Profile, override: str, reason: str) -> None:
    (found,) = stale(load_lock(locked[0]), load_recipe(recipe.path, [override], {}), profile)
    assert reason in found


@pytest.mark.parametrize("override", ["name=x", "gate.launches=7", "search.budget.seconds=1", "workload.steps=99"])
def test_what_is_no_change(locked: tuple[Path, Lock], recipe: Recipe, profile: Profile, override: str) -> None:
    assert stale(load_lock(locked[0]), load_recipe(recipe.path, [override], {}), profile) == []


def test_a_key_of_a_newer_version_makes_no_lock_stale(
    locked: tuple[Path, Lock], recipe: Recipe, profile: Profile
) -> None:
    """The lock was written before `clip` existed: as it is now, without it; but not as it is with another value."""
    lock = load_lock(locked[0])
    workload = {key: value for key, value in lock.recipe["merged"]["workload"].items() if key != "clip"}
    older = replace(lock, recipe={"merged": {**lock.recipe["merged"], "workload": workload}, "digest": "0" * 64})
    assert stale(older, recipe, profile) == []
    (found,) = stale(older, load_recipe(recipe.path, ["workload.clip=1.0"], {}), profile)
    assert "workload.clip was 0.0 and is 1.0" in found


def test_stale_machine(locked: tuple[Path, Lock], recipe: Recipe, profile: Profile) -> None:
    lock = load_lock(locked[0])
    (reason,) = stale(lock, recipe, replace(profile, fingerprint="another", name="elsewhere"))
    assert "the machine changed: the lock is for h200-sxm, this is elsewhere" in reason
    (reason,) = stale(lock, recipe, replace(profile, software={**profile.software, "torch": "9.9"}))
    assert "torch" in reason and "9.9" in reason
    assert stale(lock, recipe, None) == []


def damaged(path: Path, edit: Any) -> str:
    """What load_lock says of the lock after `edit` of its content."""
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UsageError) as caught:
        load_lock(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_damage(locked: tuple[Path, Lock]) -> None:
    path, _ = locked
    good = path.read_text()

    def check(expected: str, edit: Any) -> None:
        path.write_text(good)
        assert expected in damaged(path, edit)

    check("of a newer autotune", lambda raw: raw.update(schema="autotune.lock/2"))
    check("schema: found None", lambda raw: raw.pop("schema"))
    check("schema: found 'other/1'", lambda raw: raw.update(schema="other/1"))
    check("bound: found nothing", lambda raw: raw.pop("bound"))
    check("space.structures: found 'many'", lambda raw: raw["space"].update(structures="many"))
    check("measured.0.step_s: found 'x'", lambda raw: raw["measured"][0].update(step_s="x"))
    check("measured.0.peak_bytes: found {}", lambda raw: raw["measured"][0].update(peak_bytes={}))
    check("runner_up: found 'x'", lambda raw: raw.update(runner_up="x"))
    check("runner_up.plan: found 3", lambda raw: raw["runner_up"].update(plan=3))
    check("evaluated.measured: found [1]", lambda raw: raw["evaluated"].update(measured=[1]))
    check("altered by hand", lambda raw: raw["plan"].update(tensor=raw["plan"]["tensor"] + 1))
    check("unknown axis", lambda raw: raw["plan"].update(tensr=2))
    check("found '1'; expected int", lambda raw: raw["plan"].update(data="1"))


def test_files_that_are_none(locked: tuple[Path, Lock]) -> None:
    path, _ = locked
    with pytest.raises(UsageError, match=r"nearest: small\.lock\.json"):
        load_lock(path.with_name("smal.lock.json"))
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot read the lock"):
            load_lock(path)


def test_written_whole_or_not_at_all(locked: tuple[Path, Lock]) -> None:
    path, lock = locked
    with pytest.raises(EnvironmentFault, match="cannot write the lock"):
        write_lock(Path("/proc/self/none.lock.json"), lock)
    blocked = path.with_name("blocked.lock.json")
    blocked.mkdir()
    with pytest.raises(EnvironmentFault, match="cannot write the lock"):
        write_lock(blocked, lock)
    assert sorted(p.name for p in path.parent.iterdir()) == ["blocked.lock.json", "small.lock.json", "small.toml"]


def test_why_the_runner_up_lost(recipe: Recipe, profile: Profile) -> None:
    found = search_of(recipe, profile)
    winner, second = found.ranking
    lock = lock_of(recipe, found, NOW)
    assert lock.runner_up is not None and lock.runner_up["plan_id"] == second.plan.id
    ratio = second.step_s / winner.step_s - 1
    assert lock.runner_up["reason"].startswith(f"predicted {ratio:.1%} slower")
    measured = {winner.plan.id: 1.0, second.plan.id: 1.25}
    assert why_lost(winner, second, measured) == "measured 25.0% slower"
    same: Prediction = replace(winner, plan=second.plan)
    assert "no slower" in why_lost(winner, same, {})
    slower = replace(winner, plan=second.plan, step_s=winner.step_s * 2, breakdown={"collective": 1.0})
    assert why_lost(winner, slower, {}).endswith("most of it collective (+1e+03 ms)")
