"""What goes where: data on stdout, everything said to a person on stderr; no colour and no rewriting off a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from autotune.cli._settings import current

BOLD, RED, DIM, PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[2m", "\x1b[0m"
QUIET_SECONDS = 2.0  # between two progress lines off a terminal


def coloured(stream: TextIO) -> bool:
    """Whether escapes may be written: a terminal, and nobody said no (NO_COLOR, TERM=dumb, --no-color)."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or current().no_color
    return not refused and stream.isatty()


def styled(text: str, style: str, stream: TextIO) -> str:
    return f"{style}{text}{PLAIN}" if coloured(stream) else text


def data(*lines: str) -> None:
    """Lines of the result, for people; under --json nothing but the object goes to stdout."""
    if not current().as_json:
        for line in lines:
            print(line)


def heading(text: str) -> None:
    """A line above a part of the result."""
    data(styled(text, BOLD, sys.stdout))


def emit(schema: str, content: Mapping[str, Any]) -> None:
    """The result as one JSON object, when --json asks for it. Numbers that JSON lacks become null."""
    if current().as_json:
        print(json.dumps(finite({"schema": f"autotune.{schema}/1", **content}), indent=1, sort_keys=True))


def finite(value: Any) -> Any:
    """`value` with tuples as lists and without infinities and NaN, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def say(text: str) -> None:
    """A sentence to the person at the terminal; -q silences it."""
    if not current().quiet:
        print(text, file=sys.stderr)


def detail(text: str) -> None:
    """A sentence for -v."""
    if current().verbose:
        print(text, file=sys.stderr)


def fail(message: str, hint: str | None = None) -> None:
    """An error and what to do about it."""
    print(f"{styled('error:', RED, sys.stderr)} {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as aligned lines; columns in `right` are right-aligned."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


class Progress:
    """Where a long command stands: one line that rewrites itself on a terminal.

    Elsewhere a line of the same kind (by its first word) comes only now and then.

    `keep` prints every sentence as a line of its own: for commands whose progress is their story.
    """

    def __init__(self, keep: bool = False, stream: TextIO | None = None) -> None:
        self.keep = keep
        self.stream = stream or sys.stderr
        self.last = -math.inf
        self.kind = ""
        self.open = False

    def __call__(self, text: str) -> None:
        if current().quiet:
            return
        if self.keep or current().verbose:
            print(text, file=self.stream, flush=True)
        elif self.stream.isatty():
            width = os.get_terminal_size(self.stream.fileno()).columns
            print(f"\r{text[: width - 1]:<{width - 1}}", end="", file=self.stream, flush=True)
            self.open = True
        elif text.split(" ")[0] != self.kind or time.monotonic() - self.last >= QUIET_SECONDS:
            self.kind, self.last = text.split(" ")[0], time.monotonic()
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """End the rewritten line, so that what follows starts on its own."""
        if self.open:
            print(file=self.stream)
            self.open = False
