"""What RECIPE | LOCK | PLAN on a command line means: one plan, with the model, work and machine that it is for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.cli import _output as out
from autotune.cli._acceptance import known_workload
from autotune.cli._session import machine, read_recipe
from autotune.spec.errors import Problem, StaleLock, UsageError, nearest_name

if TYPE_CHECKING:
    from autotune.profiles_db.bands.pools import Bands
    from autotune.profiles_db.records import Origin, RunEntry
    from autotune.profiles_db.store import Store
    from autotune.spec.lock import Lock
    from autotune.spec.machine import Profile
    from autotune.spec.model import ModelSpec
    from autotune.spec.plan import Plan
    from autotune.spec.recipe import Recipe
    from autotune.spec.workload import Workload


@dataclass(frozen=True)
class Target:
    """One plan and everything it is for. `profile` is None for a stored plan that was never predicted. `bands`: what
    predictions of it are to be trusted by; None: they are not shown."""

    shown: str
    plan: Plan
    model: ModelSpec
    workload: Workload
    devices: int
    profile: Profile | None
    recipe: Recipe | None = None
    lock: Lock | None = None
    lock_file: Path | None = None
    bands: Bands | None = None

    def need_profile(self) -> Profile:
        """The profile; UsageError where nothing says for which machine the plan is."""
        if self.profile is None:
            raise UsageError(
                f"{self.shown}: no machine profile is stored for this plan", hint="name a recipe or a lock"
            )
        return self.profile


def find_target(text: str, overrides: Sequence[str], pins: Sequence[str], store: Store) -> Target:
    """The target that `text` names.

    Raises UsageError for what is neither a recipe, a lock nor a stored plan, and StaleLock for a lock that no longer
    answers its recipe.
    """
    return replace(_target(text, overrides, pins, store), bands=store.bands())


def _target(text: str, overrides: Sequence[str], pins: Sequence[str], store: Store) -> Target:
    path = Path(text).expanduser()
    if text == "-" or text.endswith(".toml"):
        return _of_recipe(text, overrides, pins, store)
    if text.endswith(".json"):
        _refuse("a lock", text, overrides, pins)
        return _of_lock(path, text, store)
    if path.exists():
        return _of_recipe(text, overrides, pins, store)
    if re.fullmatch(r"[0-9a-f]{4,64}", text):
        _refuse("a stored plan", text, overrides, pins)
        return _of_origin(text, store.origin(text), store)
    near = nearest_name(text, [p.name for p in Path.cwd().glob("*.toml")] + [str(p) for p in Path().glob("*/*.toml")])
    problem = Problem(text, "", "no such file", "a recipe (.toml), a lock (.lock.json) or a plan's id", near)
    raise UsageError("cannot tell what to work on", hint="`autotune plans ls` lists plans", problems=[problem])


def _of_origin(text: str, origin: Origin, store: Store) -> Target:
    """A stored plan: for the machine it was last predicted for, else for the one that it last ran on."""
    if origin.profile:
        profile: Profile | None = store.profile(origin.profile)
    else:
        runs = store.runs(1, plan=origin.plan.digest)
        profile = store.find_profile(runs[0].machine) if runs else None
    return Target(text, origin.plan, origin.model, origin.workload, origin.devices, profile)


def of_run(text: str, run: RunEntry, store: Store) -> Target:
    """The plan of a stored run, for the work it did, on the profile that predicted it or else its own machine's."""
    origin = store.origin(run.plan.digest)
    same = origin.model == run.model and origin.workload == run.workload
    profile = store.profile(origin.profile) if origin.profile and same else store.find_profile(run.machine)
    return Target(text, run.plan, run.model, run.workload, run.plan.world, profile)


def _refuse(what: str, text: str, overrides: Sequence[str], pins: Sequence[str]) -> None:
    if overrides or pins:
        flag = "--set" if overrides else "--pin"
        raise UsageError(f"{flag} changes a recipe, and {text} is {what}", hint=f"name the recipe, or drop {flag}")


def _of_recipe(text: str, overrides: Sequence[str], pins: Sequence[str], store: Store) -> Target:
    from autotune.spec.lock import load_lock, lock_path

    recipe = read_recipe(text, list(overrides))
    file = lock_path(text)
    if pins:
        profile = machine(recipe, store)
        devices = recipe.question(profile).devices
        work = known_workload(recipe, store)
        return Target(text, pinned(pins, devices), recipe.model(), work, devices, profile, recipe)
    if text == "-" or not file.exists():
        raise UsageError(
            f"{text} has no lock yet" if text != "-" else "a recipe on standard input has no lock",
            hint=f"find a plan with `autotune search {text}`, or name one with --pin tensor=2",
        )
    return _locked(load_lock(file), file, text, recipe, store)


