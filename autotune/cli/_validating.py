"""Choosing what a validation runs or replays, keeping its rows in the database, writing its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.cli import _output as out
from autotune.cli._drawing import write_whole
from autotune.cli._session import at_hand, this_machine
from autotune.spec.errors import EnvironmentFault, Problem, UsageError, nearest_name
from autotune.spec.words import counted

if TYPE_CHECKING:
    from autotune.profiles_db.store import Store
    from autotune.runners.suites import Suite
    from autotune.spec.machine import Profile
    from autotune.spec.plan import Plan
    from autotune.spec.validation import Judgement, Validation

FORMS = (".html", ".md")
BATCH = 50  # published figures between two writes to the database
SECONDS_EACH = 0.1  # for measuring one operation
DEVICES = {"cpu": "processors", "cuda": "NVIDIA GPUs", "rocm": "AMD GPUs"}


@dataclass(frozen=True)
class Asked:
    """The command's own options; None: the suite's own."""

    suite: str
    profile: Path | None = None
    plans: str | None = None
    repeats: int | None = None
    steps: int | None = None
    as_is: bool = False


def list_suites() -> None:
    """Every suite and every published table, a line each."""
    from autotune.planners.replay.tables import TABLES
    from autotune.runners.suites import suites
    from autotune.runners.validating import PAPERS

    known = suites()
    rows = [["suite", "where", "plans", "what"]]
    for name, suite in known.items():
        most = max(plan.world for plan in suite.plans)
        where = f"{most} x {suite.device}"
        rows.append([name, where, str(len(suite.plans)), f"{suite.model.name}, {suite.workload.kind}"])
    rows.append([PAPERS, "anywhere", "", "every published table below"])
    rows += [[name, "anywhere", "", f"{table.title}, with {table.machine}"] for name, table in TABLES.items()]
    out.data(*out.table(rows, right=(2,)))
    listed = [
        {"name": name, "device": s.device, "workers": max(p.world for p in s.plans), "plans": len(s.plans)}
        for name, s in known.items()
    ]
    tables = [{"name": name, "title": table.title, "machine": table.machine} for name, table in TABLES.items()]
    out.emit("validate.list", {"suites": listed, "tables": tables})


def validated(asked: Asked, store: Store, progress: out.Progress) -> tuple[Validation, str]:
    """(the answer, its id in the database).

    UsageError for an unknown suite; EnvironmentFault where the suite is for another kind of machine.
    """
    from autotune.planners.replay.tables import TABLES
    from autotune.runners.suites import suites
    from autotune.runners.validating import PAPERS, chosen_tables

    names = chosen_tables(asked.suite)
    if names:
        _none_of_suites(asked)
        return _published(asked.suite, names, store, progress)
    known = suites()
    if asked.suite not in known:
        every = [*known, PAPERS, *TABLES]
        problem = Problem(
            "--suite", "", repr(asked.suite), "one of " + ", ".join(every), nearest_name(asked.suite, every)
        )
        raise UsageError("no such suite", problems=[problem])
    return _suite(asked, _chosen(known[asked.suite], asked), store, progress)


def _none_of_suites(asked: Asked) -> None:
    """Published figures are not run: what says how is refused."""
    given = {
        "--profile": asked.profile,
        "--plans": asked.plans,
        "--repeats": asked.repeats,
        "--steps": asked.steps,
        "--as-is": asked.as_is,
    }
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option}: of a suite that runs; {asked.suite} are published figures", hint="leave it out"
            )


def _published(name: str, names: Sequence[str], store: Store, progress: out.Progress) -> tuple[Validation, str]:
    """Published figures beside ours, table by table."""
    from autotune.planners.replay.tables import TABLES
    from autotune.profiles_db.cost_model import cost_model_version
    from autotune.runners.validating import groups, of_table, published_question, summaries
    from autotune.spec.validation import Judgement, Validation

    version = cost_model_version()
    entry = store.begin_validation(
        published_question(names, version), suite=name, machine="", profile="", cost_model=version
    )
    kept = [dict(row) for row in entry.visits]
    if kept:
        progress(f"going on after {counted(len(kept), 'row')} that an interrupted validation kept")
    rows = [Judgement.from_dict(row) for row in kept]
    every = [(table, row) for table in names for row in TABLES[table].rows()]
    saved = len(rows)
    try:
        for table, row in every[len(rows) :]:
            rows.append(of_table(table, row))
            if len(rows) % BATCH == 0:
                progress(f"{table}: {len(rows)} of {len(every)} rows")
                store.keep_validation(entry.id, [done.to_dict() for done in rows])
                saved = len(rows)
    except BaseException:
        if len(rows) > saved:
            store.keep_validation(entry.id, [done.to_dict() for done in rows])
        raise
    found = Validation(
        name,
        "the machines of the sources",
        "; ".join(f"{table}: {TABLES[table].machine}" for table in names),
        version,
        tuple(rows),
        tuple(summaries(rows)),
        tuple(groups(rows)),
        notes=_notes(rows),
    )
    return _finished(found, entry.id, store)


def _notes(rows: Sequence[Judgement]) -> tuple[str, ...]:
    fitted = sum(row.fitted for row in rows)
    if not fitted:
        return ("nothing was fitted to any of these rows",)
    return (f"{counted(fitted, 'row')} were fitted to and are not judged; {len(rows) - fitted} are judged",)


def _finished(found: Validation, id: str, store: Store) -> tuple[Validation, str]:
    """The validation with the coverage of bands by its rows, kept."""
    from autotune.profiles_db.bands.coverage import covered
    from autotune.profiles_db.bands.shipped import shipped

    rows, coverage, without = covered(found.rows, [*store.residuals(), *shipped()])
    few = f"{counted(without, 'row has', 'rows have')} no band: too few others rest on the same grade or a weaker one"
    found = replace(found, rows=rows, coverage=coverage, notes=(*found.notes, *([few] if without else [])))
    parts = [part.to_dict() for part in (*found.summaries, *found.groups)]
    parts += [{"kind": "coverage", **part.to_dict()} for part in coverage]
    store.finish_validation(id, [row.to_dict() for row in rows], parts)
    return found, id


def _chosen(suite: Suite, asked: Asked) -> Suite:
    """The suite with the plans and steps that the options choose. UsageError for numbers that it lacks."""
    if asked.plans is not None:
        last = len(suite.plans) - 1
        texts = [text.strip() for text in asked.plans.split(",")]
        wrong = [text for text in texts if not text.isdecimal() or int(text) > last]
        if wrong:
            problem = Problem("--plans", "", repr(wrong[0]), f"numbers from 0 to {last}, such as 0,{last}")
            raise UsageError(f"no such plan in {asked.suite}", problems=[problem])
        suite = replace(suite, plans=tuple(suite.plans[int(text)] for text in dict.fromkeys(texts)))
    return replace(suite, steps=asked.steps or suite.steps)


def _suite(asked: Asked, suite: Suite, store: Store, progress: out.Progress) -> tuple[Validation, str]:
    """The suite's plans, run with workers here in the rounds of `runners.suite`."""
    from autotune.profiles_db.cost_model import cost_model_version
    from autotune.runners.ledger import Ledger
    from autotune.runners.suite import REPEATS, Runner, profiles, refiner
    from autotune.runners.validating import failures, of_suite, suite_question, summaries
    from autotune.spec.digest import digest
    from autotune.spec.validation import Validation

    profile = _profile(asked, suite, store)
    version = cost_model_version()
    repeats = asked.repeats or REPEATS[suite.device]
    facts: dict[str, Any] = {
        # Measuring operations refines a profile: the machine and when it was profiled name it all the same.
        "machine": [profile.fingerprint, profile.name, profile.created, digest(sorted(profile.coefficients.items()))],
        "cost_model": version,
        "repeats": repeats,
        "steps": suite.steps,
        "as_is": asked.as_is,
    }
    entry = store.begin_validation(
        suite_question(asked.suite, suite.plans, facts),
        suite=asked.suite,
        machine=profile.fingerprint,
        profile=profile.name,
        cost_model=version,
    )
    ledger = Ledger(rows=[dict(row) for row in entry.visits], keep=lambda rows: store.keep_validation(entry.id, rows))
    if ledger.rows:
        progress(f"going on after {counted(len(ledger.rows), 'plan')} that an interrupted validation has begun")
        ledger.again()
    # A processor's operations are timed anew before every visit; a GPU's once, and an interruption must not lose them.
    drifts = suite.device == "cpu"
    refine = refiner(suite, profile if drifts else store.refined(profile), progress, SECONDS_EACH, asked.as_is)

    def remembered(plans: Sequence[Plan]) -> Profile:
        found = refine(plans)
        store.save_profile(found)
        return found

    Runner(suite, profiles(suite, refine if drifts else remembered), ledger, repeats).run(progress)
    order = {plan.describe(): number for number, plan in enumerate(suite.plans)}
    ran = sorted(ledger.rows, key=lambda row: order[row["plan"]])
    rows = tuple(of_suite(asked.suite, suite, ran))
    found = Validation(
        asked.suite,
        f"{profile.device.name}, {suite.model.name}",
        f"{profile.name} ({profile.grade})"
        + (", as it is" if asked.as_is else ", operations of the plans measured first"),
        version,
        rows,
        tuple(summaries(rows)),
        failed=failures(ran),
        notes=("no step time of any plan is used by any prediction",),
    )
    return _finished(found, entry.id, store)


