"""The measured gate of one recipe: its locked plan launched beside its baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from autotune.gate import revision
from autotune.gate.baseline import DB, GIT, MARK, Baseline, of_database, of_lock
from autotune.gate.calm import Watch
from autotune.gate.checks import OK, UNEQUAL, Check, losses, memory, tokens, tokens_digest
from autotune.gate.outcome import CODES, REPORTED, UPDATED, Outcome, whole
from autotune.gate.rule import IMPROVED, INCONCLUSIVE, PASS, REGRESSED
from autotune.gate.sides import Measured, Rule, Side, measure, measure_one
from autotune.gate.subject import Locked, Subject, drifted, locked, subject
from autotune.runners.launch import WORKER, launch
from autotune.runners.provenance import environment, git_revision
from autotune.runners.world import world_here
from autotune.spec.errors import AutotuneError, UsageError
from autotune.spec.lock import Launch, write_lock

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.runners.job import RunResult

TIMEOUT_S = 1800.0  # of one launch


@dataclass(frozen=True)
class Asked:
    """What the command line says; None: as the recipe's `[gate]`. `worker`: what is launched, see runners.launch."""

    kind: str = "lock"  # of baseline
    name: str = ""  # of its run or revision
    update: bool = False
    other_machine: bool = False
    launches: int | None = None
    threshold: float | None = None
    retries: int | None = None
    overrides: tuple[str, ...] = ()
    worker: tuple[str, ...] = (WORKER,)
    watch: Callable[[], Watch] = field(default=Watch)

    def rule(self, found: Locked) -> Rule:
        """The rule under flags and `[gate]`."""
        given = {"launches": self.launches, "threshold": self.threshold, "retries": self.retries}
        settings: Mapping[str, Any] = {key: found.settings[key] if one is None else one for key, one in given.items()}
        return Rule(**settings, seed=found.recipe.seed)


@dataclass
class Launching:
    """This side, launched from here, every launch stored as it ends."""

    subject: Subject
    store: Store
    run: str
    worker: Sequence[str] = (WORKER,)
    count: int = 0

    def __call__(self) -> Launch:
        result = self.launch(self.subject.job)
        self.store.add_launch(self.run, result.step_s, log_dir=result.log_dir)
        return Launch(
            result.step_s,
            result.peak_bytes,
            self.run,
            tuple(loss if math.isfinite(loss) else None for loss in result.losses),
            tokens_digest(result.tokens),
        )

    def launch(self, job: Any) -> RunResult:
        """One launch of all workers, in a folder of its own."""
        folder = self.store.place.files / "logs" / self.run / str(self.count)
        self.count += 1
        return launch(job, nproc=job.plan.world, log_dir=folder, timeout_s=TIMEOUT_S, worker=self.worker)

    def checked(self) -> RunResult:
        """One that the one-process reference judges."""
        return self.launch(replace(self.subject.job, check=True))


def gate(path: str, asked: Asked, store: Store, tell: Callable[[str], None] = lambda text: None) -> Outcome:
    """Holds the gate. Raises AutotuneError where it cannot be held: nothing of that is a pass."""
    if world_here() is not None:
        raise UsageError("a gate starts its own workers: this is a world that is already there")
    found = locked(path, asked.overrides)
    here = subject(found, store, asked.other_machine)
    rule = asked.rule(found)
    if asked.update:
        return _update(here, asked, rule, store, tell)
    with ExitStack() as kept:
        base: Side | Sequence[Launch]
        notes: tuple[str, ...] = tuple(drifted(here))
        if asked.kind == GIT:
            beside = kept.enter_context(revision.checked_out(asked.name, here))
            notes += beside.notes
        else:
            stored: Baseline = (
                of_database(here, store, asked.name, asked.other_machine) if asked.kind == DB else of_lock(found)
            )
        run = _started(here, store)
        launching = Launching(here, store, run, asked.worker)
        try:
            if asked.kind == GIT:
                place = store.place.files / "logs" / run
                sides = [(revision.this(here), place / "this"), (beside, place / "baseline")]
                new, base = (revision.command_side(one, here, where, asked.overrides) for one, where in sides)
                said, found_all = beside.said, measure(_stored(new, store, run), base, rule, asked.watch(), tell)
            else:
                said, found_all = stored.said, measure(launching, stored.launches, rule, asked.watch(), tell)
            checks = _checks(found_all, here, launching)
            outcome = _judged(found_all, checks, here, rule, said, asked.other_machine)
        except BaseException as error:
            _failed(store, run, error)
            raise
    _finished(store, run, found_all.new, {"gate": outcome.verdict, "said": said})
    return replace(outcome, notes=notes, run_id=run)


