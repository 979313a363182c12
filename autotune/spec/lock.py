"""The lock: what a search found for one recipe, to be committed beside it as NAME.lock.json.

Machine-written, sorted keys, one value a line, so that a diff reads. Loading treats the file as input like any other:
its digests are recomputed, and nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import autotune
from autotune.spec.band import Band
from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Found, Prediction

if TYPE_CHECKING:
    from autotune.spec.recipe import Recipe

KIND = "autotune.lock"
VERSION = 1
SCHEMA = f"{KIND}/{VERSION}"
SUFFIX = ".lock.json"


@dataclass(frozen=True)
class Launch:
    """One process launch of the locked plan: seconds of each measured step, device bytes of each rank; of a training
    the loss of each step from the first, of a generation the digest of its answers' tokens."""

    step_s: tuple[float, ...]
    peak_bytes: tuple[int, ...] = ()
    run_id: str = ""
    losses: tuple[float | None, ...] = ()  # None: not a finite number
    tokens: str = ""

    @property
    def median_s(self) -> float:
        """The launch as a sample: its median step."""
        return median(self.step_s)

    def to_dict(self) -> dict[str, Any]:
        """The form in the file; what is not known is left out."""
        known: dict[str, Any] = {"losses": list(self.losses)} if self.losses else {}
        known |= {"tokens": self.tokens} if self.tokens else {}
        return {"step_s": list(self.step_s), "peak_bytes": list(self.peak_bytes), "run_id": self.run_id} | known

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Launch:
        """The inverse, of what load_lock has checked."""
        losses = tuple(raw.get("losses", ()))
        run, tokens = str(raw.get("run_id", "")), str(raw.get("tokens", ""))
        return cls(tuple(raw["step_s"]), tuple(raw.get("peak_bytes", ())), run, losses, tokens)


@dataclass(frozen=True)
class Lock:
    """What was asked, what was answered, and what the answer rests on. Times in seconds, sizes in bytes."""

    recipe: Mapping[str, Any]  # file, digest, merged: the whole recipe with its defaults
    model: Mapping[str, Any]  # name, digest
    machine: Mapping[str, Any]  # name, grade, fingerprint, devices, software, profile: its digest
    plan: Plan
    # step_s, tokens_per_s, peak_bytes, breakdown, grades, prefill_s, decode_s; of step_s interval and rests_on; bands
    predicted: Mapping[str, Any]
    bound: Mapping[str, Any]  # step_s, gap (None: unknown), closed
    space: Mapping[str, Any]  # structures, feasible, infeasible
    evaluated: Mapping[str, Any]  # bounded, simulated, measured
    measured: tuple[Launch, ...] = ()
    runner_up: Mapping[str, Any] | None = None  # plan, plan_id, step_s, reason
    generated_at: str = ""  # ISO 8601, UTC
    measured_at: str = ""  # the same of the launches, where a gate measured them
    autotune: str = autotune.__version__

    @property
    def devices(self) -> int:
        return int(self.machine["devices"])

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "schema": SCHEMA,
            "autotune": self.autotune,
            "generated_at": self.generated_at,
            "recipe": dict(self.recipe),
            "model": dict(self.model),
            "machine": dict(self.machine),
            "plan": self.plan.to_dict(),
            "plan_id": self.plan.id,
            "plan_digest": self.plan.digest,
            "predicted": dict(self.predicted),
            "measured": [run.to_dict() for run in self.measured],
            "bound": dict(self.bound),
            "space": dict(self.space),
            "evaluated": dict(self.evaluated),
            "runner_up": dict(self.runner_up) if self.runner_up else None,
        } | ({"measured_at": self.measured_at} if self.measured_at else {})


def lock_path(recipe: str | Path) -> Path:
    """Where the lock of a recipe file is: beside it, under the file's own name."""
    path = Path(recipe).expanduser()
    return path.with_name(path.name.removesuffix(".toml") + SUFFIX)


