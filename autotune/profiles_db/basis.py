"""What the answer of a search rests on, and what of it changed since another search: plain values, no database.

An answer is given again only where all of it is the same; where it is not, each difference has a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 60  # characters of a value that are shown
NOT_NOTED = "not noted"  # by searches of earlier versions


@dataclass(frozen=True)
class Change:
    """One input by its name in a recipe, where it has one; `was` and `now` are texts to read."""

    what: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.what} was {self.was} and is {self.now}"


@dataclass(frozen=True)
class Versions:
    """The software that an answer depends on.

    `libraries` are those of the machine at hand (`Facts.software`) with the version of our own executor: what a plan
    was measured with. Empty where no plan is measured, or the machine is not at hand: its profile holds its versions.
    """

    autotune: str
    cost_model: str
    libraries: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"autotune": self.autotune, "cost_model": self.cost_model, "libraries": dict(self.libraries)}


@dataclass(frozen=True)
class ProfileFacts:
    """What tells one profile from another; `samples` is how many works were measured."""

    digest: str
    name: str
    grade: str
    created: str
    fingerprint: str
    samples: int
    software: Mapping[str, str]

    def __str__(self) -> str:
        made = f" of {self.created[:19]}" if self.created else ""
        return f"{self.name}{made}, {self.grade}, {self.samples} samples ({self.digest[:10]})"


@dataclass(frozen=True)
class Basis:
    """The inputs of one search. `asked` is the summary that names it in the database, versions included; `measure` the
    plans that it was to run, None where nobody noted it."""

    model: Mapping[str, Any]
    workload: Mapping[str, Any]
    profile: ProfileFacts
    asked: Mapping[str, Any]
    measure: int | None


def changes(old: Basis, new: Basis) -> tuple[Change, ...]:
    """Every input in which two searches differ, a line each; empty: they ask the same."""
    return (
        *_spec("model", "name", old.model, new.model),
        *_spec("workload", "kind", old.workload, new.workload),
        *_asked(old.asked, new.asked),
        *_machine(old, new),
        *_versions(old.asked, new.asked),
        *_one("search.budget.measure", old.measure, new.measure, NOT_NOTED),
    )


def _spec(what: str, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """The fields in which two specifications differ; those of another name differ in that alone."""
    if old.get(name) != new.get(name):
        yield Change(what, str(old.get(name)), str(new.get(name)))
        return
    before, after = flat(old), flat(new)
    for key in sorted(before.keys() | after.keys()):
        yield from _one(f"{what}.{key}", before.get(key), after.get(key), "absent")


def _asked(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key, name in (
        ("devices", "machine.devices"),
        ("minimize", "objective"),
        ("memory_fraction", "objective.limits.memory_fraction"),
        ("seed", "search.seed"),
    ):
        yield from _one(name, old.get(key), new.get(key), "absent")
    before, after = old.get("axes", {}), new.get("axes", {})
    for axis in sorted(before.keys() | after.keys()):
        yield from _one(f"search.{axis}", before.get(axis), after.get(axis), "everything valid")


def _machine(old: Basis, new: Basis) -> Iterator[Change]:
    """Of another machine only that it is another one; of the same what became of its profile."""
    before, after = old.profile, new.profile
    if before.fingerprint != after.fingerprint:
        yield Change("machine", f"{before.name} ({before.fingerprint})", f"{after.name} ({after.fingerprint})")
    elif before.digest != after.digest:
        yield Change("profile", str(before), str(after))
        for key in sorted(before.software.keys() | after.software.keys()):
            yield from _one(f"profile.software.{key}", before.software.get(key), after.software.get(key), "absent")


def _versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    yield from _one("autotune", old.get("autotune"), new.get("autotune"), NOT_NOTED)
    yield from _one("cost model", old.get("cost_model"), new.get("cost_model"), NOT_NOTED)
    before, after = old.get("libraries", {}), new.get("libraries", {})
    if before and after:  # else one of the machines was not at hand, or nobody noted them
        for key in sorted(before.keys() | after.keys()):
            yield from _one(f"software.{key}", before.get(key), after.get(key), "absent")
    elif before or after:
        none = NOT_NOTED if "libraries" not in old else "none: nothing was measured here"
        yield Change("software", *(shown(side) if side else none for side in (before, after)))


def _one(what: str, old: Any, new: Any, absent: str) -> Iterator[Change]:
    if old != new:
        yield Change(what, *(absent if side is None else shown(side) for side in (old, new)))


def shown(value: Any) -> str:
    """A value as text of at most SHOWN characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables; tuples as the lists that JSON keeps."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return found
