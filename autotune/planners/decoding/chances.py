"""Probabilities that callers measured, checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence

NEAR = 1e-9  # what a sum of probabilities may be off by


def chances(what: str, values: Sequence[float]) -> tuple[float, ...]:
    """The same numbers as floats. ValueError unless each is from 0 to 1."""
    for i, value in enumerate(values):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{what} from 0 to 1 (found {value:g} at {i})")
    return tuple(map(float, values))


def exclusive(what: str, values: Sequence[float]) -> tuple[float, ...]:
    """Probabilities of which at most one comes true. ValueError where they add up to more than 1."""
    found = chances(what, values)
    if sum(found) > 1.0 + NEAR:
        raise ValueError(f"{what} that add up to at most 1 (found {sum(found):g})")
    return found


def whole(what: str, values: Sequence[float]) -> tuple[float, ...]:
    """A distribution. ValueError where it is empty or does not add up to 1."""
    found = chances(what, values)
    if abs(sum(found) - 1.0) > NEAR:
        raise ValueError(f"{what} that add up to 1 (found {sum(found):g})")
    return found


def at_least(what: str, value: int, least: int) -> int:
    """The same number. ValueError where it is below `least`."""
    if value < least:
        raise ValueError(f"{what}: {least} or more (found {value})")
    return value
