"""A search with its memory: what is known is not computed again, what is found is kept whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from autotune.cli import _output as out
from autotune.cli._acceptance import known_workload
from autotune.cli._bands import banded_found
from autotune.cli._execution import job_for, launch_once, log_folder
from autotune.cli._session import at_hand, machine
from autotune.cli._views import found_json, moment
from autotune.profiles_db.answers import Before
from autotune.spec.errors import RunError
from autotune.spec.lock import Launch, lock_of, lock_path, write_lock

if TYPE_CHECKING:
    from autotune.profiles_db.facts import Facts
    from autotune.profiles_db.store import Store
    from autotune.spec.plan import Plan
    from autotune.spec.prediction import Found, Prediction, Question
    from autotune.spec.recipe import Recipe

STEPS, WARMUP = 3, 1  # of a plan that a search measures

ROUNDS = 4  # of measuring the operations of the plans at the front


@dataclass(frozen=True)
class Answer:
    """What was found, under which search of the database, and the lock that says so.

    `before` is what the database knew of the question: the answer itself, or what has changed since.
    """

    found: Found
    search: str
    lock: Path | None
    before: Before


class Measuring:
    """Runs plans for a search, remembering each at once; a plan that was measured before is not run again."""

    def __init__(
        self, recipe: Recipe, question: Question, store: Store, search: str, device: str, known: Mapping[str, float]
    ) -> None:
        self.recipe, self.question, self.store, self.search, self.device = recipe, question, store, search, device
        self.known = dict(known)
        self.launches: dict[str, list[Launch]] = {}

    def __call__(self, plan: Plan) -> float:
        """Median seconds of a step of `plan`, run by real workers. Raises RunError where they fail."""
        if plan.id in self.known:
            return self.known[plan.id]
        job = job_for(self.recipe, plan, self.question, self.device, steps=STEPS, warmup=WARMUP, trace=False)
        folder = log_folder(self.store, f"search-{self.search[:10]}") / plan.id
        result = launch_once(job, folder)
        if not result.step_s:
            raise RunError(f"plan {plan.id}: its workers timed no step", hint=f"see {result.log_dir}")
        seconds = median(result.step_s)
        self.store.remember_measured(self.search, plan, seconds)
        self.launches.setdefault(plan.id, []).append(Launch(result.step_s, result.peak_bytes))
        self.known[plan.id] = seconds
        return seconds

    def of(self, plan: Plan) -> tuple[Launch, ...]:
        """The launches of `plan`: those of this search, or the one figure that an earlier one left."""
        if plan.id in self.launches:
            return tuple(self.launches[plan.id])
        return (Launch((self.known[plan.id],)),) if plan.id in self.known else ()


def find(recipe: Recipe, store: Store, lock: bool, progress: Callable[[str], None], fresh: bool = False) -> Answer:
    """The answer to `recipe` that the database holds, or else a search that resumes what it knows of the same
    question; and the lock. `fresh` searches, and runs plans, whatever was found and measured before.

    Raises InfeasibleError where no plan fits and UsageError for what no worker could load or continue. Ctrl-C ends
    the search with what it has; only where it has nothing yet does KeyboardInterrupt come out, and even then what was
    simulated is kept for the next time.
    """
    from autotune.profiles_db.cost_model import installed
    from autotune.runners.inputs import check_inputs

    profile = machine(recipe, store)
    question = replace(recipe.question(profile), workload=known_workload(recipe, store))
    # What is neither measured here nor priced as of here rests on the profile alone, and asking may load torch.
    facts = at_hand(profile) if question.measure_budget or recipe.use == "this" else None
    device = _device(question, facts)
    check_inputs(
        recipe.path,
        question.model,
        question.workload,
        recipe.checkpoint,
        recipe.prompts,
        runs=bool(device),
        draft_checkpoint=recipe.draft_checkpoint,
        target_checkpoint=recipe.target_checkpoint,
    )
    versions = installed(facts.software if facts else None)
    before = Before() if fresh else store.before(question, versions, recipe.name)
    if stored := before.answer:
        again = banded_found(stored.found, store.bands())
        file = _locked(recipe, again, stored.launches, stored.searched) if lock else None
        return Answer(again, stored.search, file, before)
    _told(before)
    store.save_recipe(recipe.path, recipe.merged())
    if device:  # first of all, so that the search and its predictions are kept under the profile they rest on
        question = _refined(question, store, progress)
    elif question.measure_budget:
        out.detail(f"{profile.name} is not this machine: no plan is measured")
    name = store.start_search(question, versions)
    known = (
        {} if fresh else store.measured_alike(name)
    )  # simulating again costs less than reading it back; measuring does not
    if known:
        out.detail(f"search {name[:10]} resumes: {len(known)} plans are already measured")
    measuring = Measuring(recipe, question, store, name, device, known) if device else None

    def remember(predictions: Sequence[Prediction]) -> None:
        store.remember_predictions(name, predictions)

    from autotune.planners.search import search

    found, launches = None, tuple[Launch, ...]()
    try:
        found = search(question, known=known, remember=remember, measure=measuring, progress=progress)
        launches = measuring.of(found.best.plan) if measuring else ()
    finally:
        searched = store.finish_search(name, found, recipe=recipe.name, launches=launches)
    found = banded_found(found, store.bands())
    return Answer(found, name, _locked(recipe, found, launches, searched) if lock else None, before)


def _locked(recipe: Recipe, found: Found, launches: tuple[Launch, ...], searched: str) -> Path | None:
    """Writes the lock of an answer beside its recipe, stamped with when it was `searched` (ISO-8601): the same answer
    again is the same file. Its path, or None where the recipe is no file."""
    from autotune.profiles_db.profile_file import profile_digest

    if recipe.path == "-":
        return None
    file, rests = lock_path(recipe.path), profile_digest(found.question.profile)
    write_lock(file, replace(lock_of(recipe, found, datetime.fromisoformat(searched), rests), measured=launches))
    return file


def _told(before: Before) -> None:
    """Says why what the database holds is no answer."""
    if before.changed:
        out.say(f"searching: the plan database has a search of this recipe of {moment(before.since)}, but")
        for change in before.changed:
            out.say(f"  {change}")
    elif before.since:
        out.say(f"searching: the same search was left unfinished at {moment(before.since)} and goes on")


def _refined(question: Question, store: Store, progress: Callable[[str], None]) -> Question:
    """The question with the operations of its most promising plans measured, and the profile kept with them.

    Better prices may bring other plans to the front: again, until what is there is measured, but ROUNDS times at most.
    """
    from autotune.planners.search import search
    from autotune.runners.here import refine_for

    for _ in range(ROUNDS):
        front = [p.plan for p in search(question, progress=lambda text: None).ranking[: 2 * question.measure_budget]]
        profile = refine_for(question, front, progress)
        if profile is question.profile:
            break
        store.save_profile(profile)
        question = replace(question, profile=profile)
    return question


def _device(question: Question, facts: Facts | None) -> str:
    """What plans are measured on: cpu | cuda; "" where the machine is not at hand or the budget measures none."""
    return "" if facts is None or not question.measure_budget else "cpu" if facts.kind == "cpu" else "cuda"


def answer_json(answer: Answer) -> dict[str, Any]:
    """The fields of `search --json`. `cached`: from the plan database, where it was `searched`; `changed`: the inputs
    in which the search of this recipe that is there differs."""
    before = answer.before
    return {
        **found_json(answer.found, str(answer.lock) if answer.lock else None),
        "search_id": answer.search[:10],
        "cached": before.answer is not None,
        "searched": before.answer.searched if before.answer else None,
        "changed": [{"what": change.what, "was": change.was, "now": change.now} for change in before.changed],
    }
