"""The gate that needs no accelerator: what the cost model says of the locked plan now, beside what the lock says.

Nothing in it is measured, so nothing in it is noise: the same code, recipe and profile give the same figures. torch is
not imported. The search ends with its proof or its number of simulations; where the recipe's seconds end it first, a
plan that it had no time for may be missed, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autotune.gate.checks import BETTER, OK, UNKNOWN, WORSE, Check
from autotune.gate.outcome import CODES, UPDATED, Outcome
from autotune.gate.rule import IMPROVED, PASS, REGRESSED
from autotune.gate.subject import Locked, locked, profile_of
from autotune.planners.decoding.strategies import unknown
from autotune.planners.explore import objective
from autotune.planners.predict import predict
from autotune.planners.search import limit_bytes, search
from autotune.profiles_db.profile_file import profile_digest
from autotune.spec.errors import EnvironmentFault, InfeasibleError
from autotune.spec.lock import answer, write_lock
from autotune.spec.prediction import Found, Prediction, Question

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.spec.recipe import Recipe
    from autotune.spec.workload import Workload

ROUNDING = 1e-3  # of a predicted figure: what the order of sums may change, and no change of code that anybody meant
PREDICTED = "predicted"


def gate_predicted(
    path: str,
    overrides: tuple[str, ...],
    threshold: float | None,
    update: bool,
    store: Store,
    work: Callable[[Recipe, Store], Workload],
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Holds the gate. `work`: the recipe's workload with what is known of acceptances. Raises AutotuneError where it
    cannot be held, InfeasibleError among them where the locked plan cannot run any more."""
    found = locked(path, overrides)
    recipe, lock = found.recipe, found.lock
    profile = profile_of(found, store)
    question = replace(recipe.question(profile), workload=work(recipe, store), measure_budget=0)
    if lacking := unknown(lock.plan, question.workload):
        hint = "on a machine without the plan database that has it, say it in [workload] acceptance"
        raise EnvironmentFault(f"{found.file}: {lacking}", hint=hint)
    now = predict(question.model, question.workload, profile, lock.plan, lock.devices)
    counts = float(found.settings["threshold"]) if threshold is None else threshold
    common: dict[str, Any] = {"mode": PREDICTED, "plan_id": lock.plan.id, "threshold": counts}
    common["baseline"] = f"{found.file.name}, predicted {lock.generated_at}"
    if update:
        machine = {**lock.machine, "profile": profile_digest(profile)}
        write_lock(found.file, replace(lock, predicted=answer(replace(now, timeline=None)), machine=machine))
        return Outcome(path, UPDATED, CODES[UPDATED], f"the new prediction is in {found.file}", **common)
    checks = [_time(lock.predicted, now), _memory(lock.predicted, now), *_fits(question, now)]
    notes: tuple[str, ...] = ()
    try:
        best = search(question, progress=tell)
    except InfeasibleError as error:  # nothing fits, or the budget ended before anything did
        checks.append(Check("better plan", UNKNOWN, error.message.splitlines()[0]))
    else:
        checks.append(better_plan(found, question, now, best, counts))
        notes = () if best.finished else ("the budget ended the search: a better plan may have been missed",)
    worse = [check for check in checks if check.state == WORSE]
    kind = REGRESSED if worse else IMPROVED if any(check.state == BETTER for check in checks) else PASS
    said = (
        "; ".join(f"{check.name}: {check.said}" for check in worse) or "no worse than the lock says, and no better plan"
    )
    hints = {
        REGRESSED: f"find the better plan with `autotune search {path}`, or accept it: `autotune gate {path} "
        "--predicted --update`",
        IMPROVED: f"`autotune gate {path} --predicted --update` keeps it",
    }
    return Outcome(path, kind, CODES[kind], said, hint=hints.get(kind, ""), checks=tuple(checks), notes=notes, **common)


def _change(name: str, now: float, was: float, shown: Callable[[float], str]) -> Check:
    change = now / was - 1 if was else 0.0
    state = WORSE if change > ROUNDING else BETTER if change < -ROUNDING else OK
    return Check(name, state, f"{shown(now)}, in the lock {shown(was)} ({change:+.2%})")


def _time(then: Any, now: Prediction) -> Check:
    return _change("predicted time", now.step_s, float(then["step_s"]), lambda s: f"{s * 1e3:.4g} ms")


def _memory(then: Any, now: Prediction) -> Check:
    """Of the rank whose peak is the highest."""
    was = max(then["peak_bytes"], default=0)
    return _change("predicted memory", max(now.peak_bytes), float(was), lambda size: f"{size / 2**20:.2f} MiB")


def _fits(question: Question, now: Prediction) -> list[Check]:
    """A failed check where the locked plan needs more of a device than the recipe's limit allows; else none."""
    allowed, most = limit_bytes(question), max(now.peak_bytes)
    said = f"needs {most / 2**20:.2f} MiB of a device, of which {allowed / 2**20:.2f} MiB are allowed"
    return [Check("memory limit", WORSE, said)] if most > allowed else []


def better_plan(found: Locked, question: Question, now: Prediction, best: Found, threshold: float) -> Check:
    """Whether the search finds a plan that is predicted better than the locked one by more than the threshold.

    A lock that measurements decided may hold a plan that was never predicted best: plans that were measured beside it
    and lost are left out, and the lead that the best prediction had when the lock was made is allowed for.
    """
    lock = found.lock
    lost = set(lock.evaluated.get("measured", {})) - {lock.plan.id}
    rivals = [p for p in best.ranking if p.plan.id not in lost and p.plan != lock.plan]
    if not rivals:
        return Check("better plan", OK, f"none of {best.simulated} simulated")
    rival = min(rivals, key=lambda p: objective(question, p))
    lead = _lead(question, now, rival)
    then = _lead_then(found, question)
    state = WORSE if lead > (1 + threshold) * then else OK
    allowed = f", {then - 1:.1%} when it was locked" if then > 1 + ROUNDING else ""
    word = f"{rival.plan.id} ({rival.plan.describe()}) is predicted {lead - 1:+.1%} better{allowed}"
    said = word if lead > 1 else f"none of {best.simulated} simulated; the next is {1 - lead:.1%} worse"
    return Check("better plan", state, f"{said}; {threshold:.1%} counts")


def _lead(question: Question, one: Prediction, other: Prediction) -> float:
    """How many times better the other is than the one, by what the recipe minimises or maximises."""
    here, there = objective(question, one), objective(question, other)
    if question.minimize == "tokens_per_s":
        here, there = -there, -here
    return here / there if there else 1.0


def _lead_then(found: Locked, question: Question) -> float:
    """The same of the best prediction when the lock was made, where that search was proven; else 1."""
    bound, said = found.lock.bound, found.lock.predicted
    least = float(bound["step_s"])
    if not bound.get("closed") or least <= 0:
        return 1.0
    value = float(max(said["peak_bytes"], default=0)) if question.minimize == "peak_memory" else float(said["step_s"])
    return max(1.0, value / least)
