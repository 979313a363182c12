"""The plan database: what every command remembers with and looks up in.

`Store` takes a path or any SQLAlchemy URL and is used as a context manager. Nothing in it is executed or unpickled:
rows hold text and numbers, structured values are JSON. SQLAlchemy is imported when a store is opened, not before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.profiles_db.answers import Answers
from autotune.profiles_db.bands.kept import Residuals
from autotune.profiles_db.basis import Versions
from autotune.profiles_db.cost_model import cost_model_version, installed
from autotune.profiles_db.records import Asked, Origin, PlanEntry, ProfileEntry, RunEntry, SearchEntry
from autotune.profiles_db.validations import Validations
from autotune.spec import timeline_file
from autotune.spec.errors import UsageError, nearest_name
from autotune.spec.lock import Launch
from autotune.spec.machine import Profile
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.prediction import Found, Prediction, Question
from autotune.spec.timeline import Timeline
from autotune.spec.workload import Acceptance, Workload

ATTEMPTS = 5  # of a write whose row number another server session took first


class Store(Answers, Residuals, Validations):
    """The methods of an open `Database` that remember and look up. Digests are hexadecimal sha256, times UTC text.

    A prefix of an id or digest serves wherever one is asked for, if it names one thing only: else UsageError.
    """

    # --- machines and their profiles

    def save_profile(self, profile: Profile) -> str:
        """Remember a profile and its machine; its digest. The same content again only becomes the newest."""
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.save_profile(session, profile)

    def find_profile(self, name: str) -> Profile | None:
        """The newest profile with this name, machine fingerprint or digest (or 6 or more of its digits), or None."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.profile(session, name, self.place.shown)

    def refined(self, base: Profile) -> Profile:
        """`base` with every work that was measured for it since, as the newest stored profile has them."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.refined(session, base, self.place.shown)

    def profile(self, name: str) -> Profile:
        """As `find_profile`; UsageError with the nearest stored name when there is none."""
        found = self.find_profile(name)
        if found is not None:
            return found
        stored = self.profiles()
        near = nearest_name(name, [entry.name for entry in stored] + [entry.fingerprint for entry in stored])
        raise UsageError(
            f"machine profile: found {name!r}; expected a name or fingerprint stored in {self.place.shown}",
            hint=f"nearest: {near}" if near else "autotune profile measures this machine and stores it",
        )

    def profiles(self) -> list[ProfileEntry]:
        """All stored profiles, newest first, without their samples."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.profiles(session)

    # --- how often proposed tokens are kept

    def save_acceptance(self, conditions: str, model: ModelSpec, found: Acceptance, facts: Mapping[str, Any]) -> None:
        """Remember an acceptance; a newer one replaces an older."""
        from autotune.profiles_db import writes

        with self._writing() as session:
            writes.save_acceptance(session, conditions, model, found, facts)

    def acceptances(self, conditions: str) -> tuple[Acceptance, ...]:
        """Every acceptance that was measured under these conditions."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.acceptances(session, conditions)

    # --- what is asked: models, workloads, recipes, plans

    def save_model(self, model: ModelSpec) -> str:
        """Remember a model; its digest."""
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.save_model(session, model)

    def save_workload(self, workload: Workload) -> str:
        """Remember a workload; its digest."""
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.save_workload(session, workload)

    def save_recipe(self, path: str, merged: Mapping[str, Any]) -> str:
        """Remember a merged recipe (JSON values only) and where it was read; the digest of `merged`."""
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.save_recipe(session, path, merged)

    def save_plan(self, plan: Plan) -> str:
        """Remember a plan; its full digest, whose first ten digits are its id."""
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.save_plans(session, [plan])[0]

    def plan(self, prefix: str) -> Plan:
        """The plan whose id or digest begins with `prefix`; UsageError when none or several do."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.plan(session, prefix, self.place.shown)

    def origin(self, prefix: str) -> Origin:
        """The plan with the model, workload, profile and devices that it was last predicted (or else run) for."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.origin(session, prefix, self.place.shown)

    def plans(
        self,
        limit: int = 20,
        *,
        top: int = 5,
        model: str = "",
        kind: str = "",
        search: str = "",
        measured: bool = False,
    ) -> list[PlanEntry]:
        """At most `limit` predicted plans: the latest question first, in each the `top` fastest (0: all).

        `model` (name or digest), workload `kind`, `search` (digest or prefix) and `measured` (or run) ones only.
        """
        from autotune.profiles_db import queries, tables

        with self._reading() as session:
            if search:
                search = queries.resolve(session, tables.Search.digest, search, "search", self.place.shown)
            return queries.plans(session, limit, Asked(top, model, kind, search, measured))

    def count_plans(self, *, top: int = 0, model: str = "", measured: bool = False) -> int:
        """How many plans `plans` lists without a limit."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.count_plans(session, Asked(top, model, measured=measured))

    # --- searches

    def start_search(self, question: Question, versions: Versions | None = None) -> str:
        """Begin or resume the search that `question` names; its digest, which no budget changes.

        Remembers the question's model, workload and profile too. `versions` are part of what is asked; None: those of
        the installed source, with no libraries of a machine at hand.
        """
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.start_search(session, question, versions or installed())

    def finish_search(
        self, search: str, found: Found | None, *, recipe: str = "", launches: Sequence[Launch] = ()
    ) -> str:
        """Close a search with its answer: finished, or interrupted when `found` is None or says so. When it was, as
        ISO-8601 UTC text.

        `recipe` is the name of the recipe that asked, `launches` those of the best plan where it was measured.
        """
        from autotune.profiles_db import writes

        with self._writing() as session:
            return writes.finish_search(session, search, found, recipe, launches)

    def remember_predictions(
        self, search: str, predictions: Sequence[Prediction], *, cost_model: str | None = None
    ) -> None:
        """Keep a batch in one transaction: all of it or, if the process dies, nothing of it.

        `cost_model` names the version that predicted; None: that of the installed source.
        """
        from autotune.profiles_db import writes

        for prediction in predictions:
            _finite(prediction.step_s, f"step_s of plan {prediction.plan.id}")
        with self._writing() as session:
            writes.remember_predictions(session, search, predictions, cost_model or cost_model_version())

    def known(self, search: str, *, cost_model: str | None = None) -> dict[str, float]:
        """Plan id to predicted step seconds, for every plan already predicted for this search's model, workload,
        profile and devices by this version of the cost model: what resuming need not simulate again."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.known(session, search, cost_model or cost_model_version())

    def predictions(self, search: str, limit: int = 0, *, cost_model: str | None = None) -> list[Prediction]:
        """The predictions behind `known`, fastest first, at most `limit` (0: all). Timelines are not kept."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.predictions(session, search, cost_model or cost_model_version(), limit)

    def remember_measured(self, search: str, plan: Plan, seconds: float) -> int:
        """Add one measured step time of a plan; how many the search now has of it."""
        from sqlalchemy.exc import IntegrityError

        from autotune.profiles_db import writes

        _finite(seconds, f"seconds of plan {plan.id}")
        for attempt in range(ATTEMPTS):
            try:
                with self._writing() as session:
                    return writes.remember_measured(session, search, plan, seconds)
            except IntegrityError:  # on a shared server another searcher took this number: take the next
                if attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def measured(self, search: str) -> dict[str, float]:
        """Plan id to the median of the step seconds that this search measured."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.measured(session, search)

    def measured_alike(self, search: str) -> dict[str, float]:
        """As `measured`, with what other searches measured for the same model and workload on the same machine: what
        resuming need not run again, though the machine's profile has been refined or the axes changed since. What was
        measured with other versions of libraries or of our executor does not count."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.measured_alike(session, search)

    def searches(self, limit: int = 20) -> list[SearchEntry]:
        """Searches, last touched first."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.searches(session, limit, "", self.place.shown)

    def search(self, prefix: str) -> SearchEntry:
        """The search whose digest begins with `prefix`; UsageError when none or several do."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.searches(session, 1, prefix, self.place.shown)[0]

    # --- runs

    def start_run(
        self,
        plan: Plan,
        model: ModelSpec,
        workload: Workload,
        *,
        machine: str,
        facts: Mapping[str, Any] | None = None,
        recipe: str | None = None,
        git_sha: str = "",
        environment: Mapping[str, Any] | None = None,
        prediction: Prediction | None = None,
    ) -> str:
        """Open a run with status running; its id.

        `machine` is the fingerprint of where it runs, `facts` what is known of that machine where no profile said,
        `recipe` the digest from save_recipe, `environment` versions and variables worth keeping (JSON values).
        """
        from autotune.profiles_db import records, writes

        said = None
        if prediction is not None:
            said = records.prediction_body(prediction)
            said |= {"step_s": prediction.step_s, "peak_bytes": list(prediction.peak_bytes)}
        with self._writing() as session:
            writes.save_machine(session, machine, "", facts or {})
            row = {
                "plan": writes.save_plans(session, [plan])[0],
                "model": writes.save_model(session, model),
                "workload": writes.save_workload(session, workload),
                "machine": writes.clean(machine),
                "recipe": recipe,
                "git_sha": git_sha,
                "environment": dict(environment or {}),
                "prediction": said,
            }
            return writes.start_run(session, row)

    def add_launch(self, run: str, steps: Sequence[float], *, log_dir: str = "", started: str = "") -> int:
        """Add one launch of all workers with its timed steps in seconds; its number, from 0."""
        from autotune.profiles_db import writes

        for seconds in steps:
            _finite(seconds, f"a step of run {run}")
        with self._writing() as session:
            return writes.add_launch(session, run, steps, log_dir, started)

    def finish_run(
        self,
        run: str,
        *,
        status: str = "finished",
        losses: Sequence[float] = (),
        peak_bytes: Sequence[int] = (),
        mfu: float | None = None,
        tokens_per_s: float | None = None,
        equal: bool | None = None,
        max_difference: float | None = None,
        error: str | None = None,
        facts: Mapping[str, Any] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """Close a run: status finished, failed or interrupted, with what it measured.

        `peak_bytes` is a rank's each. A loss that is not finite is kept as None, a NaN difference as infinity. The
        timeline goes to a compressed file beside the database, written before the row that names it.
        """
        from autotune.profiles_db import artefacts, tables, writes

        if status not in writes.STATES[1:]:
            raise ValueError(f"status {status!r}: expected one of {', '.join(writes.STATES[1:])}")
        kept = None
        if timeline is not None:
            digest, size = artefacts.put(self.place.files, timeline_file.to_dict(timeline))
            kept = {"digest": digest, "kind": "timeline", "size": size, "created": writes.now()}
        with self._writing() as session:
            row = writes.running(session, run)
            if kept:
                writes.put(session, tables.Artefact, [kept])
                row.timeline = str(kept["digest"])
            row.status, row.finished, row.error = status, writes.now(), writes.clean(error) if error else None
            row.losses, row.peak_bytes = [float(loss) for loss in losses], [int(size) for size in peak_bytes]
            row.mfu, row.tokens_per_s = _number(mfu), _number(tokens_per_s)
            row.equal = None if equal is None else int(equal)
            unequal = max_difference is not None and math.isnan(max_difference)
            row.max_difference = math.inf if unequal else max_difference
            row.facts = dict(facts or {})

    def runs(self, limit: int = 20, *, plan: str = "") -> list[RunEntry]:
        """Runs, newest first, with their launches and steps; `plan` (id prefix) keeps those of one plan."""
        from autotune.profiles_db import queries, tables

        with self._reading() as session:
            if plan:
                plan = queries.resolve(session, tables.PlanRow.digest, plan, "plan", self.place.shown)
            return queries.runs(session, limit, plan)

    def marked_runs(self, plan: Plan, mark: str) -> list[RunEntry]:
        """Finished runs of a plan whose facts say that `mark` is true, newest first."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.marked_runs(session, plan.digest, mark)

    def run(self, prefix: str) -> RunEntry:
        """The run whose id begins with `prefix`; UsageError when none or several do."""
        from autotune.profiles_db import queries

        with self._reading() as session:
            return queries.run(session, prefix, self.place.shown)

    def timeline(self, prefix: str) -> Timeline | None:
        """The measured timeline of a run, or None where none was kept."""
        from autotune.profiles_db import artefacts

        digest = self.run(prefix).timeline
        if digest is None:
            return None
        raw = artefacts.get(self.place.files, digest)
        return timeline_file.from_dict(raw, str(artefacts.where(self.place.files, digest)))

    # --- copies for other tools

    def export(self, form: str, target: str | os.PathLike[str]) -> Path:
        """Write everything to `target`: "json" one file, "csv" a folder, "sqlite" a database. Never overwrites."""
        from autotune.profiles_db import exporting

        return exporting.export(self.engine, self.place.shown, self.place.files, form, Path(target))

    def export_optuna(self, target: str | os.PathLike[str], search: str = "", *, best: int = 1000) -> list[str]:
        """Write a search (digest or prefix; "": the last one) as Optuna studies to a new SQLite file; their names.

        The `best` predicted plans (0: all) and every measured trial.
        """
        from autotune.profiles_db import exporting

        if not search:
            last = self.searches(1)
            if not last:
                raise UsageError(f"{self.place.shown}: there is no search to export", hint="autotune search makes one")
            search = last[0].digest
        with self._reading() as session:
            return exporting.export_optuna(session, Path(target), self.search(search).digest, best)


def _finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what}: found {value}; expected a finite number")


def _number(value: float | None) -> float | None:
    """SQLite keeps NaN as null anyway; say so for every database."""
    return None if value is None or math.isnan(value) else float(value)
