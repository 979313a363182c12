"""`autotune run`: runs a plan with real workers and compares with what was predicted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune.cli import _arguments as arguments
from autotune.cli import _output as out
from autotune.cli._session import opened
from autotune.cli._settings import command
from autotune.spec.errors import UsageError, WrongNumbers

if TYPE_CHECKING:
    from autotune.cli._target import Target
    from autotune.runners.saved import Saved
    from autotune.spec.workload import Workload


def add(app: typer.Typer) -> None:
    command(app)(run)


def run(
    target: arguments.Target,
    overrides: arguments.Overrides = None,
    pins: arguments.Pins = None,
    order: arguments.Order = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, metavar="N", help="Workers; as many as the plan has.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Timed steps a launch.")] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, metavar="N", help="Steps before them, not timed.")] = 2,
    launches: Annotated[int, typer.Option("--launches", min=1, metavar="N", help="Process launches.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the one-process reference; exit 6 if unequal.")
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Continue these, one a line (text or JSON); - reads stdin."),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option("--answers", metavar="FILE", help="Write the answers as JSON lines here, not to stdout."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the first generation's answers as they grow, as JSON lines.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FOLDER", help="Training: write the weights after the timed steps here."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write the measured timeline: .json, .html or .svg.")
    ] = None,
    kernels: Annotated[
        Path | None,
        typer.Option("--kernels", metavar="FILE", help="Write a torch.profiler trace of one step's kernels: .json."),
    ] = None,
) -> None:
    """Run a plan with real workers.

    Trains or generates, stores every step, and compares with the prediction. Under torchrun or Slurm it joins their
    world instead of starting its own.
    """
    from autotune.cli import _prompts
    from autotune.cli._drawing import check_picture, write_picture
    from autotune.cli._execution import execute
    from autotune.cli._target import find_target, with_order
    from autotune.cli._views import run_lines

    if trace:
        check_picture(trace)
    if kernels:
        check_picture(kernels, (".json",))
    with opened() as store:
        found = find_target(target, overrides or [], pins or [], store)
        found = with_order(found, order) if order else found
        saved = _saved(save, found) if save else None
        given = _given(target, prompts, answers, stream, found.workload)
        whole: tuple[str, ...] = ()
        if prompts:
            at_once = found.plan.replicas * found.plan.micro_batch
            whole, workload = _prompts.fitted(given, prompts, found.model, found.workload, at_once)
            found = replace(found, workload=workload)
        ran = execute(
            found,
            store,
            nproc=nproc,
            steps=steps,
            warmup=warmup,
            launches=launches,
            check=check,
            prompts=whole,
            tell=_prompts.Shown(len(given) or found.workload.batch).tell if stream else None,
            saved=saved,
            kernels=kernels,
        )
        if ran is None:  # not rank 0 of a world that torchrun or Slurm started: rank 0 answers for all
            return
        report, result = ran
        if prompts:  # what only fills the last round is no answer
            report |= {key: report[key][: len(given)] for key in ("tokens", "texts", "ends")}
        out.data(*run_lines(report, found.workload))
        if answers:
            _prompts.write_answers(answers, _prompts.answers(given, report))
        elif prompts:
            out.data(*_prompts.answers(given, report))
        else:
            out.data(*(f"text       {text!r}" for text in report["texts"]))
        if saved:
            out.data(f"saved      {saved.folder}: the weights after {len(result.losses)} steps")
        out.data(f"stored     run {report['run_id']} in {store.place.shown}")
        out.emit("run", {**report, "db": store.place.shown})
        if trace and result.timeline:
            write_picture(trace, [result.timeline], f"plan {found.plan.id}: {found.plan.describe()}")
            out.say(f"timeline: {trace}")
        if kernels:
            out.say(f"kernels: {kernels}; `autotune explain {target} --view launches --trace {kernels}` reads it")
        out.say(f"next: autotune plot {report['run_id']} shows where the time went")
    if result.equal is False:
        raise WrongNumbers(
            f"plan {found.plan.id} differs from the one-process reference by {result.max_difference:.3g}",
            hint=f"logs of each rank: {result.log_dir}",
        )


def _saved(save: Path, found: Target) -> Saved:
    """The checkpoint that `--save` asks for. Raises UsageError for a generation, a plan without a model's config, and a
    folder that is not free."""
    from autotune.runners.saved import Saved, check_free, config_of

    if found.workload.kind != "train":
        raise UsageError("--save: this plan generates", hint="name a recipe, lock or plan that trains")
    if found.recipe is None:
        raise UsageError("--save: a stored plan has no config for the checkpoint", hint="name the recipe or its lock")
    folder = Path(os.path.realpath(save.expanduser()))
    check_free(folder)
    config = config_of(found.recipe.config(), found.model, found.workload.precision)
    return Saved(str(folder), config)


def _given(target: str, prompts: str | None, answers: str | None, stream: bool, workload: Workload) -> tuple[str, ...]:
    """The prompts of `--prompts`; none without it. Raises UsageError where the options do not go together."""
    from autotune.cli._prompts import read_prompts
    from autotune.spec.recipe import STDIN

    for option, value in (("--prompts", prompts), ("--answers", answers), ("--stream", stream)):
        if value and workload.kind != "generate":
            raise UsageError(f"{option}: this plan trains", hint="name a recipe, lock or plan that generates")
    if answers and not prompts:
        raise UsageError("--answers: to prompts that nobody gave", hint="--prompts FILE, or - for standard input")
    if prompts == STDIN == target:
        raise UsageError("--prompts -: standard input is the recipe already", hint="name a file for one of them")
    return read_prompts(prompts) if prompts else ()
