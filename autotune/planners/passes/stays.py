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
    beside all that is needed before it; else when it is first needed.
    """
    runs = _runs(uses)
    never = len(runs)
    room = room or never
    here: dict[int, int] = {}  # what is there -> the next run that needs it
    open_: dict[int, Stay] = {}
    found: list[Stay] = []
    ahead = 0  # everything that runs before this one need is there already

    def leave(thing: int) -> None:
        del here[thing]
        found.append(open_.pop(thing))

    for number, run in enumerate(runs):
        ahead = max(ahead, number)
        while ahead < (never if early else number + 1):
            wanted = runs[ahead]
            if wanted.thing not in here:
                if len(here) >= room:
                    spare = [t for t in here if t != run.thing]
                    last = max(spare, key=here.__getitem__, default=None)
                    if last is None or here[last] <= ahead:
                        break
                    leave(last)
                here[wanted.thing] = ahead
                open_[wanted.thing] = Stay(wanted.thing, run.first, wanted.first, wanted.last)
            ahead += 1
        here[run.thing] = run.next
        open_[run.thing] = open_[run.thing]._replace(last=run.last)
        if run.next == never:
            leave(run.thing)
    return sorted(found, key=lambda stay: (stay.begin, stay.first))


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
