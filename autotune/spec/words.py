"""Numbers with their nouns, as messages say them."""

from __future__ import annotations


def counted(number: int, noun: str, several: str = "") -> str:
    """`1 worker`, `2 workers`; `several` is the plural where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else several or noun + 's'}"
