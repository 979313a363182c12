"""Which timelines belong to a plan or run, and writing them in the form that a file's name asks for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli import _output as out
from autotune.cli._execution import predict_target
from autotune.cli._target import Target, find_target, of_run
from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name

if TYPE_CHECKING:
    from autotune.profiles_db.records import RunEntry
    from autotune.profiles_db.store import Store
    from autotune.spec.plan import Plan
    from autotune.spec.timeline import Timeline

FORMS = (".html", ".json", ".svg")


def check_picture(file: Path, forms: Sequence[str] = FORMS) -> None:
    """Refuse a file whose name says no form that can be written, before any work is done."""
    if file.suffix not in forms:
        near = nearest_name(file.suffix, forms)
        problem = Problem(str(file), "", f"the ending {file.suffix!r}", "one of " + ", ".join(forms), near)
        raise UsageError("cannot tell how to draw", problems=[problem])
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")


def write_picture(file: Path, timelines: Sequence[Timeline], title: str) -> None:
    """Write the timelines: a page, a Perfetto trace or an SVG."""
    from autotune.report.plot import html, perfetto, svg

    match file.suffix:
        case ".html":
            text = html(timelines, title)
        case ".json":
            text = json.dumps(perfetto(timelines))
        case _:
            text = svg(timelines, title)
    write_whole(file, text)


def write_whole(file: Path, text: str) -> None:
    """Write the file whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise EnvironmentFault(f"{file}: cannot be written: {error.strerror}") from None


def everywhere(timeline: Timeline, plan: Plan) -> Timeline:
    """A predicted timeline of pipeline ranks over all ranks of the world: their peers do the same at the same time."""
    from autotune.planners.lower.expand import coordinates, expand
    from autotune.spec.timeline import Timeline

    of = [coordinates(plan, rank)[0] for rank in range(plan.world)]
    by_rank = [[span for span in timeline.spans if span.rank == p] for p in range(timeline.program.world)]
    return Timeline(
        timeline.kind,
        expand(timeline.program, plan),
        tuple(span._replace(rank=rank) for rank, p in enumerate(of) for span in by_rank[p]),
        [timeline.memory[p] for p in of],
        tuple(timeline.sent[p] for p in of),
        timeline.facts,
    )


def timelines_of(
    text: str, overrides: Sequence[str], pins: Sequence[str], store: Store, predicted_only: bool
) -> tuple[str, str, list[Timeline]]:
    """(a name for the file, a title, the timelines) of a target or of a stored run.

    The measured timeline of a plan is that of its newest run that kept one for the same model and workload.
    """
    run = _run(text, store)
    if run is not None:
        measured = store.timeline(run.id)
        target = of_run(text, run, store)
    else:
        target = find_target(text, overrides, pins, store)
        measured = measured_timeline(target, store) if not predicted_only else None
    prediction = predict_target(target)
    lines = [prediction.timeline] if prediction and prediction.timeline else []
    if measured is not None and not predicted_only:
        lines = [*(everywhere(line, target.plan) for line in lines), measured]
    if not lines:
        raise UsageError(f"{text}: neither a predicted nor a measured timeline is kept for it")
    if len(lines) == 1 and not predicted_only:
        out.detail("only one of predicted and measured is known")
    return target.plan.id, f"{target.model.name}: plan {target.plan.id}, {target.plan.describe()}", lines


def _run(text: str, store: Store) -> RunEntry | None:
    """The stored run that `text` names; None where it is something else."""
    if not re.fullmatch(r"[0-9a-f]{4,10}", text):
        return None
    try:
        return store.run(text)
    except UsageError:
        return None


def measured_timeline(target: Target, store: Store) -> Timeline | None:
    """The timeline of the newest run of the target's plan, model and workload that kept one."""
    try:
        runs = store.runs(20, plan=target.plan.digest)
    except UsageError:  # the plan is not in the database
        return None
    for run in runs:
        if run.timeline and run.model == target.model and run.workload == target.workload:
            return store.timeline(run.id)
    return None
