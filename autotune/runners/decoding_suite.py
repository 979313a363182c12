"""Decoding strategies predicted against measured: `torchrun --nproc-per-node 1 -m autotune.runners.decoding_suite
RECIPE`.

For every batch and prompt length each strategy's plans run after prompts of held-out files, in one world that stands.
What a prediction rests on is measured beforehand: the operations of the passes, and how often proposals are kept after
prompts of other files. No plan's own time is ever used. Prints a Markdown table with signed errors, what was chosen and
what that is worse than the best that was measured; `--out` takes the rows as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from autotune.planners.decoding.chains import expected
from autotune.planners.decoding.strategies import STRATEGIES, acceptance_key, tells_ranks, variants
from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.planners.predict_generation import rates, rounds
from autotune.profiles_db.profile_file import load_profile
from autotune.runners.here import refine_for
from autotune.runners.job import Job, RunResult
from autotune.runners.standing import Standing
from autotune.spec.plan import LIBRARY, PLAIN, Plan
from autotune.spec.prediction import Prediction, Question
from autotune.spec.recipe import Recipe, load_recipe
from autotune.spec.workload import Acceptance, Workload

PATIENCE_S = 120.0
COUNTED = 256  # sequences whose rounds tell an acceptance


def plans_of(recipe: Recipe, workload: Workload, at_once: int) -> Iterator[Plan]:
    """Every strategy's plans for so many sequences at a time: the recipe's, or those that a search tries."""
    axes = recipe.axes()
    base = Plan(micro_batch=at_once, attention=str(axes.get("attention", ("sdpa",))[0]))
    for kernels, name in product(
        map(str, axes.get("kernels", (LIBRARY,))), map(str, axes.get("decoding", tuple(STRATEGIES)))
    ):
        for choice in variants(name, workload, axes):
            plan = base.altered(kernels=kernels, **choice)
            if not why_not(recipe.model(), workload, plan):
                yield plan


def job_of(recipe: Recipe, plan: Plan, workload: Workload, device: str, steps: int, apart: bool) -> Job:
    return Job(
        plan,
        recipe.model(),
        workload,
        steps=steps,
        warmup=0 if apart else 1,
        seed=recipe.seed,
        checkpoint=recipe.checkpoint,
        draft_checkpoint=recipe.draft_checkpoint,
        device=device,
        trace=False,
        apart=apart,
        ranks=apart and tells_ranks(plan),
    )


def acceptances(
    world: Standing, recipe: Recipe, workload: Workload, plans: Sequence[Plan], device: str
) -> tuple[Acceptance, ...]:
    """How often what each of these plans proposes is kept, after prompts that they will not be judged by."""
    longest: dict[str, Plan] = {}
    for plan in plans:
        key = acceptance_key(plan)
        if plan.decoding != PLAIN and longest.get(key, Plan()).speculate < plan.speculate:
            longest[key] = plan
    found = []
    for key, plan in sorted(longest.items()):
        many = min(COUNTED, 16)
        counted = replace(workload, batch=COUNTED)
        ran = world.run(
            job_of(recipe, plan.altered(micro_batch=many, kernels=LIBRARY), counted, device, 1, apart=True),
            "acceptance",
            PATIENCE_S,
        )
        assert ran.rounds is not None
        found.append(Acceptance(key, ran.rounds.rates, "measured", ran.rounds.taken, ran.rounds.ranks))
        print(f"  {key}: {ran.rounds.mean:.2f} tokens a round", file=sys.stderr, flush=True)
    return tuple(found)


def row_of(plan: Plan, workload: Workload, said: Prediction, ran: RunResult) -> dict[str, Any]:
    known, together = rates(plan, workload), replace(workload, batch=plan.micro_batch)
    seconds = statistics.median(ran.step_s)
    return {
        "plan": plan.describe(),
        "batch": plan.micro_batch,
        "prompt": workload.prompt_length,
        "predicted": said.tokens_per_s,
        "measured": workload.tokens / seconds,
        "predicted_round": said.decode_s * (workload.new_tokens - 1) / rounds(plan, together),
        "measured_round": ran.rounds.seconds if ran.rounds else ran.decode_s,
        "expected": expected(known) if known else 1.0,
        "tokens": ran.rounds.mean if ran.rounds else 1.0,
    }


def line(row: dict[str, Any]) -> str:
    error = row["predicted"] / row["measured"] - 1
    tokens = row["expected"] / row["tokens"] - 1
    return (
        f"| {row['batch']} | {row['prompt']} | {row['plan']} | {row['predicted']:.0f} | {row['measured']:.0f} | "
        f"{error:+.1%} | {row['expected']:.2f} / {row['tokens']:.2f} {tokens:+.1%} | "
        f"{row['predicted_round'] * 1e3:.3f} / {row['measured_round'] * 1e3:.3f} ms "
        f"{row['predicted_round'] / row['measured_round'] - 1:+.1%} |"
    )


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Mean and worst errors, and of each batch and prompt what choosing by prediction costs."""
    errors = [row["predicted"] / row["measured"] - 1 for row in rows]
    worst = max(errors, key=abs)
    yield f"tokens/s of {len(rows)}: mean {statistics.fmean(map(abs, errors)):.1%}, worst {worst:+.1%}"
    kept = [row["expected"] / row["tokens"] - 1 for row in rows if row["expected"] > 1]
    if kept:
        worst = max(kept, key=abs)
        yield f"tokens a round of {len(kept)}: mean {statistics.fmean(map(abs, kept)):.1%}, worst {worst:+.1%}"
    for case in dict.fromkeys((row["batch"], row["prompt"]) for row in rows):
        here = [row for row in rows if (row["batch"], row["prompt"]) == case]
        chosen, best = max(here, key=lambda row: row["predicted"]), max(here, key=lambda row: row["measured"])
        loss = 1 - chosen["measured"] / best["measured"]
        yield f"batch {case[0]}, prompt {case[1]}: of {len(here)} chose {chosen['plan']}, {loss:.1%} below the best"


