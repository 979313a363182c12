"""What a recipe aims at: its objective, or the several that make a front, and what each device costs or draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autotune.spec.errors import Problem, UsageError
from autotune.spec.machine import Profile
from autotune.spec.objectives import KNEE, LACKING, MOST, OBJECTIVES, PRICE, STATED, Rate
from autotune.spec.recipe_schema import DEVICES, RecipeFile

TOLERANCE = 0.005  # of a front, where the recipe says none


def _listed(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [] if value is None else [str(value)]


@dataclass(frozen=True)
class Aim:
    """`names`: the objectives, the first first; `devices`: how many a plan may use, as the recipe has it."""

    names: tuple[str, ...]
    prefer: str
    tolerance: float
    devices: object  # a number, a list, a range, or None
    price: float | None

    @classmethod
    def of(cls, file: RecipeFile) -> Aim:
        section = file.objective
        names = (*_listed(section.minimize), *_listed(section.maximize)) or ("step_time",)
        front = len(names) > 1
        tolerance = (TOLERANCE if section.tolerance is None else section.tolerance) if front else 0.0
        devices = getattr(file.search, "devices", None)
        return cls(tuple(names), section.prefer or "", tolerance, devices, file.machine.price_per_hour)

    @property
    def lead(self) -> str:
        """The objective that ranks plans."""
        return self.prefer if self.prefer in self.names else self.names[0]

    @property
    def front(self) -> tuple[str, ...]:
        """The objectives that a front is searched for; none where one ranks plans by itself. What counts devices is a
        front of its own: fewer devices may take longer and cost less."""
        return self.names if len(self.names) > 1 or self._counts else ()

    @property
    def _counts(self) -> bool:
        return any(OBJECTIVES[name].rate for name in self.names)

    def worlds(self, most: int, path: str) -> tuple[int, ...]:
        """How many of `most` devices a plan may use; empty: all. Where an objective counts devices and the recipe says
        nothing, every divisor. UsageError for more devices than there are, or where only one number can be meant."""
        if self.devices is None:
            return tuple(d for d in range(1, most + 1) if most % d == 0) if self._counts else ()
        found = tuple(sorted(int(str(value)) for value in DEVICES.values(self.devices)))
        if found[-1] > most:
            said = Problem(path, "search.devices", str(found[-1]), f"at most machine.devices = {most}", str(most))
            raise UsageError("the space has plans for more devices than there are", problems=[said])
        return found

    def rates(self, profile: Profile, path: str) -> dict[str, Rate]:
        """What the objectives need to know of one device. UsageError where neither recipe nor profile says it."""
        found = dict[str, Rate]()
        for name in self.names:
            need = OBJECTIVES[name].rate
            rate = STATED[need](profile) if need else None
            if need == PRICE and self.price is not None:
                rate = Rate(self.price, "the recipe's [machine] price_per_hour")
            if need and rate is None:
                said = Problem(path, "objective", f"{name}, and the profile {profile.name} says nothing of it", LACKING[need])
                raise UsageError(f"the objective {name} has nothing to rest on", problems=[said])
            if rate is not None:
                found[need] = rate
        return found


def objective_problems(at: Callable[..., Problem], objective: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with objectives beside their shape: too many together, and a preference for none of them."""
    names = [*_listed(objective.get("minimize")), *_listed(objective.get("maximize"))]
    alone = [len(_listed(objective.get(key))) for key in ("minimize", "maximize")]
    if len(names) > MOST >= max(alone):
        yield at("objective.maximize", f"{len(names)} objectives", f"at most {MOST} of minimize and maximize together")
    prefer = objective.get("prefer")
    if prefer is not None and prefer in (*OBJECTIVES, KNEE) and (len(names) < 2 or prefer not in (*names, KNEE)):
        expected = f"one of {', '.join((*names, KNEE))}" if len(names) > 1 else "none: there is one objective"
        yield at("objective.prefer", repr(prefer), expected)
