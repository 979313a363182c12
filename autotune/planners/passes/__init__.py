"""Passes: each takes a program and gives a program, complete in one respect more. PASSES is their fixed order."""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.communicate import communicate
from autotune.planners.passes.join import join
from autotune.planners.passes.offload import offload
from autotune.planners.passes.seat import Listing, Seat, Ways, ways_of
from autotune.planners.passes.settle import settle
from autotune.planners.passes.shard import shard
from autotune.planners.passes.update import update
from autotune.planners.passes.vocabulary import meet
from autotune.spec.program import Program

__all__ = ["OWN", "PASSES", "Listing", "Own", "Pass", "Seat", "Ways", "ways_of"]

Pass = Callable[[Program, Traits], Program]
Own = Callable[[Listing, Seat, Traits], Listing]

# Those that look at one rank's list at a time. The others only add instructions, whatever they find.
OWN: dict[str, Own] = {"offload": offload, "join": join, "vocabulary": meet, "shard": shard, "update": update}


def each(own: Own) -> Pass:
    """The pass over every rank's list."""

    def apply(program: Program, traits: Traits) -> Program:
        ways = ways_of(program.ranks, traits)
        lists = [own(listing, Seat(rank, ways), traits) for rank, listing in enumerate(program.ranks)]
        return Program(tuple(map(tuple, lists)), program.buffers, program.live, program.facts)

    return apply


PASSES: dict[str, Pass] = {
    "offload": each(OWN["offload"]),
    "join": each(OWN["join"]),
    "vocabulary": each(OWN["vocabulary"]),
    "communicate": lambda program, traits: communicate(program),
    "shard": each(OWN["shard"]),
    "update": each(OWN["update"]),
    "settle": settle,
}
