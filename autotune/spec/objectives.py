"""What a plan can be judged by: the table of objectives, each a multiple of the step's seconds or of the fullest
device's bytes.

Values are the less the better inside a search; `told` makes of them what a user reads. A multiple hangs on how many
devices a plan uses, never on anything else of it: so a lower bound on seconds and bytes is one on every objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from autotune.spec.machine import Profile
    from autotune.spec.prediction import Question

MOST = 3  # objectives of one front
KNEE = "knee"  # what of a front may be locked instead of what is best in one objective
PRICE, POWER = "price_per_hour", "power_watts"  # rates of one device
HOUR = 3600.0
# Coefficients of a profile that say what one device draws: while it works, as measured; at most, by its datasheet.
DRAWN, LIMIT = "power_watts", "power_limit_watts"

Quantity = Literal["seconds", "bytes"]


@dataclass(frozen=True)
class Rate:
    """What one device costs or draws, and where that comes from. `most`: the figure is an upper bound."""

    value: float
    source: str
    most: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "source": self.source, "most": self.most}


@dataclass(frozen=True)
class Objective:
    """One way to judge a plan. `unit` is what a second, or a byte, of a plan on so many devices counts; `rate`: the
    figure of a device that it needs, if any. `most`: the user wants more of it."""

    name: str
    quantity: Quantity
    unit: Callable[[Question, int], float]
    said: str
    rate: str = ""
    most: bool = False

    def value(self, question: Question, world: int, seconds: float, size: float) -> float:
        """The value, the less the better, of a step of so many seconds that takes `size` bytes of the fullest of
        `world` devices."""
        return self.unit(question, world) * (seconds if self.quantity == "seconds" else size)

    def told(self, value: float) -> float:
        """A value as users read it: of a rate the rate."""
        return (1 / value if value else 0.0) if self.most else value


def _cost(question: Question, world: int) -> float:
    return world * question.rates[PRICE].value / HOUR


def _energy(question: Question, world: int) -> float:
    return world * question.rates[POWER].value


_ALL = (
    Objective("step_time", "seconds", lambda q, world: 1.0, "seconds of a step"),
    Objective("latency", "seconds", lambda q, world: 1.0, "seconds of a generation"),
    Objective("peak_memory", "bytes", lambda q, world: 1.0, "bytes of the fullest device"),
    Objective("cost", "seconds", _cost, "price of a step: devices x price an hour x time", PRICE),
    Objective("energy", "seconds", _energy, "joules of a step: devices x power x time", POWER),
    Objective("tokens_per_s", "seconds", lambda q, world: 1 / q.workload.tokens, "tokens a second", most=True),
)
OBJECTIVES: dict[str, Objective] = {each.name: each for each in _ALL}
MINIMIZED = tuple(each.name for each in _ALL if not each.most)
MAXIMIZED = tuple(each.name for each in _ALL if each.most)


def values(question: Question, world: int, seconds: float, size: float) -> tuple[float, ...]:
    """The value of every objective of the question, in its order; the less the better."""
    return tuple(OBJECTIVES[name].value(question, world, seconds, size) for name in question.objectives)


def power_of(profile: Profile) -> Rate | None:
    """Watts of one device while it works: as measured, else its limit, which is an upper bound; None where the profile
    states neither."""
    for name, most in ((DRAWN, False), (LIMIT, True)):
        if found := profile.coefficients.get(name):
            return Rate(found, profile.sources.get(f"coefficients.{name}", profile.name), most)
    return None


def price_of(profile: Profile) -> Rate | None:
    """The price of one device an hour; None where the profile states none."""
    price = profile.device.price_per_hour
    return None if price is None else Rate(price, profile.sources.get("device.price_per_hour", profile.name))


STATED: dict[str, Callable[[Profile], Rate | None]] = {PRICE: price_of, POWER: power_of}
LACKING = {
    PRICE: "[machine] price_per_hour, or a profile with device.price_per_hour",
    POWER: f"a profile that states what a device draws: coefficients.{DRAWN} (measured) or coefficients.{LIMIT} "
    "(datasheet)",
}
