"""Predicted against measured over a stated list of plans: `python -m autotune.runners.suite SUITE [--profile FILE]`.

Plan by plan, the operations that it is made of are measured, a prediction is made, and the plan runs; `--repeats`
rounds over all plans do this, so that the visits to one plan lie minutes apart: a shared machine's speed drifts from
minute to minute, and the medians count. Plans whose runs differ by more than a twentieth are visited up to as often
again. No plan's own step time is ever used. Prints a Markdown table with signed errors, then mean, worst and how far
the two agree on the plans' order, and writes the rows as JSON where `--out` says.

Under `torchrun --nproc-per-node N --max-restarts 6` all plans run in one world of N ranks (see `standing`), which saves
starting workers for each; what they are made of is then measured once, before the first. A plan that fails ends that
world: torchrun starts it again, and the suite goes on with the next plan.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from autotune.planners.feasible import why_not
from autotune.planners.predict import Predictor
from autotune.profiles_db.profile_file import dump_profile, load_profile
from autotune.runners.agreement import kendall_tau, regrets
from autotune.runners.here import refine_for
from autotune.runners.job import Job, RunResult
from autotune.runners.launch import launch
from autotune.runners.ledger import ENDED, Ledger, Row
from autotune.runners.suites import Suite, suites
from autotune.runners.validating import ORDERED
from autotune.runners.world import world_here
from autotune.spec.errors import AutotuneError
from autotune.spec.machine import Profile
from autotune.spec.plan import Plan
from autotune.spec.prediction import Question

if TYPE_CHECKING:
    from autotune.runners.standing import Standing

STEADY = 0.05  # of a step: what the medians of a plan's runs may differ by before it is run up to as often again
REPEATS = {"cuda": 1, "cpu": 3}  # rounds of measuring and running
PARTS = "predicted_prefill_s", "predicted_decode_s", "prefill_s", "decode_s"  # of a generation, at each visit
PATIENCE_S = {"cuda": 60.0, "cpu": 300.0}  # for one plan in a world that stands


@dataclass
class Runner:
    """Runs the plans of a suite: each with workers of its own, or all in the `world` that stands."""

    suite: Suite
    profile_for: Callable[[Plan], Profile]  # what a prediction is made with; asked before each of the repeats
    ledger: Ledger
    repeats: int = 1
    world: Standing | None = None
    patience_s: float = 300.0

    def run(self, say: Callable[[str], None]) -> None:
        """A row a plan in the ledger, and told to `say` when it is whole; a plan that fails says why and is passed over
        from then on."""
        for past in range(2 * self.repeats):
            for plan in self.suite.plans:
                row = self.ledger.row(plan.describe())
                if row and ("failed" in row or len(row["medians"]) > past or self._whole(row)):
                    continue
                row = self.ledger.begin(plan.describe())
                self._visit(row, plan)
                self.ledger.save()
                if "failed" in row or self._whole(row):
                    say(line(row))

    def _whole(self, row: Row) -> bool:
        """Whether no further visit is due."""
        medians = row["medians"]
        return len(medians) >= self.repeats and (not unsteady(medians) or len(medians) >= 2 * self.repeats)

    def _visit(self, row: Row, plan: Plan) -> None:
        """One more prediction and run; the row's seconds are the medians over all of its visits."""
        suite = self.suite
        try:
            profile = self.profile_for(plan)
            said = Predictor(suite.model, suite.workload, profile).predict(plan)
            ran = self._ran(plan, profile)
        except AutotuneError as error:
            row["failed"] = error.message
            return
        predictions, steps = [*row["predictions"], said.step_s], [*row["steps"], *ran.step_s]
        parts = [*row.get("parts", []), [said.prefill_s, said.decode_s, ran.prefill_s, ran.decode_s]]
        row |= {
            "predictions": predictions,
            "steps": steps,
            "medians": [*row["medians"], statistics.median(ran.step_s)],
            "predicted_s": statistics.median(predictions),
            "measured_s": statistics.median(steps),
            "predicted": max(said.peak_bytes),
            "measured": max(ran.peak_bytes),
            "parts": parts,
            **dict(zip(PARTS, map(statistics.median, zip(*parts, strict=True)), strict=True)),
            "mfu": ran.mfu,
            "differs": ran.max_difference,
            "loss": ran.losses[-1] if ran.losses else None,
            "grades": dict(said.grades),
            "predicted_kinds": dict(said.breakdown),
            "ops": by_op(said.timeline, ran.timeline),
        }
        del row["failed"]
        gc.collect()  # where a trainer lived in this process, its cycles must not count in the next peak

    def _ran(self, plan: Plan, profile: Profile) -> RunResult:
        suite = self.suite
        job = Job(
            plan,
            suite.model,
            suite.workload,
            steps=suite.steps,
            warmup=suite.warmup,
            device=suite.device,
            peak_flops=profile.device.peak_flops.get(suite.workload.precision, 0.0),
            check=suite.check,
        )
        if self.world:
            return self.world.run(job, plan.id, self.patience_s)
        with tempfile.TemporaryDirectory() as folder:
            return launch(job, nproc=plan.world, log_dir=Path(folder), timeout_s=300)


