"""Running a plan with real workers, and keeping what they measured beside what was predicted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from autotune.cli import _output as out
from autotune.cli._target import Target
from autotune.report.bands import fell
from autotune.runners.provenance import environment, git_revision
from autotune.spec.errors import AutotuneError, EnvironmentFault, UsageError
from autotune.spec.lock import answer
from autotune.spec.words import counted

if TYPE_CHECKING:
    from autotune.profiles_db.facts import Facts
    from autotune.profiles_db.store import Store
    from autotune.runners.job import Job, RunResult
    from autotune.runners.saved import Saved
    from autotune.runners.stream import Tell
    from autotune.spec.machine import Profile
    from autotune.spec.plan import Plan
    from autotune.spec.prediction import Prediction, Question
    from autotune.spec.recipe import Recipe

TIMEOUT_S = 1800.0  # of one launch
KERNELS = "kernels.json"  # what runners.kernels writes, which loads torch
TRAINING_S = 30 * 86400.0  # of one whose weights are wanted: a collective that hangs ends it sooner


def peak_flops(profile: Profile | None, precision: str, world: int) -> float:
    """FLOP/s of one worker's device in `precision`, which utilisation is a share of; 0 where the profile does not say.

    A processor's figure is of all its cores, which the workers divide.
    """
    if profile is None:
        return 0.0
    return profile.device.peak_flops.get(precision, 0.0) / (world if profile.device.kind == "cpu" else 1)


def job_for(recipe: Recipe, plan: Plan, question: Question, device: str, steps: int, warmup: int, trace: bool) -> Job:
    """The job that measures `plan` for a search."""
    from autotune.runners.job import job_of

    return replace(
        job_of(recipe, plan, question.model, question.workload, device),
        steps=steps,
        warmup=warmup,
        seed=question.seed,
        stops=(),  # what is compared are whole answers
        trace=trace,
        peak_flops=peak_flops(question.profile, question.workload.precision, plan.world),
    )


def launch_once(job: Job, folder: Path, timeout_s: float = TIMEOUT_S, tell: Tell | None = None) -> RunResult:
    """One launch of all workers of `job`; logs and reports go to `folder`. Raises RunError where a worker fails."""
    from autotune.runners.launch import launch

    folder.mkdir(parents=True, exist_ok=True)
    return launch(job, nproc=job.plan.world, log_dir=folder, timeout_s=timeout_s, tell=tell)


def log_folder(store: Store, name: str) -> Path:
    """Where the logs of run or search `name` go: beside the database's other files."""
    return store.place.files / "logs" / name


def local_device(target: Target) -> tuple[Facts, str]:
    """This machine and the device kind that workers use on it.

    Raises EnvironmentFault where the plan is for another kind of machine or needs more devices than there are.
    """
    from autotune.profiles_db.facts import machine_facts

    facts = machine_facts()
    device = "cpu" if facts.kind == "cpu" else "cuda"
    wanted = target.profile.device if target.profile else None
    if wanted and (wanted.kind == "cpu") != (device == "cpu"):
        raise EnvironmentFault(
            f"{target.shown}: the plan is for {wanted.name}, and this machine has {facts.name}",
            hint="run it there, or search for this machine with --set machine.use=this",
        )
    if device == "cuda" and target.plan.world > facts.count and joined() is None:
        raise EnvironmentFault(
            f"plan {target.plan.id} needs {target.plan.world} devices, and this machine has {facts.count}",
            hint=f"search again with --devices {facts.count}, or start it under torchrun on several machines",
        )
    if wanted and target.profile and target.profile.fingerprint != facts.fingerprint:
        out.say(
            f"note: predicted for {target.profile.name}, running on {facts.name}: the error says how alike they are"
        )
    return facts, device


def joined() -> int | None:
    """This process's rank in the world that torchrun or Slurm started; None where the run starts its own workers."""
    from autotune.runners.world import world_here

    here = world_here()
    return here[0] if here else None


def joined_name(plan: Plan) -> str:
    """A name for the run of a joined world that all its processes agree on without talking."""
    keys = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_PORT")
    parts = [os.environ[key] for key in keys if os.environ.get(key, "none") != "none"]
    return re.sub(r"[^A-Za-z0-9.-]", "-", "-".join(["world", *parts, plan.id]))


