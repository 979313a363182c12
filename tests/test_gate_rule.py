"""The rule of a gate: symmetric, monotone, repeatable; its rates of false alarms and misses; the machine's calm."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from autotune.gate import calm, rates
from autotune.gate.calm import Reading, Watch, disturbance, hindered
from autotune.gate.checks import UNEQUAL, UNKNOWN, WORSE, losses, memory, tokens, tokens_digest
from autotune.gate.noise import noise_of
from autotune.gate.outcome import WORST_FIRST, Outcome, exit_code, whole
from autotune.gate.rates import Rate, rate
from autotune.gate.rule import IMPROVED, INCONCLUSIVE, PASS, REGRESSED, Interval, interval, log_intervals, verdict
from autotune.gate.sides import Rule, measure, measure_one
from autotune.spec.errors import RunError
from autotune.spec.lock import Launch

MIRRORED = {REGRESSED: IMPROVED, IMPROVED: REGRESSED, PASS: PASS, INCONCLUSIVE: INCONCLUSIVE}
RANK = [IMPROVED, PASS, REGRESSED]


def sides(seed: int) -> tuple[list[float], list[float], float]:
    """Two lists of launches of different lengths, noise and distance, and a threshold."""
    draw = random.Random(seed)
    noise, change = draw.choice((0.001, 0.01, 0.05)), draw.uniform(0.85, 1.15)
    new = [change * draw.lognormvariate(0, noise) for _ in range(draw.randint(3, 9))]
    base = [draw.lognormvariate(0, noise) for _ in range(draw.randint(3, 9))]
    return new, base, draw.choice((0.01, 0.03, 0.05))


@pytest.mark.parametrize("seed", range(60))
def test_exchanging_the_sides_inverts_the_answer(seed: int) -> None:
    new, base, threshold = sides(seed)
    there, back = interval(new, base), interval(base, new)
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1) and there.high * back.low == pytest.approx(1)
    assert there.half_width == pytest.approx(back.half_width)
    assert verdict(back, threshold) == MIRRORED[verdict(there, threshold)]


@pytest.mark.parametrize("seed", range(60))
def test_a_slower_side_is_never_judged_better(seed: int) -> None:
    new, base, threshold = sides(seed)
    kinds = [verdict(interval([s * factor for s in new], base), threshold) for factor in np.linspace(0.7, 1.4, 36)]
    known = [RANK.index(kind) for kind in kinds if kind != INCONCLUSIVE]
    assert known == sorted(known)
    assert kinds[0] == IMPROVED and kinds[-1] == REGRESSED, "a large change needs no precision"


@pytest.mark.parametrize("seed", range(20))
def test_the_order_and_the_unit_of_launches_do_not_matter(seed: int) -> None:
    new, base, _ = sides(seed)
    found = interval(new, base)
    assert interval(new[::-1], sorted(base)) == found
    ours = interval([1e-3 * s for s in new], [1e-3 * s for s in base])
    assert (ours.ratio, ours.low, ours.high) == pytest.approx((found.ratio, found.low, found.high))


def test_a_seed_makes_the_interval() -> None:
    new, base = [1.01, 1.02, 0.99, 1.03], [1.0, 0.98, 1.01]
    assert interval(new, base, 3) == interval(new, base, 3)
    many = np.array([new] * 3), np.array([base] * 3)
    assert np.ptp(log_intervals(*many, 3), axis=1).max() == 0, "a trial does not depend on its neighbours"


def test_equal_launches_pass_and_bounds_hold_the_ratio() -> None:
    assert interval([1.0] * 3, [1.0] * 5) == Interval(1.0, 1.0, 1.0)
    for seed in range(40):
        new, base, _ = sides(seed)
        found = interval(new, base)
        assert min(new) / max(base) <= found.low <= found.ratio <= found.high <= max(new) / min(base)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (Interval(1.04, 1.01, 1.06), REGRESSED),
        (Interval(1.04, 0.999, 1.05), PASS),  # not beyond chance
        (Interval(1.02, 1.01, 1.03), PASS),  # beyond chance, and too little
        (Interval(1 / 1.04, 1 / 1.06, 1 / 1.01), IMPROVED),
        (Interval(1.05, 1.0001, 1.11), INCONCLUSIVE),
        (Interval(1.0, 0.9, 1.1), INCONCLUSIVE),
        (Interval(1.5, 1.2, 1.9), REGRESSED),  # as imprecise, and all of it too slow
        (Interval(0.6, 0.5, 0.8), IMPROVED),
    ],
)
def test_the_verdict(found: Interval, kind: str) -> None:
    assert verdict(found, 0.03) == kind


def test_what_is_no_side_is_refused() -> None:
    with pytest.raises(ValueError, match="found 2 and 3 launches; expected 3 or more"):
        interval([1.0] * 2, [1.0] * 3)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected positive ones"):
            interval([1.0, 1.0, wrong], [1.0] * 3)


# --- rates


def test_the_rates_of_the_rule_at_the_noise_that_was_measured() -> None:
    """0.35 %: what six fresh processes of one program on an H200 differed by. 1 %: a processor that is not alone."""
    quiet, rule = 0.0035, Rule(5, 0.03, 4)

    def of(rule: Rule, change: float, noise: float) -> Rate:
        return rate(rule, change, noise, 0.0, trials=1500)

    assert of(rule, 0.0, quiet).regressed == 0
    assert of(rule, 0.05, quiet).regressed > 0.999
    assert of(rule, 0.0, 0.01).regressed < 0.01 and of(rule, 0.05, 0.01).regressed > 0.99
    assert 0.4 < of(rule, 0.03, quiet).regressed < 0.6, "a change as large as the threshold is a coin's toss"
    assert of(Rule(5, 0.02, 4), 0.03, quiet).regressed > 0.99
    noisy = of(rule, 0.0, 0.05)
    assert noisy.inconclusive > 0.3 and noisy.regressed < 0.02 and noisy.mean_launches > 9, "noise is no regression"


def test_rates_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--noise", "0.01", "--launches", "3", "--threshold", "0.03", "--trials", "200"]
    rates.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["change"] for row in found["rates"]] == list(rates.CHANGES) and found["noise"] == 0.01
    rates.main(words)
    assert "launches used" in capsys.readouterr().out
    for wrong in (["--noise", "0"], ["--noise", "0.01", "--launches", "2"], ["--noise", "0.01", "--threshold", "1.5"]):
        with pytest.raises(SystemExit):
            rates.main(wrong)


def test_noise_is_found_again() -> None:
    draw = np.random.default_rng(1)
    groups = [np.exp(draw.normal(0, 0.01, (50, 6)) + draw.normal(0, 0.03, (50, 1))).tolist() for _ in range(4)]
    found = noise_of(groups)
    assert found.launch == pytest.approx(0.01, rel=0.1) and found.drift == pytest.approx(0.03, rel=0.2)
    assert (found.runs, found.launches) == (200, 1200)
    still = noise_of([np.exp(draw.normal(0, 0.01, (50, 6))).tolist()])
    assert still.drift < 0.004
    with pytest.raises(ValueError, match="no run has 3 launches"):
        noise_of([[[1.0, 2.0]]])


# --- launching until there is an answer


class Sequence:
    """A side whose launches take what a list says."""

    def __init__(self, name: str, seconds: list[float], order: list[str]) -> None:
        self.name, self.seconds, self.order = name, iter(seconds), order

    def __call__(self) -> Launch:
        self.order.append(self.name)
        return Launch((next(self.seconds),))


def quiet() -> Watch:
    return Watch(lambda: Reading(1.0, 0.05))


def readings(*found: Reading) -> Watch:
    left: Iterator[Reading] = iter(found)
    return Watch(lambda: next(left))


def test_sides_are_launched_in_turn() -> None:
    order: list[str] = []
    found = measure(Sequence("A", [1.0] * 4, order), Sequence("B", [1.0] * 4, order), Rule(4, 0.03, 2), quiet())
    assert "".join(order) == "ABBAABBA" and found.kind == PASS and len(found.new) == len(found.base) == 4


def test_retries_add_launches_up_to_their_bound() -> None:
    noisy = [1.0, 1.2, 0.8, 1.1, 0.9] * 4
    order: list[str] = []
    found = measure(Sequence("A", noisy, order), Sequence("B", noisy, order), Rule(3, 0.03, 2), quiet())
    assert found.kind == INCONCLUSIVE and len(order) == 2 * (3 + 2 * 2)
    assert "to either side, and the threshold 3.0%" in found.why
    order.clear()
    calmer = [1.0, 1.2, 0.8, *([1.0] * 20)]
    found = measure(Sequence("A", calmer, order), [Launch((1.0,))] * 5, Rule(3, 0.03, 5), quiet())
    assert found.kind == PASS and 3 < len(order) < 13 and set(order) == {"A"}, "a stored side is not launched"


def test_launches_beside_a_busy_machine_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    calm, busy = Reading(1.0, 0.05), Reading(0.5, 0.05)
    watch = readings(calm, busy, calm, busy, busy, calm, calm, calm, calm)
    order: list[str] = []
    slow = [1.0, 9.0, 9.0, 1.0, 1.0, 1.0]
    found = measure(Sequence("A", slow, order), [Launch((1.0,))] * 3, Rule(3, 0.03, 2), watch)
    assert found.kind == PASS and found.set_aside == 2 and [launch.median_s for launch in found.new] == [1.0] * 3
    watch = readings(*[calm, busy, busy] * 4)
    found = measure(Sequence("A", [1.0] * 9, order), [Launch((1.0,))] * 3, Rule(3, 0.03, 0), watch)
    assert found.kind == INCONCLUSIVE and "the machine is under load: its cores gave 50%" in found.why
    assert "3 of 3 launches set aside" in found.why


def test_a_machine_that_slows_down_is_seen_afterwards_too() -> None:
    """The least seconds may come last: then the earlier readings were the slow ones."""
    watch = readings(*[Reading(1.0, 0.08)] * 3, *[Reading(1.0, 0.05)] * 5)
    found = measure(Sequence("A", [1.0] * 7, []), [Launch((1.0,))] * 3, Rule(3, 0.03, 2), watch)
    assert found.set_aside == 3 and len(found.new) == 4 and found.kind == PASS


def test_a_busy_machine_is_not_launched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    order: list[str] = []
    busy = Watch(lambda: Reading(0.4, 0.05))
    for found in (
        measure(Sequence("A", [], order), [Launch((1.0,))] * 3, Rule(3, 0.03, 2), busy),
        measure_one(Sequence("A", [], order), Rule(3, 0.03, 2), busy),
    ):
        assert found.kind == INCONCLUSIVE and "under load" in found.why and not order


def test_a_launch_without_steps_is_an_error() -> None:
    with pytest.raises(RunError, match="timed no step"):
        measure(lambda: Launch(()), [Launch((1.0,))] * 3, Rule(3, 0.03, 0), quiet())


# --- the machine


def test_what_disturbs() -> None:
    assert disturbance(Reading(0.95, 0.05), 0.05) == ""
    assert "its cores gave 60% of their time" in disturbance(Reading(0.6, 0.05), 0.05)
    assert "a core gave 50% of its time" in disturbance(Reading(0.99, 0.05, worst=0.5), 0.05)
    assert "throttled: the same work took 1.60 times" in disturbance(Reading(1.0, 0.08), 0.05)
    assert disturbance(Reading(1.0, 0.05, "device 0 is in use"), 0.05) == "device 0 is in use"


def test_what_nvidia_smi_says() -> None:
    idle = "0, 4, 143771, 0x0000000000000001\n1, 4, 143771, 0x0000000000000004\n"
    assert hindered(idle) == "", "an idle device, and one at its power cap"
    assert "device 0 is in use: 97.7 GiB" in hindered("0, 100000, 143771, 0x0000000000000000\n")
    assert "device 1 is throttled" in hindered(
        "0, 4, 9, 0x1\n1, 4, 143771, 0x0000000000000040\n".replace("4, 9", "0, 9")
    )
    assert hindered("nothing that one knows\n0, N/A, N/A, [N/A]\n") == ""


def _spin(until: float) -> None:
    while time.time() < until:
        pass


@pytest.mark.alone
def test_a_load_is_seen() -> None:
    """Real processes, three on every core: none of them gets its time."""
    context = multiprocessing.get_context("fork")
    until = time.time() + 3
    busy = [context.Process(target=_spin, args=(until,)) for _ in range(3 * len(calm.all_cores()))]
    for process in busy:
        process.start()
    try:
        time.sleep(0.5)
        assert "under load" in disturbance(calm.read(), 1.0)
    finally:
        for process in busy:
            process.kill()
            process.join()


# --- exact checks


def launches(*peaks: tuple[int, ...], losses: tuple[float | None, ...] = (), tokens: str = "") -> list[Launch]:
    return [Launch((1.0,), peak, "", losses, tokens) for peak in peaks]


def test_memory_is_of_each_rank() -> None:
    base = launches((1000, 2000), (1000, 2000), (1000, 2000))
    assert memory(launches((1010, 2000)), base).state == "ok"
    worse = memory(launches((1020, 1000)), base)
    assert worse.state == WORSE and "rank 0" in worse.said and "+2.00%" in worse.said
    assert memory(launches((900, 1900)), base).state == "better"
    for other in (launches((1000,)), launches(())):
        assert memory(other, base).state == UNKNOWN
    assert memory(base, launches(())).state == UNKNOWN


@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1e-9), ("fp32", 1e-4), ("bf16", 1e-2)])
def test_losses_are_equal_within_the_precision(precision: str, bound: float) -> None:
    base = launches((1,), losses=(5.0, 4.0, 3.0))
    for factor, state in ((1 + 0.9 * bound, "ok"), (1 + 1.1 * bound, UNEQUAL), (1 - 1.1 * bound, UNEQUAL)):
        found = losses(launches((1,), losses=(5.0, 4.0 * factor)), base, precision)
        assert found is not None and found.state == state
    assert losses(launches((1,)), base, precision) is None
    there = losses(base, launches((1,)), precision)
    assert there is not None and there.state == UNKNOWN


def test_a_loss_that_is_no_number_is_no_equal_one() -> None:
    base, nan = launches((1,), losses=(5.0, 4.0)), launches((1,), losses=(5.0, None))
    for new, old, state in ((nan, base, UNEQUAL), (base, nan, UNEQUAL), (nan, nan, "ok")):
        found = losses(new, old, "bf16")
        assert found is not None and found.state == state
    one_of_them = [*launches((1,), losses=(5.0, 4.0)), *launches((1,), losses=(5.0, 4.5))]
    found = losses(one_of_them, base, "bf16")
    assert found is not None and found.state == UNEQUAL and "step 1" in found.said


def test_answers_are_equal_token_for_token() -> None:
    one, other = tokens_digest([[1, 2]]), tokens_digest([[1, 3]])
    assert tokens_digest([]) == "" and one != other and one == tokens_digest([(1, 2)])
    states = [
        (found.state if (found := tokens(launches((), tokens=new), launches((), tokens=base))) else None)
        for new, base in ((one, one), (one, other), (one, ""), ("", one))
    ]
    assert states == ["ok", UNEQUAL, UNKNOWN, None]


def test_the_worst_code_of_several() -> None:
    of: Callable[[int], Outcome] = lambda code: Outcome("r", "v", code, "m")  # noqa: E731
    assert exit_code([]) == 0 and exit_code([of(0), of(9)]) == 9 and exit_code([of(9), of(8), of(7), of(0)]) == 7
    assert [exit_code([of(a), of(b)]) for a, b in pairwise(WORST_FIRST)] == [*WORST_FIRST[:-1]]
    bad = memory(launches((2,)), launches((1,)))
    assert whole(INCONCLUSIVE, [bad]) == REGRESSED, "what is exact needs no precise time"
    assert whole(PASS, []) == PASS