def unsteady(medians: Sequence[float]) -> bool:
    """Whether runs of one plan differ by more than a machine at rest would let them. What was predicted says nothing
    about it."""
    return len(medians) > 1 and max(medians) > (1 + STEADY) * min(medians)


def by_op(predicted: Any, measured: Any) -> dict[str, list[float]]:
    """Mean seconds of each operation, predicted and measured: where an error comes from."""
    found: dict[str, list[list[float]]] = {}
    for which, timeline in enumerate((predicted, measured)):
        for span in timeline.spans:
            i = timeline.instruction(span)
            found.setdefault(f"{i.stage}{i.op}", [[], []])[which].append(span.end - span.start)
    return {k: [statistics.fmean(a) if a else 0.0, statistics.fmean(b) if b else 0.0] for k, (a, b) in found.items()}


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['plan']} | failed: {row['failed'][:160]} |"
    time, memory = row["predicted_s"] / row["measured_s"] - 1, row["predicted"] / row["measured"] - 1
    more = [f"{row['mfu']:.1%}"] if row["mfu"] else []
    for name in ("prefill_s", "decode_s"):
        if row[name]:
            said, ran = row[f"predicted_{name}"], row[name]
            more.append(f"{name[:-2]} {said * 1e3:.2f} / {ran * 1e3:.2f} ms {said / ran - 1:+.1%}")
    if row.get("differs") is not None:
        more.append(f"differs {row['differs']:.4f}")
    return (
        f"| {row['plan']} | {row['predicted_s'] * 1e3:.1f} | {row['measured_s'] * 1e3:.1f} | {time:+.1%} | "
        f"{row['predicted'] / 2**20:.0f} | {row['measured'] / 2**20:.0f} | {memory:+.1%} | {', '.join(more)} |"
    )


def refuse(suite: Suite, world: int) -> None:
    """Ends the program where one of the plans cannot run; `world`: ranks that stand already, 0: none do."""
    for plan in suite.plans:
        if reason := why_not(suite.model, suite.workload, plan):
            raise SystemExit(f"{plan.describe()}: {reason}")
        if world and plan.world != world:
            raise SystemExit(f"{plan.describe()}: needs {plan.world} ranks, found {world} (--plans chooses others)")


def refiner(
    suite: Suite, profile: Profile, say: Callable[[str], None], seconds_each: float, as_is: bool
) -> Callable[[Sequence[Plan]], Profile]:
    """What measures the operations that plans lack. `as_is`: nothing does; nor where a check judges memory and numbers,
    for which nothing need be timed."""
    question = Question(suite.model, suite.workload, measurable(profile, suite), 0)
    if as_is or suite.check:
        return lambda plans: question.profile
    return partial(refine_for, question, progress=say, seconds_each=seconds_each)


def profiles(suite: Suite, refine: Callable[[Sequence[Plan]], Profile]) -> Callable[[Plan], Profile]:
    """The profile that each plan is predicted with: on a processor, whose speed drifts, measured again before every
    visit; else one for all plans."""
    if suite.device == "cpu":
        return lambda plan: refine([plan])
    refined = refine(suite.plans)
    return lambda plan: refined


def summary(rows: Sequence[Row]) -> list[str]:
    """Mean and worst errors of the rows that ran, and how far predictions and steps agree on their order."""
    good = [r for r in rows if "failed" not in r]
    summed = {
        "step time": ("predicted_s", "measured_s"),
        "peak memory": ("predicted", "measured"),
        "prefill": ("predicted_prefill_s", "prefill_s"),
        "a decoded token": ("predicted_decode_s", "decode_s"),
    }
    told = []
    for name, (a, b) in summed.items():
        errors = [r[a] / r[b] - 1 for r in good if r[b]]
        if errors:
            told.append(f"{name}: mean {statistics.fmean(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}")
    if len(good) >= ORDERED:
        tau = kendall_tau([r["predicted_s"] for r in good], [r["measured_s"] for r in good])
        (lost,) = regrets(("suite", r["predicted_s"], r["measured_s"]) for r in good)
        told.append(f"order of {len(good)} plans by step time: Kendall's tau-b {tau:.3f}, regret {lost:.1%}")
    return told


