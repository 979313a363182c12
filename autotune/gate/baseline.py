"""Where the other side comes from, where it is stored: the lock, or a run of the plan database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autotune.gate.rule import LEAST
from autotune.gate.subject import Locked, Subject
from autotune.spec.errors import EnvironmentFault, UsageError, nearest_name
from autotune.spec.lock import Launch
from autotune.spec.words import counted

if TYPE_CHECKING:
    from autotune.profiles_db.records import RunEntry
    from autotune.profiles_db.store import Store

LOCK, DB, GIT = "lock", "db", "git"
FORMS = "lock, db, db:RUN or git:REF"
MARK = "baseline"  # among the facts of a run that a gate has made: it is a baseline


@dataclass(frozen=True)
class Baseline:
    """Launches of another time, and where they are from in words."""

    said: str
    launches: tuple[Launch, ...]


def parse(text: str) -> tuple[str, str]:
    """`--baseline` as its kind and what follows the colon. Raises UsageError with the nearest kind."""
    kind, _, rest = text.partition(":")
    if kind in (LOCK, DB, GIT) and (kind == GIT) <= bool(rest) and not (kind == LOCK and rest):
        return kind, rest
    near = nearest_name(kind, (LOCK, DB, GIT)) if kind not in (LOCK, DB, GIT) else None
    hint = f"nearest: {near}" if near else "git:main compares with a branch"
    raise UsageError(f"--baseline: found {text!r}; expected {FORMS}", hint=hint)


def of_lock(found: Locked) -> Baseline:
    """The launches that the lock keeps. Raises UsageError where they are too few to be a baseline."""
    launches = tuple(launch for launch in found.lock.measured if launch.step_s)
    if len(launches) < LEAST:
        raise _none(found, f"{found.file} has {counted(len(launches), 'measured launch', 'measured launches')}")
    return Baseline(f"{found.file.name}, measured {found.lock.measured_at or found.lock.generated_at}", launches)


def _none(found: Locked, what: str, flags: str = "") -> UsageError:
    hint = f"measure one with `autotune gate {found.recipe.path} --update{flags}`"
    return UsageError(f"no baseline: {what}; a gate needs {LEAST} launches or more", hint=hint)


def of_database(found: Subject, store: Store, run: str = "", other_machine: bool = False) -> Baseline:
    """The newest run that `--update --baseline db` has made of this plan, model and work on this machine, or the run
    that is named.

    Raises UsageError where there is none, EnvironmentFault where there are some of other machines alone.
    """
    if run:
        entry = store.run(run)
        if problem := _other(entry, found):
            raise UsageError(f"--baseline db:{run}: {problem}", hint="`autotune plans show PLAN` lists a plan's runs")
        runs: Sequence[RunEntry] = [entry]
    else:
        runs = [entry for entry in store.marked_runs(found.job.plan, MARK) if not _other(entry, found)]
    here = [entry for entry in runs if other_machine or entry.machine == found.facts.fingerprint]
    if not here and runs:
        raise EnvironmentFault(
            f"the baseline is of another machine: run {runs[0].id} ran on {runs[0].machine}; "
            f"this is {found.facts.name} ({found.facts.fingerprint})",
            hint="gate it there, or look at the figures with --allow-other-machine",
        )
    if not here:
        what = f"{store.place.shown} has none of plan {found.job.plan.id} for this model and work"
        raise _none(found.locked, what, " --baseline db")
    launches = launches_of(here[0])
    if len(launches) < LEAST:
        raise _none(
            found.locked, f"run {here[0].id} has {counted(len(launches), 'launch', 'launches')}", " --baseline db"
        )
    return Baseline(f"run {here[0].id} of {here[0].started}", launches)


def _other(entry: RunEntry, found: Subject) -> str:
    """What of a run is not the subject's; "": it is of the same plan, model and work, and finished."""
    if entry.status != "finished":
        return f"run {entry.id} is {entry.status}"
    if entry.plan != found.job.plan:
        return f"run {entry.id} is of plan {entry.plan.id}, the lock of plan {found.job.plan.id}"
    if entry.model != found.job.model:
        return f"run {entry.id} is of {entry.model.name}, the recipe of {found.job.model.name}"
    if replace(entry.workload, acceptance=()) != replace(found.job.workload, acceptance=()):
        return f"run {entry.id} is of other work than the recipe"
    return ""


def launches_of(entry: RunEntry) -> tuple[Launch, ...]:
    """A stored run as launches; its peak bytes and losses are those of all of them."""
    tokens = str(entry.facts.get("tokens", ""))
    return tuple(
        Launch(launch.steps, entry.peak_bytes, entry.id, entry.losses, tokens)
        for launch in entry.launches
        if launch.steps
    )
