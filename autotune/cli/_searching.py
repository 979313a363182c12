"""A search with its memory: what is known is not computed again, what is found is kept whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from autotune.cli import _output as out
from autotune.cli._acceptance import known_workload
from autotune.cli._execution import job_for, launch_once, log_folder
from autotune.cli._session import at_hand, machine
from autotune.spec.errors import RunError
from autotune.spec.lock import Launch, lock_of, lock_path, write_lock

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.spec.plan import Plan
    from autotune.spec.prediction import Found, Prediction, Question
    from autotune.spec.recipe import Recipe

STEPS, WARMUP = 3, 1  # of a plan that a search measures

ROUNDS = 4  # of measuring the operations of the plans at the front


@dataclass(frozen=True)
class Answer:
    """What was found, under which search of the database, and the lock that says so."""

    found: Found
    search: str
    lock: Path | None


class Measuring:
    """Runs plans for a search, remembering each at once; a plan that was measured before is not run again."""

    def __init__(self, recipe: Recipe, question: Question, store: Store, search: str, device: str) -> None:
        self.recipe, self.question, self.store, self.search, self.device = recipe, question, store, search, device
        self.known = store.measured_alike(search)
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


def find(recipe: Recipe, store: Store, lock: bool, progress: Callable[[str], None]) -> Answer:
    """Search for `recipe`, resuming what the database knows of the same question, and write the lock.

    Raises InfeasibleError where no plan fits and UsageError for what no worker could load or continue. Ctrl-C ends
    the search with what it has; only where it has nothing yet does KeyboardInterrupt come out, and even then what was
    simulated is kept for the next time.
    """
    from autotune.profiles_db.profile_file import profile_digest
    from autotune.runners.inputs import check_inputs

    profile = machine(recipe, store)
    question = replace(recipe.question(profile), workload=known_workload(recipe, store))
    device = _device(question)
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
    store.save_recipe(recipe.path, recipe.merged())
    if device:  # first of all, so that the search and its predictions are kept under the profile they rest on
        question = _refined(question, store, progress)
    elif question.measure_budget:
        out.detail(f"{profile.name} is not this machine: no plan is measured")
    name = store.start_search(question)
    known = store.measured_alike(name)  # simulating again costs less than reading it back; measuring does not
    if known:
        out.detail(f"search {name[:10]} resumes: {len(known)} plans are already measured")
    measuring = Measuring(recipe, question, store, name, device) if device else None

    def remember(predictions: Sequence[Prediction]) -> None:
        store.remember_predictions(name, predictions)

    from autotune.planners.search import search

    found = None
    try:
        found = search(question, known=known, remember=remember, measure=measuring, progress=progress)
    finally:
        store.finish_search(name, found)
    file = None
    if lock and recipe.path != "-":
        file = lock_path(recipe.path)
        launches = measuring.of(found.best.plan) if measuring else ()
        rests = profile_digest(found.question.profile)
        write_lock(file, replace(lock_of(recipe, found, profile_digest=rests), measured=launches))
    return Answer(found, name, file)


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


def _device(question: Question) -> str:
    """What plans are measured on: cpu | cuda; "" where the machine is not at hand or the budget measures none."""
    facts = at_hand(question.profile) if question.measure_budget else None
    return "" if facts is None else "cpu" if facts.kind == "cpu" else "cuda"
