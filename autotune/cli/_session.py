"""Opening the plan database and finding the machine that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autotune.cli import _output as out
from autotune.cli._settings import current
from autotune.spec.errors import EnvironmentFault

if TYPE_CHECKING:
    from autotune.profiles_db.facts import Facts
    from autotune.profiles_db.store import Store
    from autotune.spec.machine import Profile
    from autotune.spec.recipe import Recipe


@contextmanager
def opened(create: bool = True) -> Iterator[Store]:
    """The plan database that --db, AUTOTUNE_DB or the folder names, open; what it has to say goes to stderr."""
    from autotune.profiles_db.location import locate
    from autotune.profiles_db.store import Store

    with Store(locate(current().db), create=create) as store:
        for notice in store.notices:
            out.say(f"plan database: {notice}")
        yield store


def read_recipe(path: str, overrides: list[str]) -> Recipe:
    """The recipe under its overrides, the names of schedules checked against the ones that this version has."""
    from autotune.planners.schedules import SCHEDULES
    from autotune.spec.recipe import load_recipe

    return load_recipe(path, overrides, names={"schedule": tuple(SCHEDULES)})


def this_machine(store: Store) -> Profile:
    """The newest stored profile of the machine this runs on; EnvironmentFault says how to make one."""
    from autotune.profiles_db.facts import machine_facts

    facts = machine_facts()
    profile = store.find_profile(facts.fingerprint)
    if profile is None:
        raise EnvironmentFault(
            f"this machine ({facts.name}) has no profile in {store.place.shown}",
            hint="measure it with `autotune profile --quick`, or name a shipped profile with [machine] use",
        )
    return profile


def machine(recipe: Recipe, store: Store) -> Profile:
    """The profile that `[machine] use` names: this machine's newest, a shipped or stored one, or a file's.

    What earlier searches measured for the profile of a file, or of one that ships, is taken from the database.
    """
    if recipe.use == "this":
        return this_machine(store)
    from autotune.profiles_db.profile_file import resolve

    return store.refined(resolve(recipe.use, recipe.folder, store.find_profile, recipe.path))


def at_hand(profile: Profile) -> Facts | None:
    """This machine's facts if `profile` is of it, so that plans for the profile can run here; else None."""
    from autotune.profiles_db.facts import has_driver, machine_facts

    if profile.device.kind != "cpu" and not has_driver():
        return None  # said without importing torch
    facts = machine_facts()
    return facts if facts.fingerprint == profile.fingerprint else None
