"""The other side as another revision: checked out beside this one, run with its own code, its own recipe and lock.

Each side is a command of its own, `autotune run` with the plan's axes pinned, so that a revision need not know this
gate; both sides are started alike. Where the repository does not hold autotune itself, both sides run with the
installed one and differ in recipe and lock alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import autotune
from autotune.gate.checks import tokens_digest
from autotune.gate.sides import Side
from autotune.gate.subject import WARMUP, Subject
from autotune.profiles_db.profile_file import dump_profile
from autotune.spec.errors import EnvironmentFault, Problem, RunError, UsageError, nearest_name
from autotune.spec.lock import Launch, load_lock, lock_path
from autotune.spec.plan import Plan

TIMEOUT_S = 3600.0  # of one launch


@dataclass(frozen=True)
class Revision:
    """A checkout beside ours. `code`: the folder that holds its autotune; `plan`: what its own lock says, where it has
    one, else the plan that is gated."""

    said: str
    code: Path
    recipe: Path
    plan: Plan
    notes: tuple[str, ...] = ()


def git(folder: Path, *words: str) -> str:
    """What a git command prints. Raises UsageError with its own last words."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except OSError as error:
        raise UsageError(f"--baseline git: git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        raise UsageError(f"--baseline git: {said}", hint=" ".join(command))
    return done.stdout.strip()


def top(folder: Path) -> Path:
    """The root of the repository that a recipe is in."""
    return Path(git(folder, "rev-parse", "--show-toplevel"))


def commit(folder: Path, ref: str) -> str:
    """The commit that `ref` names. Raises UsageError with the nearest branch or tag."""
    if not ref.startswith("-"):
        try:
            return git(folder, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        except UsageError:
            pass
    names = git(folder, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes")
    problem = Problem("--baseline", "git", repr(ref), "a commit, branch or tag", nearest_name(ref, names.split()))
    raise UsageError("no such revision", hint="a shallow clone may lack it: fetch it first", problems=[problem])


@contextmanager
def checked_out(ref: str, found: Subject) -> Iterator[Revision]:
    """The revision in a folder of its own, which is gone afterwards."""
    recipe = found.locked.recipe
    folder = recipe.folder
    root, name = top(folder), commit(folder, ref)
    with tempfile.TemporaryDirectory(prefix="autotune-gate-") as place:
        beside = Path(place) / "revision"
        git(root, "worktree", "add", "--detach", str(beside), name)
        try:
            yield _revision(f"git {ref} ({name[:10]})", beside, root, found)
        finally:
            git(root, "worktree", "remove", "--force", str(beside))


def _revision(said: str, beside: Path, root: Path, found: Subject) -> Revision:
    """What of the checkout is its own. Raises UsageError where its recipe asks for other work: then there is nothing to
    compare."""
    notes = []
    ours = Path(autotune.__file__).resolve().parents[1]
    own = (beside / "autotune" / "__init__.py").is_file()
    if not own:
        notes.append("the revision has no autotune of its own: both sides run the installed one")
    file = (found.locked.recipe.folder / Path(found.locked.recipe.path).name).resolve()
    recipe = beside / file.relative_to(root.resolve())
    if not recipe.is_file():
        notes.append(f"the revision has no {recipe.name}: both sides run this one's")
        return Revision(said, beside if own else ours, file, found.job.plan, tuple(notes))
    lock = lock_path(recipe)
    if not lock.is_file():
        notes.append("the revision has no lock of the recipe: both sides run the same plan")
        return Revision(said, beside if own else ours, recipe, found.job.plan, tuple(notes))
    theirs = load_lock(lock)
    mine = found.locked.lock
    if theirs.model["digest"] != mine.model["digest"] or _work(theirs.recipe) != _work(mine.recipe):
        raise UsageError(
            f"{said}: its {recipe.name} is of another model or other work: there is nothing to compare",
            hint="take a revision since the recipe changed, or --baseline lock after `autotune gate --update`",
        )
    if theirs.plan != mine.plan:
        notes.append(f"the revision's lock has plan {theirs.plan.id}, this one's {mine.plan.id}")
    return Revision(said, beside if own else ours, recipe, theirs.plan, tuple(notes))


def _work(recipe: object) -> object:
    """What a lock's recipe says of the work, but for how long and on which prompts it is measured."""
    merged = recipe["merged"]["workload"] if isinstance(recipe, dict) else {}
    return {key: value for key, value in merged.items() if key not in ("steps", "prompt", "stop", "acceptance")}


def this(found: Subject) -> Revision:
    """The side that is gated, as a command like the other."""
    recipe = found.locked.recipe.folder / Path(found.locked.recipe.path).name
    return Revision("this", Path(autotune.__file__).resolve().parents[1], recipe, found.job.plan)


def command_side(revision: Revision, found: Subject, folder: Path, overrides: Sequence[str]) -> Side:
    """Launches of one revision by its own command, with a database of its own in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if found.profile is None:
        what = f"this machine ({found.facts.name}) has no profile, which a run of its own needs"
        raise EnvironmentFault(what, hint="measure it with `autotune profile --quick`")
    profile = folder / "machine.json"
    dump_profile(found.profile, profile)
    words = [sys.executable, "-m", "autotune", "--db", str(folder / "plans.db"), "run", str(revision.recipe)]
    words += [f"--set={override}" for override in overrides]
    words += [f"--set=machine.use={profile}", f"--set=machine.devices={found.locked.lock.devices}"]
    words += [f"--pin={pin}" for pin in pins(revision.plan)]
    words += [f"--steps={found.job.steps}", f"--warmup={WARMUP}", "--launches=1", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(revision.code), os.environ.get("PYTHONPATH", "")])}

    def launch() -> Launch:
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, cwd=revision.code
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"{revision.said}: a launch did not end within {TIMEOUT_S:.0f} s") from None
        if done.returncode:
            said = re.sub(r"^error: ", "", next(reversed(_errors(done.stderr)), "no word why"))
            raise RunError(f"{revision.said}: `autotune run` ended with {done.returncode}: {said}")
        return launch_from(json.loads(done.stdout))

    return launch


def _errors(text: str) -> list[str]:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return [line for line in lines if line.startswith("error: ")] or lines


def pins(plan: Plan) -> list[str]:
    """The plan as AXIS=VALUE: what is not as by default, and the replicas, which otherwise fill the devices."""
    default = Plan().to_dict()
    return [
        f"{axis}={json.dumps(value)}"
        for axis, value in plan.to_dict().items()
        if axis == "data" or value != default[axis]
    ]


def launch_from(report: dict[str, object]) -> Launch:
    """A launch from the object of `run --json`."""
    measured = report["measured"]
    assert isinstance(measured, dict)
    tokens = report.get("tokens") or []
    assert isinstance(tokens, list)
    return Launch(
        tuple(measured["step_s_all"]),
        tuple(measured["peak_bytes"]),
        str(report["run_id"]),
        tuple(measured["losses"]),
        tokens_digest(tokens),
    )