def main(arguments: Sequence[str]) -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m autotune.runners.decoding_suite", description=__doc__)
    parser.add_argument("recipe", help="a recipe that generates, with its checkpoints")
    parser.add_argument("--profile", required=True, type=Path, help="the machine's profile (autotune profile --out)")
    parser.add_argument("--batches", default="1", help="sequences at a time, e.g. 1,8,32")
    parser.add_argument("--prompts", default="", help="prompt lengths, e.g. 512,4096; the recipe's without it")
    parser.add_argument("--sequences", type=int, default=64, help="that each plan continues, at least")
    parser.add_argument("--steps", type=int, default=1, help="timed generations of each plan")
    parser.add_argument("--out", type=Path, help="where the rows go as JSON")
    asked = parser.parse_args(arguments)
    recipe, profile = load_recipe(asked.recipe), load_profile(asked.profile)
    device = "cpu" if profile.device.kind == "cpu" else "cuda"
    world = Standing.join(device)
    base, rows = recipe.workload_spec(), list[dict[str, Any]]()
    print("| batch | prompt | plan | predicted tokens/s | measured | error | a round, expected / found | round |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for prompt in map(int, asked.prompts.split(",")) if asked.prompts else (base.prompt_length,):
        lengths = replace(base, prompt_length=prompt, prompt_lengths=())
        every = list(plans_of(recipe, replace(lengths, batch=1), 1))
        known = acceptances(world, recipe, lengths, every, device)
        for batch in map(int, asked.batches.split(",")):
            # Several batches one after another: a single text would say little.
            workload = replace(lengths, batch=max(batch, asked.sequences // batch * batch), acceptance=known)
            plans = list(plans_of(recipe, workload, batch))
            question = Question(recipe.model(), workload, profile, 1)
            say = lambda text: print(f"  {text}", file=sys.stderr, flush=True)  # noqa: E731
            profile = refine_for(question, plans, say)
            for plan in plans:
                said = Predictor(recipe.model(), workload, profile).predict(plan)
                job = job_of(recipe, plan, workload, device, asked.steps, apart=False)
                rows.append(row_of(plan, workload, said, world.run(job, plan.id, PATIENCE_S)))
                print(line(rows[-1]), flush=True)
                if asked.out:
                    asked.out.write_text(json.dumps(rows, indent=1))
    print("\n".join(summary(rows)), flush=True)
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