def execute(
    target: Target,
    store: Store,
    *,
    nproc: int | None,
    steps: int | None,
    warmup: int,
    launches: int,
    check: bool,
    prompts: Sequence[str] = (),
    tell: Tell | None = None,
    saved: Saved | None = None,
    kernels: Path | None = None,
) -> tuple[dict[str, Any], RunResult] | None:
    """Run the target's plan, store every launch, compare with the prediction: (content of `run --json`, first result).
    `prompts`: in the place of the recipe's. `tell`: gets the answers of the first generation as they grow. `saved`:
    the checkpoint that the first launch of a training leaves. `kernels`: where the first launch's kernels are written.

    In a world that torchrun or Slurm started every process runs its part, and only rank 0 stores and answers: the
    others get None. Raises RunError where workers die, after the run is stored as failed.
    """
    from autotune.planners.fits import check_room
    from autotune.runners.inputs import check_inputs
    from autotune.runners.job import job_of
    from autotune.runners.tokens import encode

    plan, recipe, rank = target.plan, target.recipe, joined()
    if rank is not None and launches > 1:
        raise UsageError("--launches: a world that is already there is launched once", hint="start it again instead")
    if rank is not None and tell:
        raise UsageError("--stream: nobody reads along in a world that is already there", hint="leave it out")
    if nproc is not None and nproc != plan.world and rank is None:
        raise UsageError(
            f"--nproc {nproc}: plan {plan.id} ({plan.describe()}) needs {plan.world} workers",
            hint=f"--nproc {plan.world}, or search again with --devices {nproc}",
        )
    facts, device = local_device(target)
    if kernels and device == "cpu":
        raise EnvironmentFault("--kernels: a processor computes without launching kernels", hint="leave it out")
    prompts = prompts or (recipe.prompts if recipe else ())
    if recipe:
        check_inputs(
            recipe.path,
            target.model,
            target.workload,
            recipe.checkpoint,
            prompts,
            runs=True,
            draft_checkpoint=recipe.draft_checkpoint,
            target_checkpoint=recipe.target_checkpoint,
        )
    if prompts and plan.page:  # as many pages as these prompts take
        lengths = tuple(map(len, encode(prompts, target.model, target.workload)))
        target = replace(target, workload=replace(target.workload, prompt_lengths=lengths))
    job = replace(
        job_of(recipe, plan, target.model, target.workload, device),
        steps=steps or (recipe.steps if recipe else 10),
        warmup=warmup,
        check=check,
        saved=saved,
        prompts=tuple(prompts),
        kernels=kernels is not None,
        peak_flops=peak_flops(target.profile, target.workload.precision, plan.world),
    )
    predicted = predict_target(target)
    if predicted and target.profile:
        check_room(target.model, target.workload, target.profile, predicted)
    shared = log_folder(store, joined_name(plan)) if rank is not None else None
    if rank and shared:
        launch_once(job, shared)
        return None
    run = store.start_run(
        plan,
        target.model,
        target.workload,
        machine=facts.fingerprint,
        facts={"name": facts.name, "kind": facts.kind, "count": facts.count, "software": dict(facts.software)},
        recipe=store.save_recipe(recipe.path, recipe.merged()) if recipe else None,
        git_sha=git_revision(),
        environment={"variables": environment(), "software": dict(facts.software)},
        prediction=predicted,
    )
    results: list[RunResult] = []
    try:
        for number in range(launches):
            workers = counted(plan.world, "worker")
            out.say(f"run {run}: launch {number + 1} of {launches}, {workers}, plan {plan.describe()}")
            first = number == 0
            folder = shared or log_folder(store, run) / str(number)
            now = replace(
                job,
                check=check and first,
                trace=first,
                kernels=job.kernels and first,
                stream=tell is not None and first,
                saved=saved if first else None,
            )
            patience = TRAINING_S if now.saved else TIMEOUT_S
            result = launch_once(now, folder, patience, tell if first else None)
            store.add_launch(run, result.step_s, log_dir=result.log_dir)
            results.append(result)
            if kernels and first:
                shutil.copyfile(Path(result.log_dir) / KERNELS, kernels)
    except BaseException as error:
        status = "failed" if isinstance(error, AutotuneError) else "interrupted"
        store.finish_run(run, status=status, error=str(error) or type(error).__name__)
        raise
    report = report_of(run, target, predicted, results) | {"saved": saved.folder if saved else None}
    measured, first_result = report["measured"], results[0]
    store.finish_run(
        run,
        losses=first_result.losses,
        peak_bytes=measured["peak_bytes"],
        mfu=measured["mfu"],
        tokens_per_s=measured["tokens_per_s"],
        equal=first_result.equal,
        max_difference=first_result.max_difference,
        facts={
            "host": dict(first_result.host),
            "prefill_s": measured["prefill_s"],
            "decode_s": measured["decode_s"],
            "predicted": _noted(target, predicted),
        },
        timeline=first_result.timeline,
    )
    return report, first_result


