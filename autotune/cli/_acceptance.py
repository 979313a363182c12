"""How often proposed tokens are kept: measured by generating, kept in the plan database, given to searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from autotune.cli import _output as out
from autotune.spec.digest import digest
from autotune.spec.errors import UsageError
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.words import counted

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.runners.job import RunResult
    from autotune.spec.recipe import Recipe
    from autotune.spec.workload import Workload

SEQUENCES = {"cpu": 16, "cuda": 256}  # at least, whose rounds are counted: texts differ
AT_ONCE = 16  # at most
NORMAL_95 = 1.96  # standard deviations either side that hold 95 % of a normal distribution
SHOWN = 8  # ranks that are printed


def conditions_of(recipe: Recipe, workload: Workload) -> dict[str, Any]:
    """What tells an acceptance from another of the same strategy: models and their weights, and how tokens are chosen.
    How long prompts and answers are changes it less, and is left out: the newest is kept."""
    from autotune.runners.headers import weights_digest
    from autotune.spec.workload import Workload

    draft, usual = workload.draft, Workload()
    enough = [workload.typical_epsilon, workload.typical_delta]
    return {
        "model": recipe.model().digest,
        "weights": weights_digest(recipe.checkpoint) if recipe.checkpoint else f"seed {recipe.seed}",
        "draft": draft.digest if draft else "",
        "draft_weights": weights_digest(recipe.draft_checkpoint) if recipe.draft_checkpoint else f"seed {recipe.seed}",
        "choice": [workload.temperature, workload.top_k, workload.top_p],
        **({"typical": enough} if enough != [usual.typical_epsilon, usual.typical_delta] else {}),
        "precision": workload.precision,
    }


def spread(traces: Sequence[Sequence[int]]) -> float:
    """Half of the 95 % confidence interval of the mean of tokens a round, over texts: rounds of one text are not
    independent. 0 where a single text tells it."""
    rounds = [trace for trace in traces if trace]
    if len(rounds) < 2:
        return 0.0
    whole = sum(map(len, rounds))
    mean = sum(map(sum, rounds)) / whole
    # A ratio of sums over texts: the variance of what each text adds to it (Cochran, Sampling Techniques, 6.4).
    off = sum((sum(trace) - mean * len(trace)) ** 2 for trace in rounds) / (len(rounds) - 1)
    return float(NORMAL_95 * sqrt(off * len(rounds)) / whole)


def known_workload(recipe: Recipe, store: Store) -> Workload:
    """The recipe's workload with what was measured for it; the recipe's own word counts more."""
    workload = recipe.workload_spec()
    if workload.kind == "train":
        return workload
    said = {one.key for one in workload.acceptance}
    try:
        measured = store.acceptances(digest(conditions_of(recipe, workload)))
    except UsageError:  # weights that cannot be read: refused where they are needed, and nobody has measured them
        measured = ()
    known = (*workload.acceptance, *(one for one in measured if one.key not in said))
    return replace(workload, acceptance=tuple(sorted(known, key=lambda one: one.key)))


def measure_acceptance(path: str, overrides: Sequence[str]) -> None:
    """Generates with every strategy that the recipe has weights for, and stores how often its proposals were kept."""
    from autotune.cli._execution import TIMEOUT_S, log_folder
    from autotune.cli._session import opened, read_recipe
    from autotune.planners.decoding.ranks import table
    from autotune.planners.decoding.strategies import STRATEGIES, acceptance_key, tells_ranks
    from autotune.planners.feasible import why_not
    from autotune.profiles_db.facts import machine_facts
    from autotune.runners.inputs import check_inputs
    from autotune.runners.job import job_of
    from autotune.runners.launch import launch_several
    from autotune.spec.workload import Acceptance

    recipe = read_recipe(path, list(overrides))
    if recipe.kind != "generate":
        raise UsageError(f"{path}: its workload trains", hint="--acceptance needs a recipe that generates")
    model, workload = recipe.model(), recipe.workload_spec()
    check_inputs(
        path, model, workload, recipe.checkpoint, recipe.prompts, runs=True, draft_checkpoint=recipe.draft_checkpoint
    )
    device = "cpu" if machine_facts().kind == "cpu" else "cuda"
    many = max(SEQUENCES[device], workload.batch)
    batch = many // AT_ONCE * AT_ONCE if many > AT_ONCE else many
    asked = replace(workload, batch=batch, prompt_lengths=())
    conditions, axes = conditions_of(recipe, workload), recipe.axes()
    found: list[dict[str, Any]] = []
    plans = [plan for name in map(str, axes.get("decoding", tuple(STRATEGIES))) for plan in _plans(name, asked, axes)]
    reasons = {plan: why_not(model, asked, plan) for plan in plans}
    for plan, reason in reasons.items():
        if reason:
            out.detail(f"{acceptance_key(plan)}: {reason}")
    possible = [plan for plan in plans if not reasons[plan]]
    if not possible:
        raise UsageError(f"{path}: nothing proposes tokens", hint="leave [search] decoding out, or name a strategy")
    jobs = [
        replace(
            job_of(recipe, plan, model, asked, device),
            steps=1,
            warmup=0,
            prompts=recipe.prompts if len(recipe.prompts) == asked.batch else (),
            stops=(),
            trace=False,
            apart=True,
            ranks=tells_ranks(plan),
        )
        for plan in possible
    ]
    with opened() as store:

        def keep(number: int, result: RunResult) -> None:
            key = acceptance_key(possible[number])
            assert result.rounds is not None  # every plan here proposes
            measured = Acceptance(key, result.rounds.rates, "measured", result.rounds.taken, result.rounds.ranks)
            store.save_acceptance(digest(conditions), model, measured, conditions)
            by_rank = table(measured.ranks, len(measured.rates)) if measured.ranks else ()
            told = {"ranks": [list(row) for row in by_rank]} if by_rank else {}
            mean, off = result.rounds.mean, spread(measured.traces)
            found.append({"key": key, "rates": list(measured.rates), "tokens_a_round": mean, "off": off, **told})
            rates = " ".join(f"{rate:.2f}" for rate in measured.rates)
            out.data(f"{key:<40} {mean:.2f} ± {off:.2f} tokens a round; kept, by position: {rates}")
            for head, row in enumerate(by_rank, 1):
                shown = " ".join(f"{share:.2f}" for share in row[:SHOWN])
                out.data(f"  head {head}, right by rank: {shown}")

        out.say(
            f"{counted(len(jobs), 'strategy', 'strategies')}, {asked.batch} texts of {asked.new_tokens} tokens each"
        )
        launch_several(jobs, log_folder(store, f"acceptance-{digest(conditions)[:10]}"), TIMEOUT_S, keep)
        out.data(f"stored     {store.place.shown}")
        out.emit("acceptance", {"model": model.name, "acceptances": found, "db": store.place.shown})
    out.say(f"next: autotune search {path} chooses among them")


def _plans(name: str, workload: Workload, given: Mapping[str, tuple[object, ...]]) -> list[Plan]:
    """The plans that tell a strategy's acceptance: of those that a search tries the ones with most tokens a round."""
    from autotune.planners.decoding.strategies import STRATEGIES, acceptance_key, variants

    if name == PLAIN or (STRATEGIES[name].draft and workload.draft is None):
        return []
    found: dict[str, Plan] = {}
    for choice in variants(name, workload, given):
        plan = Plan(micro_batch=min(AT_ONCE, workload.batch)).altered(**choice)
        key = acceptance_key(plan)
        if key not in found or found[key].speculate < plan.speculate:
            found[key] = plan
    return list(found.values())
