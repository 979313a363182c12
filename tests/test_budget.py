"""What a search says when its budget ends: while plans are enumerated, while they are simulated, and not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from autotune.cli._views import found_lines
from autotune.planners import search as module
from autotune.planners.search import search
from autotune.planners.space import Enumeration
from autotune.profiles_db.profile_file import MACHINES, load_profile
from autotune.report.explain import explain_found
from autotune.spec.errors import InfeasibleError
from autotune.spec.model import ModelSpec
from autotune.spec.prediction import Question
from autotune.spec.workload import Workload

pytestmark = pytest.mark.alone

MODEL = ModelSpec("small", "LlamaForCausalLM", 256, 8, 8, 8, 32, 704, 1024)
QUESTION = Question(MODEL, Workload(sequence_length=512, global_batch=16), load_profile(MACHINES / "h100-sxm.json"), 4)


def after(calls: int) -> Callable[[], bool]:
    """A clock that says the budget has ended once it has been asked so many times."""
    asked = iter(range(calls))
    return lambda: next(asked, None) is None


def clock(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    monkeypatch.setattr(module, "deadline", lambda began, seconds: after(calls))


@pytest.fixture(scope="module")
def every() -> Enumeration:
    space = Enumeration(QUESTION)
    list(space)
    return space


def test_an_enumeration_that_ends_early_counts_what_it_left(every: Enumeration) -> None:
    assert every.unseen == 0 and every.looked_at == every.choices
    early = Enumeration(QUESTION, ended=after(100))
    seen = list(early)
    assert early.looked_at == 100 and early.unseen == every.choices - 100
    assert seen == list(Enumeration(QUESTION))[: len(seen)] and early.structures < every.structures


def test_a_budget_that_ends_while_plans_are_bounded_leaves_the_gap_unknown(
    every: Enumeration, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = every.choices // 2
    clock(monkeypatch, calls)
    told: list[str] = []
    found = search(QUESTION, progress=told.append)
    assert not found.finished and found.bound.gap is None
    assert found.space.unseen == every.choices - calls and found.simulated > 0
    assert any(f"{found.space.unseen} of {every.choices} choices of the outer axes" in line for line in told)
    lines = "\n".join(found_lines(found))
    assert "gap unknown" in lines and f"{found.space.unseen} choices of the outer axes were not looked at" in lines
    explained = explain_found(found)
    assert "is unknown" in "\n".join(explained.lines()) and explained.to_dict()["proof"]["gap"] is None


def test_a_budget_that_ends_while_plans_are_simulated_leaves_a_gap(
    every: Enumeration, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, every.choices)
    found = search(QUESTION)
    assert not found.finished and found.space.unseen == 0
    assert found.bound.gap is not None and found.bound.gap > 0
    assert found.bound.step_s * (1 + found.bound.gap) == pytest.approx(found.best.step_s)
    monkeypatch.undo()
    whole = search(QUESTION)
    assert whole.finished and whole.bound.gap == 0 and found.bound.step_s <= whole.best.step_s <= found.best.step_s


def test_a_budget_for_nothing_is_no_word_on_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 0)
    with pytest.raises(InfeasibleError, match=r"budget ended before a plan that fits was found.*were not looked at"):
        search(QUESTION)


def test_a_bound_of_throughput_is_told_in_seconds(every: Enumeration, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, every.choices)
    fast = search(replace(QUESTION, minimize="tokens_per_s"))
    clock(monkeypatch, every.choices)
    plain = search(QUESTION)
    assert fast.best.plan == plain.best.plan and fast.bound.gap == pytest.approx(plain.bound.gap)
    assert fast.bound.step_s == pytest.approx(plain.bound.step_s)