def _judged(
    found: Measured, checks: tuple[Check, ...], here: Subject, rule: Rule, said: str, report_only: bool
) -> Outcome:
    """The verdict in words, with its code."""
    kind = REPORTED if report_only else whole(found.kind, checks)
    sentences = {
        INCONCLUSIVE: found.why,
        PASS: "no slower",
        IMPROVED: f"faster than the baseline: `autotune gate {here.locked.recipe.path} --update` keeps it",
        REGRESSED: f"slower than the baseline by more than {rule.threshold:.1%}",
    }
    wrong = [f"{check.name}: {check.said}" for check in checks if whole(PASS, [check]) != PASS]
    parts = [*wrong, *([sentences[found.kind]] if not wrong or found.kind != PASS else [])]
    message = "; ".join(parts)
    if found.found and found.kind != INCONCLUSIVE:
        message += f" ({found.found.ratio - 1:+.1%}, {found.found.low - 1:+.1%} to {found.found.high - 1:+.1%})"
    if report_only:
        message = (
            f"another machine's baseline, so nothing is judged; it would be: {whole(found.kind, checks)}, {message}"
        )
    hint = ""
    if kind == INCONCLUSIVE:
        hint = "make the machine quiet, or give --launches or --retries more"
    return Outcome(
        here.locked.recipe.path,
        kind,
        CODES[kind],
        message,
        hint=hint,
        plan_id=here.job.plan.id,
        baseline=said,
        threshold=rule.threshold,
        found=found.found,
        new=found.new,
        base=found.base,
        set_aside=found.set_aside,
        checks=checks,
    )


def _checks(found: Measured, here: Subject, launching: Launching) -> tuple[Check, ...]:
    """The exact checks; of answers that are other tokens than the baseline's the one-process reference has the last
    word: choices between tokens as good as each other may fall either way."""
    if not found.new or not found.base:
        return ()
    checks = [memory(found.new, found.base), losses(found.new, found.base, here.job.workload.precision)]
    answers = tokens(found.new, found.base)
    if answers and answers.state == UNEQUAL:
        judged = launching.checked()
        off = judged.max_difference or 0.0
        state, word = (OK, "within") if judged.equal else (UNEQUAL, "not within")
        answers = Check(answers.name, state, f"{answers.said}; {word} the reference's bound ({off:.2g} off)")
    return tuple(check for check in (*checks, answers) if check is not None)


def _update(here: Subject, asked: Asked, rule: Rule, store: Store, tell: Callable[[str], None]) -> Outcome:
    """Measures this side and writes it as the baseline; what was one is left where the machine is not fit for it."""
    if asked.kind == GIT or asked.name:
        raise UsageError("--update writes the lock's or the database's baseline", hint="--baseline lock, or db")
    if asked.other_machine:
        raise UsageError("--update: a baseline is of the lock's own machine", hint="leave --allow-other-machine out")
    run = _started(here, store)
    try:
        found = measure_one(Launching(here, store, run, asked.worker), rule, asked.watch(), tell)
    except BaseException as error:
        _failed(store, run, error)
        raise
    done = bool(found.new)
    _finished(store, run, found.new, {MARK: done and asked.kind == DB, "gate": UPDATED if done else INCONCLUSIVE})
    path, written = here.locked.recipe.path, found.kind or UPDATED
    common: dict[str, Any] = {"plan_id": here.job.plan.id, "threshold": rule.threshold, "run_id": run}
    if not done:
        hint = "make the machine quiet; the old baseline stays"
        return Outcome(path, INCONCLUSIVE, CODES[INCONCLUSIVE], found.why, hint=hint, **common)
    where = f"run {run} in {store.place.shown}"
    if asked.kind != DB:
        where = str(here.locked.file)
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        write_lock(here.locked.file, replace(here.locked.lock, measured=found.new, measured_at=moment))
    assert found.found is not None
    notes = []
    if found.found.half_width > rule.threshold:
        notes.append(f"launches differ so much ({found.found.half_width:.1%}) that gates may be inconclusive")
    message = f"the new baseline is in {where}"
    return Outcome(path, written, CODES[written], message, baseline=where, new=found.new, notes=tuple(notes), **common)


def _stored(side: Side, store: Store, run: str) -> Side:
    """The side, its launches kept under the gate's run."""

    def launch_it() -> Launch:
        found = side()
        store.add_launch(run, found.step_s)
        return replace(found, run_id=run)

    return launch_it


def _started(here: Subject, store: Store) -> str:
    """A run of the database for the launches of this side."""
    facts, recipe = here.facts, here.locked.recipe
    return store.start_run(
        here.job.plan,
        here.job.model,
        here.job.workload,
        machine=facts.fingerprint,
        facts={"name": facts.name, "kind": facts.kind, "count": facts.count, "software": dict(facts.software)},
        recipe=store.save_recipe(recipe.path, recipe.merged()),
        git_sha=git_revision(),
        environment={"variables": environment(), "software": dict(facts.software)},
    )


def _finished(store: Store, run: str, launches: Sequence[Launch], facts: Mapping[str, Any]) -> None:
    first = launches[0] if launches else Launch(())
    known = [loss if loss is not None else math.nan for loss in first.losses]
    peaks = [max(of_rank) for of_rank in zip(*(one.peak_bytes for one in launches), strict=True)]
    store.finish_run(run, losses=known, peak_bytes=peaks, facts={**facts, "tokens": first.tokens})


def _failed(store: Store, run: str, error: BaseException) -> None:
    status = "failed" if isinstance(error, AutotuneError) else "interrupted"
    store.finish_run(run, status=status, error=str(error) or type(error).__name__)
