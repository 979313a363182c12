"""The gradients' global norm as instructions of the update: who adds what to whom before which optimizer step.

Buffers of a rank: n, two fp64 numbers: the squared norm as far as this rank knows it, and the first rank's own part of
it; c, what the rank before has handed on; v, what the last rank has handed back.

With a barrier every rank learns the whole norm before it updates. Post-validated (Zero Bubble, 2401.10241, section 4)
the norm is added up from the first rank to the last, each rank updates with what has come to it so far, and goes on;
`passes.settle` brings the whole back in the next step.
"""

from __future__ import annotations

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.communicate import lane_of
from autotune.spec.program import DATA, TENSOR, Instruction

NORM, CARRIED, WHOLE = "n", "c", "v"
POST_VALIDATED = "post-validated"


def norms(rank: int, traits: Traits) -> list[Instruction]:
    """What makes this rank's n, once its gradients are summed.

    A stage that two directions hold counts on the first of its ranks: so what a rank knows covers all that it updates,
    and no update takes in a NaN, which no equation could take out again. A shard of the vocabulary counts on its own.
    """
    place, ranks = traits.place, traits.pipe.ranks
    stages = traits.held(rank)
    own = [stage for stage in stages if stage == len(place) or min(place[stage]) == rank]
    n = (NORM,)
    found = [
        Instruction("NORM", stage, reads=(f"g.{stage}", *(n if number else ())), writes=n)
        for number, stage in enumerate(own)
    ] or [Instruction("NORM", stages[0], writes=n)]
    if traits.tensor > 1:
        found.append(Instruction("NORM_TENSOR", stages[0], lane=TENSOR, reads=n, writes=n))
    if traits.data > 1 and (traits.zero or traits.divided):
        found.append(Instruction("NORM_DATA", stages[0], lane=DATA, reads=n, writes=n))
    if ranks == 1:
        return found
    if traits.optimizer == POST_VALIDATED:
        return found + _chain(rank, ranks, stages[0])
    peers = tuple(range(ranks))
    return [*found, Instruction("NORM_PIPELINE", stages[0], lane="norm", reads=n, writes=n, meet="norm", peers=peers)]


def _chain(rank: int, ranks: int, stage: int) -> list[Instruction]:
    """Adds what the rank before hands on, and hands the sum to the rank behind."""
    found = []
    if rank:
        found.append(message("NORM_RECV", stage, CARRIED, NORM, (rank - 1, rank)))
        found.append(Instruction("NORM_ADD", stage, reads=(CARRIED, NORM), writes=(NORM,)))
    if rank < ranks - 1:
        found.append(message("NORM_SEND", stage, NORM, NORM, (rank, rank + 1)))
    return found


def message(op: str, stage: int, name: str, channel: str, ends: tuple[int, int]) -> Instruction:
    """One end of a message between two ranks on a lane of its own: a receive writes `name`, a send reads it."""
    meet, sends = f"{channel}@{ends[1]}", op.endswith("SEND")
    reads, writes = ((name,), ()) if sends else ((), (name,))
    return Instruction(op, stage, lane=lane_of(*ends, channel), reads=reads, writes=writes, meet=meet, peers=ends)
