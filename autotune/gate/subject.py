"""What is gated: one recipe with its lock on the machine at hand, and the job that runs its locked plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.planners.schedules import SCHEDULES
from autotune.profiles_db.facts import Facts, machine_facts
from autotune.profiles_db.profile_file import profile_digest, resolve
from autotune.runners.inputs import check_inputs
from autotune.runners.job import Job, job_of
from autotune.spec.errors import EnvironmentFault, StaleLock, UsageError
from autotune.spec.lock import Lock, load_lock, lock_path, stale
from autotune.spec.machine import Profile
from autotune.spec.recipe import STDIN, Recipe, load_recipe

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store

THIS = "this"  # of [machine] use
WARMUP = 2  # steps before the timed ones, as of `autotune run`


@dataclass(frozen=True)
class Locked:
    """A recipe and the lock beside it, which answers it."""

    recipe: Recipe
    lock: Lock
    file: Path

    @property
    def settings(self) -> dict[str, float]:
        """`[gate]` of the recipe."""
        settings: dict[str, float] = self.recipe.merged()["gate"]
        return settings


@dataclass(frozen=True)
class Subject:
    """A locked plan that can run here."""

    locked: Locked
    facts: Facts
    job: Job
    profile: Profile | None  # the newest of the locked machine; None where nothing is stored of it


def locked(path: str, overrides: Sequence[str] = ()) -> Locked:
    """The recipe at `path` with its lock.

    Raises UsageError for a recipe that no longer parses and for one without a lock, StaleLock where the lock is of
    another recipe or model. The machine is not looked at.
    """
    if path == STDIN:
        raise UsageError("a recipe on standard input has no lock", hint="name the recipe's file")
    recipe = load_recipe(path, overrides, names={"schedule": tuple(SCHEDULES)})
    file = lock_path(path)
    if not file.exists():
        raise UsageError(f"{path} has no lock, and so no plan to gate", hint=f"find one with `autotune search {path}`")
    lock = load_lock(file)
    if reasons := stale(lock, recipe, None):
        raise _stale(file, path, reasons)
    return Locked(recipe, lock, file)


def _stale(file: Path, path: str, reasons: Sequence[str]) -> StaleLock:
    hint = f"search again with `autotune search {path}`, or restore what changed"
    return StaleLock(f"{file} is stale:\n  " + "\n  ".join(reasons), hint=hint)


def profile_of(found: Locked, store: Store) -> Profile:
    """The profile that the lock's prediction rests on: by the digest that the lock has of it, from the plan database
    or as `[machine] use` names it. A lock of before there was a digest: as the recipe names it now.

    Raises EnvironmentFault where there is none of the locked machine, StaleLock where it is another one by now.
    """
    recipe, machine = found.recipe, found.lock.machine
    wanted, newest = str(machine.get("profile", "")), newest_profile(found, store)
    if not wanted and newest:
        return newest
    candidates = [p for p in (store.find_profile(wanted) if wanted else None, _named(found, store), newest) if p]
    for profile in candidates:
        if profile_digest(profile) == wanted:
            return profile
    if not candidates:
        raise EnvironmentFault(
            f"{found.file}: the profile of {machine['name']} ({machine['fingerprint']}) is not in {store.place.shown}",
            hint='bring it as a file ([machine] use = "FILE"; `autotune profile --out FILE` writes one)',
        )
    said = f"it rests on profile {wanted[:10]} of {machine['name']}, and there is {profile_digest(candidates[-1])[:10]}"
    raise _stale(found.file, recipe.path, [f"the machine's profile changed: {said} here"])


def _named(found: Locked, store: Store) -> Profile | None:
    """What `[machine] use` names now; of "this" the newest profile of the locked machine."""
    recipe = found.recipe
    if recipe.use == THIS:
        return store.find_profile(str(found.lock.machine["fingerprint"]))
    return resolve(recipe.use, recipe.folder, store.find_profile, recipe.path)


def newest_profile(found: Locked, store: Store) -> Profile | None:
    """The same with what was measured for it since; None where nothing is stored of the machine."""
    named = _named(found, store)
    return store.refined(named) if named else None


def subject(found: Locked, store: Store, other_machine: bool = False) -> Subject:
    """The locked plan as a job for this machine. Raises EnvironmentFault on another machine than the lock's, unless
    `other_machine`, and StaleLock where the profile's software is another."""
    facts, lock, recipe = machine_facts(), found.lock, found.recipe
    device = "cpu" if facts.kind == "cpu" else "cuda"
    if facts.fingerprint != lock.machine["fingerprint"] and not other_machine:
        raise EnvironmentFault(
            f"{found.file}: the baseline is of another machine: {lock.machine['name']} "
            f"({lock.machine['fingerprint']}); this is {facts.name} ({facts.fingerprint})",
            hint="gate it there, search for this machine, or look at the figures with --allow-other-machine",
        )
    profile = newest_profile(found, store)
    if profile and not other_machine and (reasons := stale(lock, recipe, profile)):
        raise _stale(found.file, recipe.path, reasons)
    if device == "cuda" and lock.plan.world > facts.count:
        raise EnvironmentFault(
            f"plan {lock.plan.id} needs {lock.plan.world} devices, and this machine has {facts.count}",
            hint=f"search again with `autotune search {recipe.path} --devices {facts.count}`",
        )
    model, workload = recipe.model(), recipe.workload_spec()
    check_inputs(
        recipe.path,
        model,
        workload,
        recipe.checkpoint,
        recipe.prompts,
        runs=True,
        draft_checkpoint=recipe.draft_checkpoint,
        target_checkpoint=recipe.target_checkpoint,
    )
    job = job_of(recipe, lock.plan, model, workload, device)
    return Subject(found, facts, replace(job, steps=recipe.steps, warmup=WARMUP, trace=False), profile)


def drifted(found: Subject) -> list[str]:
    """What of this machine's software is another than the lock's, in words: worth a note, as a driver's update is."""
    before, now = found.locked.lock.machine["software"], found.facts.software
    same = ("autotune", "system")
    return [
        f"{name} was {before[name]} and is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name] and name not in same
    ]
