"""Launching: one side beside a stored baseline, or two sides in turn, until the rule has an answer.

Two sides go A B, B A, A B, ...: what drifts over minutes falls on both alike. A launch beside which the machine was not
fit to be measured on does not count, whatever it took: another takes its place, up to the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotune.gate.calm import Watch, reasons
from autotune.gate.rule import INCONCLUSIVE, LEAST, Interval, interval, verdict
from autotune.spec.errors import RunError
from autotune.spec.lock import Launch

MORE = 2  # launches a side that a retry adds

Side = Callable[[], Launch]  # one launch of all workers


@dataclass(frozen=True)
class Rule:
    """How many launches a side, and which change counts."""

    launches: int
    threshold: float
    retries: int
    seed: int = 0

    @property
    def most(self) -> int:
        """Launches a side after the last retry."""
        return self.launches + self.retries * MORE


@dataclass(frozen=True)
class Measured:
    """What was launched. `new`, `base`: those that count; `set_aside`: how many did not; `why`: what made the answer
    inconclusive, "" where it is conclusive."""

    new: tuple[Launch, ...]
    base: tuple[Launch, ...]
    found: Interval | None
    kind: str
    set_aside: int = 0
    why: str = ""


def medians(launches: Sequence[Launch]) -> list[float]:
    """The samples of a side, seconds."""
    return [launch.median_s for launch in launches]


def measure(
    new: Side,
    base: Side | Sequence[Launch],
    rule: Rule,
    watch: Watch,
    tell: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Launches until the rule is conclusive or retries are used up. `base`: the other side, or its stored launches.

    Raises RunError where a launch fails or times no step.
    """
    stored = None if callable(base) else tuple(base)
    if wrong := watch.settled():
        return Measured((), stored or (), None, INCONCLUSIVE, why=wrong)
    taken: list[tuple[bool, Launch]] = []  # whether it is of the new side, in the order of launching
    for number in range(1, rule.most + 1):
        pair = ((True, new),) if stored is not None else ((True, new), (False, base))
        for is_new, side in pair if number % 2 else pair[::-1]:
            tell(f"launch {number} of {'this' if is_new else 'the baseline'}")
            launch = side() if callable(side) else None
            if launch is None or not launch.step_s:
                raise RunError("a launch timed no step")
            watch.take()
            taken.append((is_new, launch))
        if number < rule.launches or (number - rule.launches) % MORE:
            continue
        found = _answer(taken, stored, rule, watch)
        if found.kind != INCONCLUSIVE or number == rule.most:
            return found
        tell(f"inconclusive ({found.why}): {MORE} more launches a side")
    raise AssertionError("unreachable")


def _answer(
    taken: Sequence[tuple[bool, Launch]], stored: tuple[Launch, ...] | None, rule: Rule, watch: Watch
) -> Measured:
    """What the launches so far say."""
    calm = [entry for number, entry in enumerate(taken) if not watch.around(number)]
    new = tuple(launch for is_new, launch in calm if is_new)
    base = tuple(launch for is_new, launch in calm if not is_new) if stored is None else stored
    aside = len(taken) - len(calm)
    if len(new) < rule.launches or (stored is None and len(base) < rule.launches):
        wrong = "; ".join(reasons(watch, range(len(taken))))
        return Measured(new, base, None, INCONCLUSIVE, aside, f"{wrong}; {aside} of {len(taken)} launches set aside")
    found = interval(medians(new), medians(base), rule.seed)
    kind = verdict(found, rule.threshold)
    why = f"the interval is {found.half_width:.1%} to either side, and the threshold {rule.threshold:.1%}"
    return Measured(new, base, found, kind, aside, why if kind == INCONCLUSIVE else "")


def measure_one(new: Side, rule: Rule, watch: Watch, tell: Callable[[str], None] = lambda text: None) -> Measured:
    """Launches one side alone, for a baseline: as many calm launches as the rule wants, within its bound."""
    if wrong := watch.settled():
        return Measured((), (), None, INCONCLUSIVE, why=wrong)
    taken: list[Launch] = []
    calm: list[Launch] = []
    while len(taken) < rule.most and len(calm) < max(rule.launches, LEAST):
        tell(f"launch {len(taken) + 1} of a new baseline")
        taken.append(new())
        watch.take()
        calm = [launch for number, launch in enumerate(taken) if not watch.around(number)]
    aside = len(taken) - len(calm)
    if len(calm) < rule.launches:
        wrong = "; ".join(reasons(watch, range(len(taken))))
        return Measured((), (), None, INCONCLUSIVE, aside, f"{wrong}; {aside} of {len(taken)} launches set aside")
    return Measured(tuple(calm), (), interval(medians(calm), medians(calm), rule.seed), "", aside)
