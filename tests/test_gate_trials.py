"""The harness that tries gates, with workers that need not start; handicaps themselves are real in test_gate.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.gate import calm, handicap, rates, trials
from autotune.gate.calm import Reading
from autotune.gate.sides import Rule
from autotune.gate.trials import held
from autotune.profiles_db.store import Store
from autotune.runners.job import RunResult
from autotune.runners.launch import WORKER
from autotune.spec.lock import Launch
from autotune.spec.plan import Plan
from tests.commands import Home
from tests.recipes import Autotune
from tests.small import GENERATE, TRAIN
from tests.stored import DENSE, WORK, machine

STEP_S, PRODUCT_S, PEAK = 0.01, 1e-5, 100_000


@pytest.fixture
def tried(tmp_path: Path, autotune: Autotune, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A recipe `r.toml` with a lock, and launches as long as their handicap says, with 0.3 % of noise: what each had,
    (products, bytes)."""
    home = Home.make(tmp_path)
    monkeypatch.setenv("AUTOTUNE_DB", str(home.folder / "plans.db"))
    monkeypatch.setattr(calm, "read", lambda: Reading(1.0, 0.05))
    for name, text in (("r.toml", TRAIN), ("talk.toml", GENERATE)):
        home.write(name, text)
        assert autotune("search", name, "--measure", "0").code == 0
    draw, found = np.random.default_rng(5), list[tuple[int, int]]()

    def launch(job: Any, *, worker: Sequence[str], **given: Any) -> RunResult:
        products, size = (0, 0) if worker == (WORKER,) else (int(worker[1]), int(worker[2]))
        found.append((products, size))
        seconds = (STEP_S + products * PRODUCT_S) * float(draw.lognormal(0, 0.003))
        return RunResult((seconds,), 1.0, (PEAK + size,) * job.plan.world)

    monkeypatch.setattr(trials, "launch", launch)
    return found


def test_equal_sides_give_no_alarm(tried: list[tuple[int, int]], capfd: pytest.CaptureFixture[str]) -> None:
    trials.main(["r.toml", "--times", "20", "--whole", "2", "--json", "t.json"])
    said = capfd.readouterr().out
    assert "20 trials: 20 pass" in said and said.count("whole gate") == 2
    assert tried == [(0, 0)] * (2 * 24 + 2 * 10)
    kept = json.loads(Path("t.json").read_text())
    assert len(kept["new_s"]) == len(kept["base_s"]) == 24 and len(kept["verdicts"]) == 20


@pytest.mark.parametrize("share", [0.05, 0.10])
def test_a_slowdown_is_made_and_caught(
    tried: list[tuple[int, int]], capfd: pytest.CaptureFixture[str], share: float
) -> None:
    trials.main(["r.toml", "--times", "10", "--slow", str(share)])
    assert "10 trials: 10 regressed" in capfd.readouterr().out
    made = tried[-1][0] or tried[-2][0]
    assert made == pytest.approx(share * STEP_S / PRODUCT_S, rel=0.1), "products that take that share of a step"


def test_memory_is_made_and_caught(tried: list[tuple[int, int]], capfd: pytest.CaptureFixture[str]) -> None:
    trials.main(["r.toml", "--times", "5", "--memory", "0.03"])
    assert "5 trials: 5 regressed" in capfd.readouterr().out
    assert {size for _, size in tried} == {0, 3000}


def test_retries_take_the_pairs_that_follow() -> None:
    pairs = [(Launch((s,), (1,)), Launch((1.0,), (1,))) for s in (1.0, 1.3, 0.7, 1.0, 1.0, 1.0, 1.0)]
    assert held(pairs, 0, Rule(3, 0.03, 0))[0] == "inconclusive"
    assert held(pairs, 0, Rule(3, 0.03, 2))[0] == "pass"
    assert held(pairs, 4, Rule(3, 0.03, 9)) == ("pass", 1.0), "no more than there are"


def test_what_cannot_be_tried(
    tried: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def code(*words: str) -> Any:
        with pytest.raises(SystemExit) as ended:
            trials.main(words)
        return ended.value.code

    assert code("missing.toml") == 2 and "missing.toml" in capfd.readouterr().err
    assert code("r.toml", "--times", "0") == 2
    monkeypatch.setattr(trials, "launch", lambda job, **given: RunResult((STEP_S,), 1.0, (PEAK,)))
    assert code("r.toml", "--slow", "0.05") == 5 and "the workers are not burdened" in capfd.readouterr().err


def test_no_recipe_can_name_a_handicap() -> None:
    assert handicap.worker(0, 0) == (WORKER,)
    assert handicap.worker(3, 4) == ("autotune.gate.handicap", "3", "4")


def test_rates_of_the_database_s_launches(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(3)
    with pytest.raises(SystemExit):
        rates.main(["--db", str(store.place.path)])
    assert "no run has 3 launches or more; give --noise" in capfd.readouterr().err
    for _ in range(40):
        run = store.start_run(Plan(), DENSE, WORK, machine=machine().fingerprint)
        for _ in range(5):
            store.add_launch(run, [1.0, float(draw.lognormal(0, 0.01)), 1e9])
        store.finish_run(run)
    rates.main(["--db", str(store.place.path), "--launches", "5", "--threshold", "0.03", "--trials", "50", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert found["source"] == "of 200 launches in 40 runs" and found["noise"] == pytest.approx(0.006, rel=0.3)
