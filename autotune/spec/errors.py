"""Errors as part of the product: what was wrong, where, what would be right, and the exit code that says so.

Exit codes: 0 ok, 1 our bug, 2 usage or invalid recipe, 3 no feasible plan, 4 environment, 5 the run failed,
6 wrong numbers, 7 regression, 8 stale lock, 9 inconclusive, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one input: `file: key: found X; expected Y (nearest: Z)`."""

    file: str
    key: str
    found: str
    expected: str
    nearest: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        hint = f" (nearest: {self.nearest})" if self.nearest is not None else ""
        return f"{where}: found {self.found}; expected {self.expected}{hint}"


class AutotuneError(Exception):
    """Base of every error a user can cause or meet. `exit_code` is the process's own."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {problem}" for problem in self.problems)])


class UsageError(AutotuneError):
    """Wrong flags, or a recipe, model or profile file that does not say what it must."""

    exit_code = 2


class InfeasibleError(AutotuneError):
    """No plan in the space fits; the message carries the binding constraints."""

    exit_code = 3


class EnvironmentFault(AutotuneError):
    """The machine, the database or an installed version is not what the command needs."""

    exit_code = 4


class RunError(AutotuneError):
    """Workers died or ran out of memory."""

    exit_code = 5


class WrongNumbers(AutotuneError):
    """A checked run differs from the one-process reference by more than its bound."""

    exit_code = 6


class Regression(AutotuneError):
    exit_code = 7


class StaleLock(AutotuneError):
    """The recipe, the model or the machine changed since the lock was written."""

    exit_code = 8


class Inconclusive(AutotuneError):
    exit_code = 9


def nearest_name(name: str, choices: Iterable[str]) -> str | None:
    """The closest spelling among `choices`, or None when nothing is near."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return close[0] if close else None


def nearest_divisor(value: int, of: int) -> int:
    """The divisor of `of` closest to `value` (the smaller of two equally near)."""
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: (abs(d - value), d))
