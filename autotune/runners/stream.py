"""Answers as they grow: a worker that has them writes lines, and whoever waits for the run reads along. No torch here.

A line is JSON: the number of a sequence and its new tokens. What may turn out to be the beginning of a stop is held
back until it is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

from autotune.runners.stops import STOP, cut

Tell = Callable[[int, Sequence[int]], None]  # the number of a sequence, and its new tokens
NAME = "stream-*.jsonl"


@dataclass
class Teller:
    """Of one worker: `told` tokens of each sequence are in the file."""

    file: TextIOWrapper
    stops: tuple[str, ...]
    told: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, rank: int, stops: tuple[str, ...]) -> Teller:
        return cls(open(folder / NAME.replace("*", str(rank)), "w"), stops)

    def tell(self, first: int, rows: Sequence[Sequence[int]], last: bool) -> None:
        """Writes what is new of the answers so far, `first` the number of their first sequence; all of it at the
        `last` time."""
        held = max((len(stop.encode()) for stop in self.stops), default=1) - 1
        for number, row in enumerate(rows, first):
            tokens, why = cut(row, self.stops)
            begin = self.told.get(number, 0)
            end = len(tokens) if last or why == STOP else max(begin, len(tokens) - held)
            if end > begin:
                self.file.write(json.dumps([number, tokens[begin:end]]) + "\n")
                self.told[number] = end
        self.file.flush()


@dataclass
class Reader:
    """Reads along in the files of all workers of a run."""

    folder: Path
    tell: Tell
    at: dict[Path, int] = field(default_factory=dict)

    def look(self) -> None:
        """Tells what has come since."""
        for file in sorted(self.folder.glob(NAME)):
            for number, tokens in self._lines(file):
                self.tell(number, tokens)

    def _lines(self, file: Path) -> Iterator[tuple[int, list[int]]]:
        with open(file, "rb") as stream:
            stream.seek(self.at.get(file, 0))
            for line in stream:
                if not line.endswith(b"\n"):  # the rest of it is still to be written
                    break
                self.at[file] = self.at.get(file, 0) + len(line)
                number, tokens = json.loads(line)
                yield number, tokens
