"""Where an answer ends before its last token: at the first of the texts that stop it. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.runners.tokens import BYTES

STOP, LENGTH = "stop", "length"  # why an answer ended


def cut(tokens: Sequence[int], stops: Sequence[str]) -> tuple[list[int], str]:
    """The tokens before the first stop, and why they end there. A text stops where its last byte comes; of two that
    come together the longer one is left out whole."""
    text = bytearray()
    endings = [stop.encode() for stop in stops]
    for number, token in enumerate(tokens):
        # What is no byte is no part of a text: nothing that stops may reach over it.
        text = text + bytes([token]) if 0 <= token < BYTES else bytearray()
        found = max((len(ending) for ending in endings if text.endswith(ending)), default=0)
        if found:
            return list(tokens[: number + 1 - found]), STOP
    return list(tokens), LENGTH


def ended(rows: Sequence[Sequence[int]], stops: Sequence[str]) -> bool:
    """Whether every answer so far has met a stop."""
    return all(cut(row, stops)[1] == STOP for row in rows)
