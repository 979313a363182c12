"""Reads typed fields out of a table that a person wrote, and remembers every problem instead of stopping at the first.

A field that is missing or wrong gives a harmless stand-in, so that the rest can still be read; `raise_problems` then
reports all of them in one error. `fine` says whether a field can be trusted in a check that combines several.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any

from autotune.spec.errors import Problem, UsageError, nearest_name


def shown(value: Any) -> str:
    """A value as an error quotes it: as JSON, and short."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Fields:
    """The fields of `raw`, a table of the file `source`. `default` None makes a field required; null means absent."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source
        self.problems: list[Problem] = []
        self._asked: set[str] = set()
        self._bad: set[str] = set()

    def problem(
        self, key: str, found: str, expected: str, nearest: str | None = None, also: Collection[str] = ()
    ) -> None:
        """Remember that `key` is wrong; it is told under the name in `also` that the file uses, if it uses one."""
        self._bad.add(key)
        key = next((name for name in (key, *also) if self.raw.get(name) is not None), key)
        self.problems.append(Problem(self.source, key, found, expected, nearest))

    def fine(self, *keys: str) -> bool:
        """Whether no problem was found with any of these keys so far."""
        return self._bad.isdisjoint(keys)

    def _get(self, key: str, expected: str, required: bool, also: Collection[str] = ()) -> Any:
        """The value under `key`, or under another name for it in `also`; None when there is none."""
        self._asked.update((key, *also))
        for name in (key, *also):
            if self.raw.get(name) is not None:
                return self.raw[name]
        if required:
            near = get_close_matches(key, sorted(map(str, set(self.raw) - self._asked)), n=1, cutoff=0.8)
            self.problem(key, "no such key", expected, near[0] if near else None)
        return None

    def value(self, key: str) -> Any:
        """Whatever stands under `key`; None when nothing does."""
        return self._get(key, "", False)

    def integer(
        self,
        key: str,
        default: int | None = None,
        *,
        least: int = 1,
        null: int | None = None,
        also: Collection[str] = (),
    ) -> int:
        """A whole number of at least `least`. `null` is what an explicit null means where the key is required."""
        expected = f"a whole number >= {least}"
        if null is not None and key in self.raw and self.raw[key] is None:
            self._asked.add(key)
            return null
        value = self._get(key, expected, default is None, also)
        if value is None:
            return max(least, 1) if default is None else default
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(key, f"{shown(value)} ({type(value).__name__})", expected, also=also)
        elif value < least:
            self.problem(key, shown(value), expected, str(least), also)
        else:
            return value
        return max(least, 1)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key, "a number > 0", default is None)
        if value is None:
            return 1.0 if default is None else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            self.problem(key, f"{shown(value)} ({type(value).__name__})", "a number > 0")
            return 1.0
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, "true or false", False)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(key, f"{shown(value)} ({type(value).__name__})", "true or false")
            return default
        return value

    def choice(self, key: str, choices: Collection[str], default: str, also: Collection[str] = ()) -> str:
        """One of `choices`."""
        value = self._get(key, "a name", False, also)
        if value is None or value in choices:
            return default if value is None else str(value)
        self.problem(key, shown(value), f"one of {', '.join(choices)}", nearest_name(str(value), choices), also)
        return default

    def only(self, key: str, value: Any, why: str) -> None:
        """The field, where it is there at all, must equal `value`: `why` says what other values would mean."""
        found = self._get(key, "", False)
        if found is not None and found != value:
            self.problem(key, shown(found), f"{shown(value)} ({why})", shown(value))

    def integers(self, key: str, below: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to `below` - 1; empty when it is not there."""
        value = self._get(key, "", False)
        whole = isinstance(value, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        if value is None or (whole and all(0 <= i < below for i in value)):
            return tuple(value or ())
        self.problem(key, shown(value), f"a list of whole numbers from 0 to {below - 1}")
        return ()

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; empty when it is not there."""
        value = self._get(key, "", False)
        if value is None or (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
            return tuple(value or ())
        self.problem(key, shown(value), "a list of names")
        return ()

    def table(self, key: str) -> Mapping[str, Any] | None:
        """A table, or None when it is not there."""
        value = self._get(key, "", False)
        if value is None or isinstance(value, Mapping):
            return value
        self.problem(key, f"{shown(value)} ({type(value).__name__})", "a table")
        return None

    def misspelled(self) -> None:
        """Report keys that nobody asked for and that are all but equal to one that was asked for and is not there."""
        absent = self._asked - set(self.raw)
        reported = {problem.nearest for problem in self.problems}
        for key in sorted(set(map(str, self.raw)) - self._asked - reported):
            for meant in get_close_matches(key, sorted(absent), n=1, cutoff=0.9):
                self.problem(key, "an unknown key", "a key of this architecture", meant)

    def unknown(self, ignored: Collection[str]) -> None:
        """Report every key that nobody asked for and that is not in `ignored`, with the nearest that is not there."""
        known = self._asked | set(ignored)
        absent = sorted(known - set(self.raw))
        told = {name for problem in self.problems for name in (problem.key, problem.nearest)}
        for key in sorted(set(map(str, self.raw)) - known - told):
            expected = f"one of {', '.join(sorted(self._asked))}"
            self.problem(key, "an unknown key", expected, nearest_name(key, absent))

    def raise_problems(self, what: str) -> None:
        """UsageError with every problem found, or nothing."""
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            raise UsageError(f"{self.source}: {count} in {what}", problems=self.problems)
