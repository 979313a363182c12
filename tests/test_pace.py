"""The pace of a device: settled when stretches take the same time, behind when one takes longer, quiet on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest
import torch

from autotune.planners.costs.works import works
from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import Shape
from autotune.profiles_db.probes.crew import Crew
from autotune.profiles_db.probes.pace import BEHIND, FEWEST_S, MOST_S, STEADY, Pace
from autotune.spec.graph import blocks
from autotune.spec.model import ModelSpec
from autotune.spec.work import Memory


def paced(stretches: Iterator[float]) -> tuple[Pace, Callable[[], float]]:
    """A pace whose stretches take these seconds, and a clock that they alone move."""
    now = [0.0]

    def stretch() -> float:
        seconds = next(stretches)
        now[0] += seconds
        return seconds

    return Pace("cuda", stretch), lambda: now[0]


def test_a_device_that_wakes_up_settles_at_its_working_pace() -> None:
    waking = [0.5 / (i + 1) for i in range(10)]  # from half a second down to 0.05
    pace, clock = paced(chain(waking, repeat(0.01)))
    said = pace.settle(clock)
    assert pace.seconds == 0.01 and pace.first == 0.5 and "settled after" in said


def test_a_steady_device_is_still_worked_for_a_while() -> None:
    pace, clock = paced(repeat(FEWEST_S / (4 * STEADY)))
    pace.settle(clock)
    assert clock() >= FEWEST_S


def test_a_device_that_never_settles_is_said_to_and_not_waited_for() -> None:
    pace, clock = paced(chain.from_iterable(repeat((0.01, 0.02))))
    said = pace.settle(clock)
    assert "did not settle" in said and MOST_S <= clock() < MOST_S + 0.05


@pytest.mark.parametrize(
    ("later", "behind"),
    [
        (repeat(0.01), False),
        (repeat(0.01 * BEHIND * 1.01), True),
        (iter([0.05, 0.01, 0.01]), False),  # one late stretch: the host was away, the device was not
        (iter([0.05, 0.05, 0.01]), False),
    ],
)
def test_behind(later: Iterator[float], behind: bool) -> None:
    pace, _ = paced(later)
    pace.seconds = 0.01
    assert pace.behind() is behind and pace.again == behind


def test_a_cpu_has_no_pace() -> None:
    pace = Crew("cpu").pace
    assert pace.settle() == "" and not pace.behind() and pace.seconds == 0


@pytest.mark.parametrize(("dtype", "kept"), [("bf16", 1), ("fp32", 0)])
def test_a_biased_weight_gradient_has_the_sum_over_tokens_in_its_price(dtype: str, kept: int) -> None:
    model = ModelSpec("biased", "Qwen2ForCausalLM", 64, 1, 4, 2, 16, 128, 64, qkv_bias=True)
    block, shape = blocks(model)[1], Shape(2, 8, 8, dtype=dtype)
    body = lower_block(block, shape)
    found = [works(block, body, i, shape) for i in body.backward.ranks[0] if i.op == "linear.wgrad"]
    sums = [w for made in found for w in made if isinstance(w, Memory) and w.op == "column_sum"]
    width = torch.empty(0, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]).element_size()
    assert [w.bytes for w in sums] == [16 * (4 + 2 * 2) * 16 * width]  # q, k and v heads of 16, once
    assert sum(len(made) == 2 + kept for made in found) == 1