def answer(prediction: Prediction) -> dict[str, Any]:
    """The figures of a prediction that a lock and `--json` give. `interval` and `rests_on` are of `step_s`."""
    figures: dict[str, Any] = {
        "step_s": prediction.step_s,
        "tokens_per_s": prediction.tokens_per_s,
        "peak_bytes": list(prediction.peak_bytes),
        "breakdown": dict(prediction.breakdown),
        "grades": dict(prediction.grades),
    }
    if prediction.prefill_s or prediction.decode_s:
        figures |= {"prefill_s": prediction.prefill_s, "decode_s": prediction.decode_s}
    if step := prediction.bands.get("step_s"):
        figures |= {"interval": [step.low, step.high], "rests_on": step.rests_on}
        figures["bands"] = {figure: band.to_dict() for figure, band in prediction.bands.items()}
    return figures


def bands_of(predicted: Mapping[str, Any]) -> dict[str, Band]:
    """The bands of the figures that `answer` gave, by figure; none in a lock of an earlier version."""
    return {figure: Band.from_dict(raw) for figure, raw in predicted.get("bands", {}).items()}


def why_lost(winner: Prediction, other: Prediction, measured: Mapping[str, float]) -> str:
    """One sentence on why `other` lost: how much slower, and which kind of work makes most of the difference."""
    if winner.plan.id in measured and other.plan.id in measured:
        ratio = measured[other.plan.id] / measured[winner.plan.id] - 1
        return (
            f"measured {ratio:.1%} slower" if ratio >= 0 else f"measured {-ratio:.1%} faster, but loses the objective"
        )
    ratio = other.step_s / winner.step_s - 1 if winner.step_s else 0.0
    kinds = winner.breakdown.keys() | other.breakdown.keys()
    more = {kind: other.breakdown.get(kind, 0.0) - winner.breakdown.get(kind, 0.0) for kind in kinds}
    worst = max(sorted(more), key=lambda kind: more[kind], default=None)
    if ratio <= 0:
        return "predicted no slower; it loses the objective or a tie"
    because = f", most of it {worst} (+{more[worst] * 1e3:.3g} ms)" if worst and more[worst] > 0 else ""
    return f"predicted {ratio:.1%} slower{because}"


def lock_of(recipe: Recipe, found: Found, now: datetime | None = None, profile_digest: str = "") -> Lock:
    """The lock of a search's answer to `recipe`. `now` is the time it is stamped with, `profile_digest` names the
    profile that the answer rests on in the plan database."""
    best, profile = found.best, found.question.profile
    second = found.ranking[1] if len(found.ranking) > 1 else None
    file = Path(recipe.path).name
    return Lock(
        recipe={"file": file, "digest": recipe.digest, "merged": recipe.merged()},
        model={"name": recipe.model().name, "digest": recipe.model().digest},
        machine={
            "name": profile.name,
            "grade": profile.grade,
            "fingerprint": profile.fingerprint,
            "devices": found.question.devices,
            "software": dict(profile.software),
            "profile": profile_digest,
        },
        plan=best.plan,
        predicted=answer(best),
        bound={"step_s": found.bound.step_s, "gap": found.bound.gap, "closed": found.finished},
        space={
            "structures": found.space.structures,
            "feasible": found.space.feasible,
            "unseen": found.space.unseen,
            "infeasible": dict(found.space.infeasible),
        },
        evaluated={"bounded": found.bounded, "simulated": found.simulated, "measured": dict(found.measured)},
        runner_up={
            "plan": second.plan.to_dict(),
            "plan_id": second.plan.id,
            "step_s": second.step_s,
            "reason": why_lost(best, second, found.measured),
        }
        if second
        else None,
        generated_at=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
    )


