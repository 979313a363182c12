"""What `autotune export` hands over: a target as an engine's job, and what came of it as lines and as JSON."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autotune.spec.errors import InfeasibleError, Problem, UsageError, nearest_name

if TYPE_CHECKING:
    from autotune.cli._target import Target
    from autotune.export.served import Export
    from autotune.planners.by_batch import AtBatch
    from autotune.spec.plan import Plan

STEPS = 1000  # of training, where nobody says how many
NUMBER = re.compile(r"[1-9][0-9]{0,4}")  # sequences of a batch


@dataclass(frozen=True)
class Handed:
    """A plan in an engine's words. `notes`: what to know beside what the engine cannot express."""

    engine: str
    plan: Plan
    model: str
    export: Export
    notes: tuple[str, ...]
    draft: str = ""
    table: tuple[AtBatch, ...] = ()

    @property
    def command(self) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(self.export.arguments)

    def lines(self) -> Iterator[str]:
        """What there is to say of it."""
        for lost in self.export.lost:
            yield f"not expressed: {lost}"
        if self.table and not self.export.table:
            yield "tokens to propose, by sequences of a replica:"
            for row in self.table:
                gives = f"{row.tokens_per_s:.0f} tokens/s predicted, plain {row.plain_tokens_per_s:.0f}"
                yield f"# {row.batch}: {row.speculate} ({gives})"
        if self.export.file:
            yield f"note: the text is {self.export.file}; the command is {self.command}"
        yield from (f"note: {note}" for note in self.notes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "plan": self.plan.to_dict(),
            "plan_id": self.plan.id,
            "model": self.model,
            "draft": self.draft or None,
            "command": self.command,
            "arguments": list(self.export.arguments),
            "file": self.export.file or None,
            "text": self.export.text or None,
            "not_expressed": [asdict(lost) for lost in self.export.lost],
            "table": [asdict(row) for row in self.table],
            "table_in_command": self.export.table,
            "notes": list(self.notes),
        }


def checked_engine(name: str) -> None:
    """Raises UsageError for an engine that nobody has written down."""
    from autotune.export.engines import ENGINES, TRAINERS

    if name not in (every := {**ENGINES, **TRAINERS}):
        known = "one of " + ", ".join(sorted(every))
        problem = Problem("--to", "", repr(name), known, nearest_name(name.lower(), every))
        raise UsageError("cannot tell what to export to", problems=[problem])


def parse_batches(text: str) -> tuple[int, ...]:
    """The numbers of `--batches`, sorted, each once."""
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not NUMBER.fullmatch(word)]:
        expected = "whole numbers from 1 to 99999 with commas between them"
        raise UsageError("cannot read the batches", problems=[Problem("--batches", "", repr(wrong[0]), expected)])
    return tuple(sorted({int(word) for word in words}))


def checked_target(target: Target, engine: str) -> Target:
    """The target, of a plan that can run and that the engine's kind does. Raises UsageError and InfeasibleError."""
    from autotune.export.engines import ENGINES, TRAINERS
    from autotune.planners.feasible import why_not
    from autotune.spec.heads import HeadsSpec

    trains = target.workload.kind == "train"
    if engine not in (table := TRAINERS if trains else ENGINES):
        found, other = ("trains", "generates") if trains else ("generates", "trains")
        known = "one of " + ", ".join(sorted(table))
        problem = Problem("--to", "", f"{engine}, which {other}", known, min(table))
        raise UsageError(f"{target.shown}: this plan {found}", problems=[problem])
    if isinstance(target.model, HeadsSpec):
        problem = Problem(target.shown, "model", target.model.architecture, "a model: no engine trains decoding heads")
        raise UsageError(f"{target.shown}: not expressed by any engine", problems=[problem])
    if reason := why_not(target.model, target.workload, target.plan, target.devices):
        raise InfeasibleError(f"plan {target.plan.describe()}: {reason}")
    return target


def exported(target: Target, engine: str, batches: tuple[int, ...]) -> Handed:
    """The target in an engine's words."""
    if target.workload.kind == "train":
        return _trained(target, engine)
    return _served(target, engine, batches)


def _trained(target: Target, engine: str) -> Handed:
    from autotune.export.engines import TRAINERS
    from autotune.export.trained import NODE, TrainJob

    links = target.profile.links if target.profile else ()
    node = links[0].size if links and links[0].size else NODE
    recipe = target.recipe
    checkpoint, steps = (recipe.checkpoint, recipe.steps) if recipe else ("", 0)
    job = TrainJob(target.plan, target.workload, target.model, checkpoint, steps or STEPS, node)
    export = TRAINERS[engine](job)
    notes = () if steps else (f"the plan names no number of steps: {STEPS} stand there",)
    return Handed(engine, target.plan, checkpoint or target.model.name, export, (*notes, *export.notes))


def _served(target: Target, engine: str, batches: tuple[int, ...]) -> Handed:
    """The target in an engine's words, with the table of tokens by batch where one can be predicted."""
    from autotune.export.engines import ENGINES
    from autotune.export.served import Job, name_of, served
    from autotune.planners.by_batch import MEMORY_FRACTION, by_batch
    from autotune.planners.decoding.strategies import STRATEGIES, unknown
    from autotune.spec.plan import PLAIN

    plan, workload, recipe = target.plan, target.workload, target.recipe
    notes = []
    if not (recipe and recipe.checkpoint):
        notes.append(f"{name_of(target.model, '')} is the model's name: the plan names no checkpoint")
    draft = workload.draft if STRATEGIES[plan.decoding].draft else None
    if draft and not (recipe and recipe.draft_checkpoint):
        notes.append(f"{name_of(draft, '')} is the draft model's name: the plan names no checkpoint of it")
    there = served(plan)
    table: tuple[AtBatch, ...] = ()
    if there.decoding != PLAIN and target.profile is None:
        notes.append("no table of tokens by batch: no machine profile is stored for this plan")
    elif there.decoding != PLAIN and (reason := unknown(there, workload)):
        notes.append(f"no table of tokens by batch: {reason}")
    elif there.decoding != PLAIN and target.profile:
        fraction = recipe.file.objective.limits.memory_fraction if recipe else MEMORY_FRACTION
        table = by_batch(there, target.model, workload, target.profile, batches, fraction)
        if missing := sorted(set(batches) - {row.batch for row in table}):
            notes.append("not in the table, as they do not fit: batches of " + ", ".join(map(str, missing)))
    job = Job(
        plan,
        workload,
        name_of(target.model, recipe.checkpoint if recipe else ""),
        name_of(draft, recipe.draft_checkpoint if recipe else "") if draft else "",
        table,
    )
    export = ENGINES[engine](job)
    return Handed(engine, plan, job.model, export, (*notes, *export.notes), job.draft, job.table)
