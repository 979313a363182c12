"""Gates of several recipes: each held whatever became of the others, all of them shown, one exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from autotune.cli import _output as out
from autotune.cli._acceptance import known_workload
from autotune.cli._settings import current
from autotune.gate.baseline import parse
from autotune.gate.github import SUMMARY_BYTES, commands, summary
from autotune.gate.junit import junit
from autotune.gate.measured import Asked, gate
from autotune.gate.outcome import Outcome, exit_code, failed
from autotune.gate.predicted import PREDICTED, gate_predicted
from autotune.gate.table import lines
from autotune.spec.errors import AutotuneError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store

SUMMARY = "GITHUB_STEP_SUMMARY"  # the variable that names the file


@dataclass(frozen=True)
class Flags:
    """What the command line says, see cli.gate."""

    predicted: bool
    baseline: str
    update: bool
    launches: int | None
    threshold: float | None
    retries: int | None
    other_machine: bool
    overrides: tuple[str, ...]

    def check(self) -> None:
        """Raises UsageError for flags that do not go together, before anything is read."""
        parse(self.baseline)
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UsageError(
                f"--threshold: found {self.threshold:g}; expected a fraction between 0 and 1", hint="0.03 is 3 %"
            )
        given = {
            "--launches": self.launches is not None,
            "--retries": self.retries is not None,
            "--baseline": self.baseline != "lock",
            "--allow-other-machine": self.other_machine,
        }
        if self.predicted and any(given.values()):
            name = next(name for name, there in given.items() if there)
            raise UsageError(f"{name}: nothing is launched with --predicted", hint="leave one of them out")

    @property
    def asked(self) -> Asked:
        kind, name = parse(self.baseline)
        return Asked(
            kind,
            name,
            self.update,
            self.other_machine,
            self.launches,
            self.threshold,
            self.retries,
            self.overrides,
        )


def hold(recipe: str, flags: Flags, store: Store) -> Outcome:
    """The outcome for one recipe; what cannot be held is one too."""
    began, progress = time.monotonic(), out.Progress(keep=not flags.predicted)

    def tell(text: str) -> None:
        progress(text if flags.predicted else f"{recipe}: {text}")

    try:
        if flags.predicted:
            update, limit = flags.update, flags.threshold
            found = gate_predicted(recipe, flags.overrides, limit, update, store, known_workload, tell)
        else:
            found = gate(recipe, flags.asked, store, tell)
    except AutotuneError as error:
        found = failed(recipe, error, PREDICTED if flags.predicted else "measured")
    finally:
        progress.close()
    return replace(found, wall_s=time.monotonic() - began)


def written(outcomes: Sequence[Outcome], junit_file: Path | None, github: bool) -> None:
    """Everything that was asked for: the table or JSON, and what continuous integrations read."""
    for outcome in outcomes:
        if outcome.plan_id:  # what could not be held is an error and no result
            out.data(*lines(outcome))
    if any(outcome.plan_id for outcome in outcomes) or junit_file or github:
        content = {"exit_code": exit_code(outcomes), "recipes": [outcome.to_dict() for outcome in outcomes]}
        out.emit("gate", content)
    if junit_file:
        _write(junit_file, junit(outcomes))
    if github:
        # Runners read workflow commands from both streams; under --json standard output is the object alone.
        stream = sys.stderr if current().as_json else sys.stdout
        for line in commands(outcomes):
            print(line, file=stream)
        if file := os.environ.get(SUMMARY):
            _append(Path(file), outcomes)


def _append(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Adds the summary to what earlier commands of the step have written, as far as there is room."""
    try:
        room = SUMMARY_BYTES - (file.stat().st_size if file.exists() else 0)
        with file.open("a") as summary_file:
            summary_file.write(summary(outcomes, max(0, room)) if room > 0 else "")
    except OSError as error:
        raise EnvironmentFault(f"{file}: cannot write the step's summary: {error.strerror}") from None


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise EnvironmentFault(f"{file}: cannot write the JUnit file: {error.strerror}") from None


def leave(outcomes: Sequence[Outcome], fail: Callable[[str, str | None], None]) -> None:
    """Says what failed and ends with the worst code."""
    for outcome in outcomes:
        if outcome.exit_code:
            held = f"{outcome.recipe}: {outcome.verdict}: " if outcome.plan_id else ""
            fail(f"{held}{outcome.message}", outcome.hint or None)
        elif outcome.hint:
            out.say(f"{outcome.recipe}: {outcome.hint}")
    if code := exit_code(outcomes):
        raise typer.Exit(code)