def write_lock(path: Path, lock: Lock) -> None:
    """Write `lock` whole or not at all. Raises EnvironmentFault where the folder cannot be written."""
    text = json.dumps(lock.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or type(error).__name__
        raise EnvironmentFault(f"{path}: cannot write the lock: {reason}", hint="or search with --no-lock") from None


@dataclass(frozen=True)
class _Field:
    """A field that a lock must have: its type and, for a table, the keys that others rely on."""

    kind: type
    keys: Mapping[str, type | tuple[type, ...]] = field(default_factory=dict)


_NUMBER = (int, float)
_FIELDS: dict[str, _Field] = {
    "recipe": _Field(dict, {"file": str, "digest": str, "merged": dict}),
    "model": _Field(dict, {"name": str, "digest": str}),
    "machine": _Field(dict, {"name": str, "fingerprint": str, "devices": int, "software": dict}),
    "plan": _Field(dict),
    "plan_digest": _Field(str),
    "predicted": _Field(dict, {"step_s": _NUMBER, "tokens_per_s": _NUMBER, "peak_bytes": list}),
    "measured": _Field(list),
    "bound": _Field(dict, {"step_s": _NUMBER, "gap": (*_NUMBER, type(None))}),
    "space": _Field(dict, {"structures": int, "feasible": int, "infeasible": dict}),
    "evaluated": _Field(dict),
    "generated_at": _Field(str),
}


def load_lock(path: str | Path) -> Lock:
    """The lock at `path`. Raises UsageError for a file that is missing, damaged, altered, or of a newer autotune."""
    shown, file = str(path), Path(path).expanduser()
    if not file.is_file():
        near = (
            nearest_name(file.name, (p.name for p in file.parent.glob(f"*{SUFFIX}"))) if file.parent.is_dir() else None
        )
        found = Problem(shown, "", "nothing" if not file.exists() else "not a regular file", "a lock file", near)
        raise UsageError("cannot read the lock", hint="`autotune search RECIPE` writes it", problems=[found])
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        damage = Problem(shown, "", str(error) or type(error).__name__, "a lock file (JSON)")
        raise UsageError("cannot read the lock", hint=_AGAIN, problems=[damage]) from error
    found_all = list(_problems(raw, shown))
    if found_all:
        raise UsageError("cannot read the lock", hint=_AGAIN, problems=found_all)
    plan = Plan.from_dict(raw["plan"], f"{shown}: plan")
    if plan.digest != raw["plan_digest"]:
        altered = Problem(shown, "plan_digest", raw["plan_digest"][:10], f"{plan.id}: the plan was altered by hand")
        raise UsageError("cannot read the lock", hint=_AGAIN, problems=[altered])
    return Lock(
        plan=plan,
        measured=tuple(map(Launch.from_dict, raw["measured"])),
        runner_up=raw.get("runner_up"),
        autotune=str(raw.get("autotune", "")),
        **{key: raw[key] for key in ("recipe", "model", "machine", "predicted", "bound", "space", "evaluated")},
        generated_at=raw["generated_at"],
        measured_at=str(raw.get("measured_at", "")),
    )


_AGAIN = "restore it from version control, or write it again with `autotune search RECIPE`"


def _problems(raw: object, shown: str) -> Iterator[Problem]:
    """What is wrong with the shape of a lock."""
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or schema != SCHEMA:
        newer = str(schema).startswith(f"{KIND}/")
        found = f"{schema!r}, of a newer autotune" if newer else repr(schema)
        yield Problem(shown, "schema", found, f"{SCHEMA}: upgrade autotune" if newer else SCHEMA)
        return
    for key, want in _FIELDS.items():
        value = raw.get(key)
        if not isinstance(value, want.kind):
            yield Problem(shown, key, "nothing" if value is None else type(value).__name__, want.kind.__name__)
            continue
        for inner, kind in want.keys.items():
            if isinstance(value, dict) and not isinstance(value.get(inner), kind):
                name = "a number" if isinstance(kind, tuple) else kind.__name__
                yield Problem(shown, f"{key}.{inner}", repr(value.get(inner))[:40], name)
    for index, run in enumerate(raw["measured"] if isinstance(raw.get("measured"), list) else ()):
        launch = run if isinstance(run, dict) else {}
        for key, of in (("step_s", "seconds"), ("peak_bytes", "bytes")):
            values = launch.get(key)
            if not isinstance(values, list) or not all(isinstance(value, _NUMBER) for value in values):
                yield Problem(shown, f"measured.{index}.{key}", repr(values)[:40], f"a list of {of}")
        losses = launch.get("losses", [])
        if not isinstance(losses, list) or not all(isinstance(loss, (*_NUMBER, type(None))) for loss in losses):
            yield Problem(shown, f"measured.{index}.losses", repr(losses)[:40], "a list of losses")
    evaluated = raw.get("evaluated")
    measured = evaluated.get("measured", {}) if isinstance(evaluated, dict) else {}
    if not isinstance(measured, dict) or not all(isinstance(value, _NUMBER) for value in measured.values()):
        yield Problem(shown, "evaluated.measured", repr(measured)[:40], "plan ids and their seconds")
    predicted = raw.get("predicted")
    bands = predicted.get("bands", {}) if isinstance(predicted, dict) else {}
    for figure, band in bands.items() if isinstance(bands, dict) else [("", bands)]:
        try:
            Band.from_dict(band)
        except (KeyError, TypeError, ValueError):
            found = repr(band)[:40]
            yield Problem(shown, f"predicted.bands.{figure}".rstrip("."), found, "an interval and what it rests on")
    second = raw.get("runner_up")
    if second is not None and not isinstance(second, dict):
        yield Problem(shown, "runner_up", repr(second)[:40], "a plan, or null")
    elif second is not None and not isinstance(second.get("plan"), dict):
        yield Problem(shown, "runner_up.plan", repr(second.get("plan"))[:40], "a plan's axes")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Sequence[str]) -> Iterator[str]:
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(tuple(ignored)):
            yield f"{key} was {before.get(key, 'absent')!r} and is {after.get(key, 'absent')!r}"


