"""What came of a gate, for one recipe and for all of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.gate.checks import UNEQUAL, WORSE, Check
from autotune.gate.rule import IMPROVED, INCONCLUSIVE, PASS, REGRESSED, Interval
from autotune.spec.errors import AutotuneError, Inconclusive, Regression, WrongNumbers
from autotune.spec.lock import Launch

UPDATED, REPORTED, ERROR = "updated", "reported", "error"
WRONG = "wrong numbers"

# Exit codes, the worst first: our bug, wrong numbers, a regression, what could not be held at all, stale, inconclusive.
WORST_FIRST = (1, 6, 7, 5, 3, 2, 4, 8, 9, 0)
CODES = {
    WRONG: WrongNumbers.exit_code,
    REGRESSED: Regression.exit_code,
    INCONCLUSIVE: Inconclusive.exit_code,
    PASS: 0,
    IMPROVED: 0,
    UPDATED: 0,
    REPORTED: 0,
}


@dataclass(frozen=True)
class Outcome:
    """`verdict`: pass, improved, regressed, inconclusive, wrong numbers, updated (a new baseline was written), reported
    (another machine's baseline: figures and no judgement) or error. Times in seconds."""

    recipe: str
    verdict: str
    exit_code: int
    message: str  # what was found, in a sentence
    mode: str = "measured"  # or predicted
    hint: str = ""
    plan_id: str = ""
    baseline: str = ""  # in words
    threshold: float = 0.0
    found: Interval | None = None
    new: tuple[Launch, ...] = ()
    base: tuple[Launch, ...] = ()
    set_aside: int = 0
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    run_id: str = ""
    wall_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The form of `gate --json`."""
        found = self.found
        return {
            "recipe": self.recipe,
            "mode": self.mode,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "message": self.message,
            "plan_id": self.plan_id,
            "baseline": self.baseline,
            "threshold": self.threshold,
            "ratio": found.ratio if found else None,
            "interval": [found.low, found.high] if found else None,
            "launches": {
                "new": [launch.median_s for launch in self.new],
                "baseline": [launch.median_s for launch in self.base],
                "set_aside": self.set_aside,
            },
            "checks": [{"name": c.name, "state": c.state, "said": c.said} for c in self.checks],
            "notes": list(self.notes),
            "run_id": self.run_id,
            "wall_s": self.wall_s,
        }


def failed(recipe: str, error: AutotuneError, mode: str) -> Outcome:
    """The outcome of a gate that could not be held."""
    return Outcome(recipe, ERROR, error.exit_code, str(error), mode, error.hint or "")


def whole(kind: str, checks: Sequence[Check]) -> str:
    """The verdict of a kind of time and the exact checks beside it: an exact one needs no precise time."""
    if any(check.state == UNEQUAL for check in checks):
        return WRONG
    return REGRESSED if any(check.state == WORSE for check in checks) else kind


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The worst of all, by WORST_FIRST."""
    return min((outcome.exit_code for outcome in outcomes), key=WORST_FIRST.index, default=0)
