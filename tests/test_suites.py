"""The suites can run, orders are compared as they should be, and a suite that is interrupted goes on."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from autotune.planners.feasible import why_not
from autotune.profiles_db.profile_file import dump_profile
from autotune.runners.agreement import kendall_tau
from autotune.runners.job import Job
from autotune.runners.ledger import ENDED, Ledger, Row
from autotune.runners.suite import Runner, measurable, refuse, summary
from autotune.runners.suites import suites
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload
from tests.commands import Home, two_workers
from tests.pool import Pool


@pytest.mark.parametrize("name", sorted(suites()))
def test_every_plan_of_a_suite_is_feasible(name: str) -> None:
    suite = suites()[name]
    assert suite.plans
    for plan in suite.plans:
        assert why_not(suite.model, suite.workload, plan) is None, plan.describe()
    assert len({plan.describe() for plan in suite.plans}) == len(suite.plans), "rows are known by what they say"


def test_suites_of_schedules_have_many() -> None:
    for name, world in (("h200x2-schedules", 2), ("cpu-schedules", 4)):
        plans = suites()[name].plans
        assert {plan.world for plan in plans} == {world}
        assert len({plan.schedule for plan in plans}) >= 10


def test_jobs_follow_one_another_in_a_world_that_stands(pool: Pool, tmp_path: Path) -> None:
    model = ModelSpec("tiny", "LlamaForCausalLM", 32, 4, 4, 2, 8, 48, 256)
    workload = Workload(sequence_length=16, global_batch=4, precision="fp64")
    plans = [
        Plan(pipeline=2),
        Plan(data=2, zero=1),
        Plan(tensor=2, sequence_parallel=True),
        Plan(pipeline=2, schedule="chimera"),
        Plan(pipeline=2, schedule="v-half", chunks=2, offload=100),
        Plan(pipeline=2, vocabulary="vocab-2"),
        Plan(pipeline=2),
    ]
    jobs = [Job(plan, model, workload, steps=2, warmup=1) for plan in plans]
    first, *others = pool.run("standing", 2, jobs=jobs, folder=tmp_path)[0]
    assert len(first) == 3
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-10), "what ran before leaves no trace"
    assert others[-1] == first


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),  # the tie in one list counts against it
        ([1, 1, 2, 3], [2, 2, 4, 3], 3 / 5),
    ],
)
def test_tau_of_small_lists(a: list[float], b: list[float], tau: float) -> None:
    assert kendall_tau(a, b) == pytest.approx(tau, abs=1e-15)
    assert kendall_tau(b, a) == pytest.approx(tau, abs=1e-15)


def test_tau_does_not_look_at_sizes() -> None:
    draw = random.Random(5)
    a, b = [draw.random() for _ in range(12)], [draw.random() for _ in range(12)]
    assert kendall_tau(a, b) == kendall_tau([math.exp(9 * x) for x in a], b)
    assert kendall_tau(a, b) == -kendall_tau([-x for x in a], b)


def test_tau_of_ties_alone_and_of_unequal_lists() -> None:
    assert math.isnan(kendall_tau([1, 1], [1, 2]))
    with pytest.raises(ValueError, match="zip"):
        kendall_tau([1, 2], [1])


def test_a_ledger_keeps_what_was_begun(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    ledger = Ledger(file)
    ledger.begin("a").update(measured_s=1.0)
    del ledger.rows[0]["failed"]
    ledger.begin("b")
    again = Ledger.resume(file)
    none: dict[str, list[float]] = {"predictions": [], "steps": [], "medians": []}
    assert again.row("a") == {"plan": "a", "measured_s": 1.0} | none
    assert again.unfinished() == again.row("b") == {"plan": "b", "failed": ENDED} | none
    assert again.row("c") is None
    assert again.begin("a") is again.rows[0], "a second visit goes on with the row"
    assert len(again.rows) == 2
    assert Ledger.resume(tmp_path / "none.json").rows == []


def test_the_summary_needs_eight_rows_for_an_order() -> None:
    rows = [
        {"predicted_s": 1.0 + i, "measured_s": 2.0 + i, "predicted": 100, "measured": 50}
        | dict.fromkeys(("predicted_prefill_s", "prefill_s", "predicted_decode_s", "decode_s"), 0.0)
        for i in range(8)
    ]
    assert summary(rows) == [
        "step time: mean 22.9%, worst -50.0%",
        "peak memory: mean 100.0%, worst +100.0%",
        "order of 8 plans by step time: Kendall's tau-b 1.000, regret 0.0%",
    ]
    assert len(summary([*rows[:7], {"plan": "x", "failed": "why"}])) == 2


class Told(Runner):
    """A runner whose plans take the seconds that are written down for their visits, one after another."""

    def _visit(self, row: Row, plan: Plan) -> None:
        left = TIMES[plan.micro_batch]
        self.order.append(plan.micro_batch)
        if left[len(row["medians"])] is None:
            row["failed"] = "why"
            return
        row["medians"] = [*row["medians"], left[len(row["medians"])]]
        row |= {"predicted_s": 1.0, "measured_s": 1.0, "predicted": 1, "measured": 1, "mfu": 0.0}
        row |= {"prefill_s": 0.0, "decode_s": 0.0}
        del row["failed"]

    order: ClassVar[list[int]] = []


TIMES: dict[int, list[float | None]] = {
    1: [1.0, 1.0, 1.04],  # steady after its three visits
    2: [1.0, 1.3, 1.0, 1.0, 1.0, 1.0],  # disturbed once: as often again
    4: [1.0, None],  # fails at its second
}


def test_visits_to_a_plan_lie_apart() -> None:
    suite = replace(suites()["cpu"], plans=tuple(Plan(micro_batch=number) for number in TIMES))
    said: list[str] = []
    runner = Told(suite, lambda plan: two_workers(), Ledger(), repeats=3)
    runner.run(said.append)
    assert runner.order == [1, 2, 4, 1, 2, 4, 1, 2, 2, 2, 2]
    assert [text.split()[1:5] for text in said] == [
        Plan(micro_batch=number).describe().split() for number in (4, 1, 2)
    ], "each is told when it is whole"


def test_a_world_of_another_size_is_refused() -> None:
    refuse(suites()["cpu-schedules"], 4)
    refuse(suites()["cpu"], 0)
    with pytest.raises(SystemExit, match="needs 4 ranks, found 2"):
        refuse(suites()["cpu-schedules"], 2)


def test_more_workers_than_the_profile_was_measured_with() -> None:
    profile = two_workers()
    assert measurable(profile, suites()["cpu-schedules"]).device.count == 4
    assert measurable(profile, suites()["cpu"]) == profile


def test_a_standing_world_goes_on_after_a_plan_that_does_not_end(tmp_path: Path) -> None:
    """Nothing ends within 0.05 s: every plan fails, each in a world that was started again."""
    home = Home.make(tmp_path)
    profile, rows = tmp_path / "profile.json", tmp_path / "rows.json"
    dump_profile(two_workers(), profile)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command += ["--monitor-interval=0.1", "-m", "autotune.runners.suite", "cpu", "--plans", "6,11"]
    command += ["--profile", str(profile), "--out", str(rows), "--as-is", "--patience", "0.05"]
    said = subprocess.run(command, env=home.environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    found = json.loads(rows.read_text())
    assert len(found) == 2
    for row in found:
        assert row["failed"].endswith("did not end within 0 s")
        assert said.stdout.count(row["plan"]) == 1, "a row is told once"