def predict_target(target: Target) -> Prediction | None:
    """The prediction of the target's plan with its timeline and bands; None where no profile is known."""
    from autotune.cli._bands import banded
    from autotune.planners.predict import predict

    if target.profile is None:
        return None
    return banded(predict(target.model, target.workload, target.profile, target.plan, target.devices), target)


def _noted(target: Target, predicted: Prediction | None) -> dict[str, Any]:
    """What is kept with a run of what was predicted of it, besides the prediction: by which version, what it rested on,
    and its bands."""
    from autotune.profiles_db.bands.pools import rests_on
    from autotune.profiles_db.cost_model import cost_model_version

    if predicted is None or target.profile is None:
        return {}
    return {
        "cost_model": cost_model_version(),
        "rests_on": rests_on(predicted, target.profile),
        "bands": {figure: band.to_dict() for figure, band in predicted.bands.items()},
    }


def report_of(run: str, target: Target, predicted: Prediction | None, results: Sequence[RunResult]) -> dict[str, Any]:
    """The content of `run --json`: what was predicted, what was measured, and predicted / measured - 1 of each."""
    launches = [list(result.step_s) for result in results]
    step_s = median(median(steps) for steps in launches)
    every = sorted(step for steps in launches for step in steps)
    peaks = [max(of_rank) for of_rank in zip(*(r.peak_bytes for r in results), strict=True)]
    first = results[0]
    measured: dict[str, Any] = {
        "step_s": step_s,
        "step_s_all": [step for steps in launches for step in steps],
        "launches": launches,
        "spread": interquartile(every) / step_s,
        "tokens_per_s": median(result.tokens_per_s for result in results),
        "mfu": median(result.mfu for result in results),
        "peak_bytes": peaks,
        "losses": list(first.losses),
        "prefill_s": median(result.prefill_s for result in results),
        "decode_s": median(result.decode_s for result in results),
        "rounds": _rounds(target, first),
    }
    error: dict[str, Any] = {"step_s": None, "peak_bytes": None}
    inside: dict[str, bool | None] = {}
    if predicted:
        figures = measured | {"peak_bytes": max(peaks, default=0)}
        inside = {figure: fell(predicted.bands, figure, figures[figure]) for figure in predicted.bands}
        peers = target.plan.tensor * target.plan.replicas  # ranks of one pipeline position, alike in the prediction
        expected = [predicted.peak_bytes[min(r // peers, len(predicted.peak_bytes) - 1)] for r in range(len(peaks))]
        error = {
            "step_s": ratio(predicted.step_s, step_s),
            "tokens_per_s": ratio(predicted.tokens_per_s, measured["tokens_per_s"]),
            "peak_bytes": ratio(max(expected, default=0), max(peaks, default=0)),
            "peak_bytes_by_rank": [ratio(a, b) for a, b in zip(expected, peaks, strict=True)],
            "prefill_s": ratio(predicted.prefill_s, measured["prefill_s"]),
            "decode_s": ratio(predicted.decode_s, measured["decode_s"]),
        }
    return {
        "run_id": run,
        "plan_id": target.plan.id,
        "plan": target.plan.to_dict(),
        "predicted": answer(predicted) if predicted else None,
        "measured": measured,
        "error": error,
        "inside": inside,
        "equal": first.equal,
        "max_difference": first.max_difference,
        "changes": list(target.plan.changes),
        "drift": dict(first.drift) or None,
        "tokens": [list(row) for row in first.tokens],
        "texts": list(first.texts),
        "ends": list(first.ends),
        "log_dir": first.log_dir,
    }


def _rounds(target: Target, result: RunResult) -> dict[str, Any] | None:
    """What became of proposed tokens; None where nobody proposed any."""
    from autotune.planners.decoding.chains import expected
    from autotune.planners.predict_generation import rates

    if result.rounds is None:
        return None
    known = rates(target.plan, target.workload)
    return {
        "tokens": result.rounds.mean,
        "expected": expected(known) if known else None,
        "rates": list(result.rounds.rates),
        "round_s": result.rounds.seconds,
        "taken": [list(row) for row in result.rounds.taken],
    }


def ratio(predicted: float, measured: float) -> float | None:
    """predicted / measured - 1; None where nothing was measured."""
    return predicted / measured - 1 if measured else None


def interquartile(ordered: Sequence[float]) -> float:
    """The distance between the quartiles of sorted values, interpolated between neighbours."""
    if len(ordered) < 2:
        return 0.0

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.75) - at(0.25)