def _profile(asked: Asked, suite: Suite, store: Store) -> Profile:
    """The profile of the machine at hand, which must be of the suite's kind and have enough devices."""
    from autotune.profiles_db.facts import has_driver
    from autotune.profiles_db.profile_file import load_profile
    from autotune.runners.world import world_here

    here = world_here()
    if here and here[1] > 1:
        raise EnvironmentFault(
            f"{asked.suite} starts its own workers, and this process is one of a world of {here[1]}",
            hint="run it without torchrun, or `torchrun … -m autotune.runners.suite` for one world that stands",
        )
    most = max(plan.world for plan in suite.plans)
    hint = "`autotune validate --list` says which suite is for which kind of machine"
    if suite.device != "cpu" and not has_driver():
        raise EnvironmentFault(f"{asked.suite}: found no GPU; expected {most} x {DEVICES[suite.device]}", hint=hint)
    profile = load_profile(asked.profile) if asked.profile else this_machine(store)
    device = profile.device
    if device.kind != suite.device:
        found = f"{device.name} ({DEVICES[device.kind]})"
        raise EnvironmentFault(f"{asked.suite}: found {found}; expected {most} x {DEVICES[suite.device]}", hint=hint)
    if suite.device != "cpu" and device.count < most:
        raise EnvironmentFault(
            f"{asked.suite}: found {device.count} x {device.name}; expected {most} of them",
            hint="choose plans that fit with --plans",
        )
    if at_hand(profile) is None:
        raise EnvironmentFault(
            f"{asked.profile or profile.name}: a profile of {device.name}, which is not this machine",
            hint="a suite runs here: `autotune profile` measures this machine; `--suite papers` needs none",
        )
    return profile


def check_reports(files: Sequence[Path]) -> None:
    """Refuse a file whose name says no form that can be written, before any work is done."""
    problems = [
        Problem(
            str(file),
            "",
            f"the ending {file.suffix!r}",
            "one of " + ", ".join(FORMS),
            nearest_name(file.suffix, FORMS),
        )
        for file in files
        if file.suffix not in FORMS
    ]
    if problems:
        raise UsageError("cannot tell how to write the report", problems=problems)
    for file in files:
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: there is no folder {file.parent}")


def write_report(file: Path, found: Validation) -> None:
    """Write the report, whole or not at all."""
    from autotune.report.validation import markdown, page

    write_whole(file, page(found) if file.suffix == ".html" else markdown(found))