def _of_lock(file: Path, text: str, store: Store) -> Target:
    """A lock with its recipe: the file beside it where there is one (then it must still agree), else its own copy."""
    from autotune.spec.lock import load_lock
    from autotune.spec.recipe import from_merged

    lock = load_lock(file)
    beside = file.with_name(Path(str(lock.recipe["file"])).name)
    if lock.recipe["file"] and beside.is_file():
        recipe = read_recipe(str(beside), [])
    else:
        recipe = from_merged(lock.recipe["merged"], f"{text}: recipe", file.absolute().parent)
    return _locked(lock, file, text, recipe, store)


def _locked(lock: Lock, file: Path, text: str, recipe: Recipe, store: Store) -> Target:
    from autotune.spec.lock import stale

    profile = machine(recipe, store)
    reasons = stale(lock, recipe, profile)
    if reasons:
        hint = f"search again with `autotune search {recipe.path}`, or restore what changed"
        raise StaleLock(f"{file} is stale:\n  " + "\n  ".join(reasons), hint=hint)
    out.detail(f"{file}: plan {lock.plan.id}, found {lock.generated_at}")
    work = known_workload(recipe, store)
    return Target(text, lock.plan, recipe.model(), work, lock.devices, profile, recipe, lock, file)


def with_order(target: Target, file: Path) -> Target:
    """The target with the pipeline order that a file holds, checked as it would be before it runs.

    Raises UsageError where the file cannot be read, and for an order that is not sound, with the place.
    """
    from autotune.planners.feasible import why_not
    from autotune.planners.lower.train import lower_training
    from autotune.planners.validate import validate

    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = (getattr(error, "strerror", None) or "not a text file").lower()
        problem = Problem(str(file), "", reason, "a text file with one line a rank")
        raise UsageError("cannot read the order", problems=[problem]) from error
    stages = 1 + max((int(n) for n in re.findall(r"\b(\d+)F\d", text)), default=0)
    chunks = -(-stages // target.plan.pipeline)
    plan = replace(target.plan, schedule="given", order=text, chunks=chunks, group=0, limit=0, times="")
    if reason := why_not(target.model, target.workload, plan, target.devices):
        raise UsageError(f"{file}: {reason}")
    try:
        validate(lower_training(plan, target.model, target.workload))
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}") from error
    return replace(target, plan=plan)


def pinned(pins: Sequence[str], devices: int) -> Plan:
    """The plan of AXIS=VALUE pins: other axes as a plan's defaults, and data what fills `devices` unless pinned."""
    from autotune.spec.plan import Plan
    from autotune.spec.recipe import AXES
    from autotune.spec.recipe_layers import parse_value

    raw: dict[str, Any] = {}
    problems = []
    for pin in pins:
        axis, equals, value = (part.strip() for part in pin.partition("="))
        if not equals or axis not in AXES:
            near = nearest_name(axis, AXES)
            problems.append(
                Problem(f"--pin {pin}", "", f"axis {axis!r}", "AXIS=VALUE with one of " + ", ".join(AXES), near)
            )
            continue
        parsed = parse_value(value)
        try:
            raw[axis] = AXES[axis].one(parsed)
        except ValueError:
            problems.append(Problem(f"--pin {pin}", "", repr(parsed), AXES[axis].expected_one))
    if problems:
        raise UsageError("cannot read the pinned plan", problems=problems)
    plan = Plan.from_dict(raw, "--pin")
    if "data" not in raw:
        rest = plan.context * plan.tensor * plan.pipeline
        if devices % rest:
            names = "context x tensor x pipeline" if plan.context > 1 else "tensor x pipeline"
            found = f"{names} = {rest}"
            problem = Problem("--pin", "", found, f"a divisor of {devices} devices, or data pinned as well")
            raise UsageError("cannot fill the devices", problems=[problem])
        plan = replace(plan, data=devices // rest)
    return plan


def axes_of(plan: Plan) -> dict[str, object]:
    """Axis name to value, in the order of the plan's fields."""
    return {f.name: getattr(plan, f.name) for f in fields(plan)}