def arguments_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m autotune.runners.suite", description=__doc__)
    parser.add_argument("suite", choices=sorted(suites()))
    parser.add_argument("--profile", required=True, type=Path, help="the machine's profile (autotune profile --out)")
    parser.add_argument("--out", type=Path, help="where the rows go as JSON")
    parser.add_argument("--refined", type=Path, help="where the refined profile goes, if the plans share one")
    parser.add_argument("--seconds-each", type=float, default=0.1, help="time for measuring one operation")
    parser.add_argument("--as-is", action="store_true", help="measure no operation: predict from the profile as it is")
    parser.add_argument("--plans", help="these plans alone, by number from 0, e.g. 0,3,9")
    parser.add_argument("--repeats", type=int, default=0, help="rounds of measuring and running (CPU: 3, GPU: 1)")
    parser.add_argument("--steps", type=int, default=0, help="steps that are timed, instead of the suite's own number")
    parser.add_argument("--patience", type=float, default=0, help="most seconds of one plan in a world that stands")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    asked = arguments_of(arguments)
    suite = suites()[asked.suite]
    if asked.plans:
        suite = replace(suite, plans=tuple(suite.plans[int(number)] for number in asked.plans.split(",")))
    suite = replace(suite, steps=asked.steps or suite.steps)
    here = world_here()
    size = here[1] if here and here[1] > 1 else 0
    refuse(suite, size)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    refine = refiner(suite, load_profile(asked.profile), say, asked.seconds_each, asked.as_is)
    if size:
        _standing(suite, refine, asked)
    profile_for = profiles(suite, refine)
    if suite.device != "cpu" and asked.refined:
        dump_profile(profile_for(suite.plans[0]), asked.refined)
    ledger = Ledger(asked.out)
    header()
    Runner(suite, profile_for, ledger, asked.repeats or REPEATS[suite.device]).run(partial(print, flush=True))
    print("\n".join(summary(ledger.rows)))
    return 0


def measurable(profile: Profile, suite: Suite) -> Profile:
    """The profile for as many workers as the suite's plans have, where these are processes on a processor: what they
    do is measured by so many at once, whatever number the profile itself was measured with."""
    most = max(plan.world for plan in suite.plans)
    if not profile.inline or profile.device.count >= most:
        return profile
    return replace(profile, device=replace(profile.device, count=most))


def header() -> None:
    print("| plan | predicted ms | measured ms | error | predicted MiB | measured MiB | error | MFU, or parts |")
    print("|---|---|---|---|---|---|---|---|", flush=True)


def _standing(suite: Suite, refine: Callable[[Sequence[Plan]], Profile], asked: argparse.Namespace) -> NoReturn:
    """The suite in the world that this process is a rank of: every rank comes here, rank 0 speaks and writes."""
    from autotune.runners.standing import Standing, attempt_here

    world = Standing.join(suite.device)
    first, again = world.rank == 0, attempt_here() > 0
    kept, out = asked.refined or world.folder / "refined.json", asked.out or world.folder / "rows.json"

    def profile() -> Profile:
        if again and kept.exists():
            return load_profile(kept)
        refined = refine(suite.plans)
        dump_profile(refined, kept)
        return refined

    ledger = world.share(lambda: Ledger.resume(out) if again else Ledger(out))
    if not first:
        ledger = Ledger(None, ledger.rows)
    elif last := ledger.unfinished():
        plan = next(plan for plan in suite.plans if plan.describe() == last["plan"])
        last["failed"] = world.why(plan.id) or ENDED
        ledger.save()
        print(line(last), flush=True)
    refined = world.share(profile)
    if first and not ledger.rows:
        header()
    patience = asked.patience or PATIENCE_S[suite.device]
    runner = Runner(suite, lambda plan: refined, ledger, asked.repeats or 1, world, patience)
    runner.run(partial(print, flush=True) if first else lambda text: None)
    if first:
        print("\n".join(summary(ledger.rows)), flush=True)
    world.leave()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
