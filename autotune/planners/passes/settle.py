"""The settling pass: the last step's update is judged by the whole norm, which comes back from the last rank.

Zero Bubble (2401.10241, section 4 and appendix C). The whole norm of the last step goes from the last rank to the first
while the ranks are already in this step's warm-up. VALIDATE compares: a rank that has updated wrongly takes its update
back and does it again, and since weights were wrong somewhere, every rank begins the step again. So VALIDATE stands
where beginning again costs nothing but time: before the first instruction that changes what outlives the step, and
before any receive of a message that its sender sends only after its own VALIDATE. CLEAR then empties the gradients.
"""

from __future__ import annotations

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.clip import NORM, POST_VALIDATED, WHOLE, message
from autotune.planners.schedules import held
from autotune.spec.program import Instruction, Program

SETTLES = frozenset({"STATE_RECV", "STATE_SEND", "VALIDATE", "CLEAR"})  # what is left to do after the last step


def settle(program: Program, traits: Traits) -> Program:
    """Adds STATE_RECV, STATE_SEND, VALIDATE and CLEAR where updates come before their norm is known."""
    if traits.optimizer != POST_VALIDATED:
        return program
    ranks = []
    for rank, (listing, at) in enumerate(zip(program.ranks, places(program), strict=True)):
        stages = held(traits.place, rank)
        last = rank == program.world - 1
        known = NORM if last else WHOLE
        received = [] if last else [message("STATE_RECV", stages[0], WHOLE, WHOLE, (rank + 1, rank))]
        judged = [message("STATE_SEND", stages[0], known, WHOLE, (rank, rank - 1))] if rank else []
        states = tuple(f"{letter}.{stage}" for letter in "wog" for stage in stages)
        kept = tuple(name for name in states if name[0] != "o")
        judged.append(Instruction("VALIDATE", stages[0], reads=(known, *kept), writes=(NORM, *states)))
        judged += [Instruction("CLEAR", s, reads=(f"g.{s}",), writes=(f"g.{s}",)) for s in stages]
        ranks.append((*received, *listing[:at], *judged, *listing[at:]))
    return Program(tuple(ranks), program.buffers, program.live, program.facts)


def places(program: Program) -> list[int]:
    """For each rank the last position where the step can still begin again."""
    found = [_first_change(program, rank) for rank in range(program.world)]
    sends = {i.meet: (rank, at) for rank, at, i in program if i.meet and not i.writes}
    moved = True
    while moved:
        moved = False
        for rank, listing in enumerate(program.ranks):
            for at, instruction in enumerate(listing[: found[rank]]):
                source, sent = sends.get(instruction.meet or "", (rank, -1))
                if instruction.writes and sent >= found[source]:
                    found[rank], moved = at, True
                    break
    return found


def _first_change(program: Program, rank: int) -> int:
    buffers, listing = program.buffers[rank], program.ranks[rank]
    return next(at for at, i in enumerate(listing) if any(buffers[name].persistent for name in i.writes))
