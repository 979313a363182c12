"""Stays: when each of several things is brought in, and for how long it stays, where there is room for a few at once.

The uses are known beforehand, so what makes way is what is needed again last, which brings in as little as can be
(Belady 1966, "A study of replacement algorithms for a virtual-storage computer").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple


class Use(NamedTuple):
    """A step, by its position in a list, that needs a thing."""

    position: int
    thing: int


class Stay(NamedTuple):
    """A thing is brought in before the step at `begin` and leaves after the one at `last`; all but `thing` are
    positions. `first` is that of its first use."""

    thing: int
    begin: int
    first: int
    last: int


class _Run(NamedTuple):
    """Uses of one thing in a row: positions, and the number of the next run of the same thing."""

    thing: int
    first: int
    last: int
    next: int


def stays(uses: Sequence[Use], room: int, early: bool) -> list[Stay]:
    """The stays of all things, in the order in which they begin. A stay begins and ends between runs of uses.

    `room` is how many things may be there at once (0: all). `early`: each is brought in as soon as there is room for it
    beside what is there until then, those needed first before the others; else when it is first needed.
    """
    runs = _runs(uses)
    room = room or len(runs)
    spans = _spans(runs, room)
    begins = _early(spans, len(runs), room) if early else [first for first, _ in spans]
    return [
        Stay(runs[first].thing, runs[begin].first, runs[first].first, runs[last].last)
        for begin, (first, last) in zip(begins, spans, strict=True)
    ]


def rounds(uses: Sequence[Use], number: Sequence[int]) -> list[Stay]:
    """The stays of all things, one for each of a thing's rounds (`number`, of each use), whatever room they take.

    Each is brought in while another is in use, so that it is there in time.
    """
    found: dict[tuple[int, int], Stay] = {}
    earlier = None  # the run of uses before this one
    for (thing, one), group in groupby(zip(uses, number, strict=True), key=lambda pair: (pair[0].thing, pair[1])):
        positions = [use.position for use, _ in group]
        run = Stay(thing, positions[0], positions[0], positions[-1])
        if (thing, one) in found:
            found[thing, one] = found[thing, one]._replace(last=run.last)
        else:
            ahead = earlier.first if earlier is not None and earlier.thing != thing else run.first
            found[thing, one] = run._replace(begin=ahead)
        earlier = run
    return list(found.values())


def _spans(runs: Sequence[_Run], room: int) -> list[tuple[int, int]]:
    """The first and last run of each stay, by the first, where each begins when it is needed."""
    here: dict[int, int] = {}  # what is there -> the next run that needs it
    open_: dict[int, list[int]] = {}
    found: list[list[int]] = []
    for number, run in enumerate(runs):
        if run.thing not in here:
            if len(here) >= room:
                del here[max(here, key=here.__getitem__)]
            open_[run.thing] = [number, number]
            found.append(open_[run.thing])
        open_[run.thing][1] = number
        here[run.thing] = run.next
        if run.next == len(runs):
            del here[run.thing]
    return [(first, last) for first, last in found]


def _early(spans: Sequence[tuple[int, int]], runs: int, room: int) -> list[int]:
    """The run before which each stay begins, if it comes as soon as there is room, but none before an earlier one."""
    there = [0] * runs
    for first, last in spans:
        for number in range(first, last + 1):
            there[number] += 1
    begins: list[int] = []
    for first, _ in spans:
        begin = first
        while begin > (begins[-1] if begins else 0) and there[begin - 1] < room:
            begin -= 1
            there[begin] += 1
        begins.append(begin)
    return begins


def _runs(uses: Sequence[Use]) -> list[_Run]:
    found: list[_Run] = []
    groups = [list(run) for _, run in groupby(uses, key=lambda use: use.thing)]
    later: dict[int, int] = {}
    for number in range(len(groups) - 1, -1, -1):
        run = groups[number]
        thing = run[0].thing
        found.append(_Run(thing, run[0].position, run[-1].position, later.get(thing, len(groups))))
        later[thing] = number
    return found[::-1]
