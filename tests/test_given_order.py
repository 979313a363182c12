"""Orders written out: what is printed can be given back, runs as it says, and what is not sound is refused by place."""

from __future__ import annotations

import pytest

from autotune.planners.feasible import why_not
from autotune.planners.lower.train import lower_training
from autotune.planners.schedules import SCHEDULES, Pipe, Step
from autotune.planners.schedules.text import dump, parse
from autotune.planners.validate import validate
from autotune.spec.errors import UsageError
from autotune.spec.plan import Plan
from autotune.spec.timeline_file import text
from autotune.spec.workload import Workload
from tests.equal import assert_equal
from tests.pool import Pool
from tests.test_conformance import OPEN, TIED

WORK = Workload(sequence_length=8, global_batch=4, precision="fp64", learning_rate=1e-2)
PLAIN = "0F0 0F1 0BW0 0F2 0BW1 0F3 0BW2 0BW3\n1F0 1BW0 1F1 1BW1 1F2 1BW2 1F3 1BW3\n"


def given(order: str, chunks: int = 1) -> Plan:
    return Plan(pipeline=2, schedule="given", chunks=chunks, order=order, attention="math")


@pytest.mark.parametrize("name", [n for n, entry in SCHEDULES.items() if entry.searched])
def test_an_order_survives_its_text(name: str) -> None:
    entry = SCHEDULES[name]
    pipe = Pipe(4, 8, entry.chunks[0])
    assert parse(dump(entry.order(pipe))) == entry.order(pipe)


def test_a_whole_programs_text_gives_its_order_back() -> None:
    plan = Plan(pipeline=2, schedule="dualpipe-v", chunks=2)
    program = text(lower_training(plan, TIED, WORK))
    assert "SEND" in program and "OPT" in program
    again = lower_training(given(program, 2), TIED, WORK)
    assert text(again) == program


def test_a_hand_written_order_runs_and_is_equal(pool: Pool) -> None:
    """Micro-batch 2 overtakes 1 backward, and one backward of rank 1 is split: legal, and no table entry does so."""
    order = "0F0 0F1 0F2 0BW0 0BW2 0F3 0BW1 0BW3\n1F0 1BW0 1F1 1F2 1B2 1BW1 1W2 1F3 1BW3\n"
    assert_equal(pool, OPEN, given(order), WORK)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0BW0", "0BW0 0BW0", "rank 0 step 6 (0BW0): frees a.0.0 twice"),
        ("1BW1", "1BW1 1B1 1W1", "rank 1 step 8 (1B1): reads a.1.1 after it was freed"),
        ("0BW0", "0W0 0B0", "rank 0 step 5 (0W0): reads b.0.0 before anything wrote it"),
        ("0F0 0F1 0BW0", "0BW0 0F0 0F1", "rank 0 step 1 (0BW0): reads a.0.0 before anything wrote it"),
    ],
)
def test_unsound_orders_are_refused_by_place(old: str, new: str, said: str) -> None:
    plan = given(PLAIN.replace(old, new, 1))
    assert why_not(TIED, WORK, plan) is None
    with pytest.raises(UsageError) as caught:
        validate(lower_training(plan, TIED, WORK))
    assert said in caught.value.message


def test_a_deadlock_shows_where_each_rank_waits() -> None:
    """Each rank waits for a backward of the other before it sends the forward that the other one needs."""
    order = "0F0 0BW0 0F1 0BW1\n1F1 1F0 1BW0 1BW1\n"
    work = Workload(sequence_length=8, global_batch=2)
    with pytest.raises(UsageError) as caught:
        validate(lower_training(given(order), TIED, work), inline=True)
    assert "deadlocks" in caught.value.message
    assert "rank 0 step" in caught.value.message and "rank 1 step" in caught.value.message


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("", "an order (the axis `order`"),
        (PLAIN.replace("0F1", "0F1!"), "line 1, word 2: found '0F1!'"),
        (PLAIN.replace("0F1 ", ""), "missing 0F1"),
        (PLAIN.replace("1BW3", ""), "missing 1BW3"),
        (PLAIN.replace("1F0", "1F9"), "found 1F9, step 0 of rank 1"),
        (PLAIN.splitlines()[0], "a line for each of 2 pipeline ranks (found 1)"),
    ],
)
def test_what_cannot_be_lowered(order: str, said: str) -> None:
    reason = why_not(TIED, WORK, given(order))
    assert reason is not None and said in reason


def test_steps_are_read_with_commas_and_comments_too() -> None:
    assert parse("# two ranks\n0F0, 0BW0  # the first\n1F0,1B0,1W0\n") == [
        [Step("F", 0, 0), Step("BW", 0, 0)],
        [Step("F", 1, 0), Step("B", 1, 0), Step("W", 1, 0)],
    ]
