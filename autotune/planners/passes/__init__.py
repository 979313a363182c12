"""Passes: each takes a program and gives a program, complete in one respect more. PASSES is their fixed order."""

from __future__ import annotations

from collections.abc import Callable

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.communicate import communicate
from autotune.planners.passes.join import join
from autotune.planners.passes.offload import offload
from autotune.planners.passes.settle import settle
from autotune.planners.passes.shard import shard
from autotune.planners.passes.update import update
from autotune.planners.passes.vocabulary import meet
from autotune.spec.program import Program

Pass = Callable[[Program, Traits], Program]

PASSES: dict[str, Pass] = {
    "offload": offload,
    "join": join,
    "vocabulary": meet,
    "communicate": lambda program, traits: communicate(program),
    "shard": shard,
    "update": update,
    "settle": settle,
}

# Those that look at one rank's list at a time (the vocabulary's also at who has the ends of the pipeline). The others
# only add instructions, whatever they find.
OWN = ("offload", "join", "vocabulary", "shard", "update")