# Keys that an answer does not depend on: see Recipe.digest.
_NO_MATTER = (
    *("name", "gate.", "search.budget.", "search.seed", "model."),
    *("workload.steps", "workload.prompt", "workload.stop"),
)


def _read_again(lock: Lock, recipe: Recipe) -> Recipe | None:
    """The recipe that the lock keeps, as this version reads it: a key that came with it has its default. None where it
    cannot be read any more."""
    from autotune.spec.recipe import from_merged

    try:
        return from_merged(lock.recipe["merged"], recipe.path, recipe.folder)
    except UsageError:
        return None


def stale(lock: Lock, recipe: Recipe, profile: Profile | None) -> list[str]:
    """Why the lock no longer answers the recipe on this machine, one reason an entry; empty: it still does.

    `profile` is what `[machine] use` names now; None skips the machine.
    """
    reasons = []
    then = _read_again(lock, recipe)
    if (then.digest if then else lock.recipe["digest"]) != recipe.digest:
        kept = then.merged() if then else lock.recipe["merged"]
        changed = list(_changes(kept, recipe.merged(), _NO_MATTER))
        if changed or lock.model["digest"] == recipe.model().digest:
            reasons.append(f"the recipe {recipe.path} changed: " + ("; ".join(changed) or "its digest differs"))
    if lock.model["digest"] != recipe.model().digest:
        reasons.append(f"the model changed: {lock.model['name']} is no longer what the lock was made for")
    if profile is not None and lock.machine["fingerprint"] != profile.fingerprint:
        reasons.append(f"the machine changed: the lock is for {lock.machine['name']}, this is {profile.name}")
    elif profile is not None:
        moved = list(_changes(lock.machine["software"], profile.software, ()))
        reasons += [f"the software changed: {'; '.join(moved)}"] if moved else []
    return reasons
