"""What is brought in where there is room for a few: as seldom as can be, never more at once than there is room for."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest

from autotune.planners.passes.stays import Stay, Use, rounds, stays


def drawn(seed: int) -> tuple[list[Use], int]:
    """Uses of up to four things at growing positions, and room for some of them."""
    draw = random.Random(seed)
    things, position, found = draw.randint(1, 4), 0, []
    for _ in range(draw.randint(1, 14)):
        position += draw.randint(1, 3)
        found.append(Use(position, draw.randrange(things)))
    return found, draw.randint(0, 4)


def fewest(uses: list[Use], room: int) -> int:
    """How often something must be brought in, by trying every choice of what makes way."""
    things = tuple(use.thing for use in uses)

    @lru_cache(None)
    def least(at: int, here: frozenset[int]) -> int:
        if at == len(things):
            return 0
        if things[at] in here:
            return least(at + 1, here)
        if len(here) < (room or len(things)):
            return 1 + least(at + 1, here | {things[at]})
        return 1 + min(least(at + 1, here - {gone} | {things[at]}) for gone in here)

    return least(0, frozenset())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("seed", range(200))
def test_stays_are_few_and_fit(seed: int, early: bool) -> None:
    uses, room = drawn(seed)
    found = stays(uses, room, early)
    assert len(found) == fewest(uses, room)
    for position, thing in uses:  # covered by one stay, which begins where it is used unless it may come early
        (stay,) = [s for s in found if s.thing == thing and s.begin <= position <= s.last]
        assert stay.first <= position and (early or stay.begin == stay.first)
    positions = {use.position for use in uses}
    for at in positions:
        there = [s.thing for s in found if s.begin <= at <= s.last]
        assert len(there) == len(set(there)) <= (room or len(there))
    for stay in found:
        assert {stay.begin, stay.first, stay.last} <= positions


def test_with_room_for_all_each_comes_once_and_at_the_start() -> None:
    uses = [Use(position, position % 3) for position in range(5, 17)]
    assert {(s.begin, s.thing) for s in stays(uses, 0, early=True)} == {(5, 0), (5, 1), (5, 2)}
    assert stays(uses, 3, early=True) == stays(uses, 0, early=True)


def test_with_room_for_two_the_next_comes_while_one_is_used() -> None:
    uses = [Use(position, position // 2) for position in range(8)]
    assert [(s.thing, s.begin, s.last) for s in stays(uses, 2, early=True)] == [
        (0, 0, 1),
        (1, 0, 3),
        (2, 2, 5),
        (3, 4, 7),
    ]


def test_one_stay_a_round_each_brought_in_beside_another() -> None:
    """A unit down two things and up again, and another: at the turn nothing leaves, between units all does."""
    uses = [Use(position, thing) for position, thing in enumerate((0, 1, 1, 0, 0, 1, 1, 0))]
    assert rounds(uses, (0, 0, 0, 0, 1, 1, 1, 1)) == [
        Stay(0, 0, 0, 3),
        Stay(1, 0, 1, 2),
        Stay(0, 4, 4, 7),
        Stay(1, 4, 5, 6),
    ]
    assert rounds([Use(2, 5), Use(3, 5), Use(6, 5)], (0, 0, 1)) == [Stay(5, 2, 2, 3), Stay(5, 6, 6, 6)]
    assert rounds([], ()) == []


def test_nothing_to_do() -> None:
    assert stays([], 1, early=True) == []
    assert stays([Use(4, 7)], 1, early=True) == [Stay(7, 4, 4, 4)]
