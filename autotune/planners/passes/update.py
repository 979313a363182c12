"""The update pass: gradients are summed over whoever holds a part of them, and every stage takes its optimizer step.

Eager synchronisation (BitPipe, 2410.19367; Chimera, 2107.06925, section 3.2): a sum starts as soon as the stage's last
backward on this rank is issued, so that it hides behind what is left to do. Late: none starts before the last backward
of the rank, which a token says (MARK); the sums of each lane are the same ones in the same order, so that nothing is
ever earlier than with eager ones. What depends on another rank's progress comes at the end either way: a host that
waits for it would keep this rank from the work that the other one waits for.

Buffers of stage s: q.s the token that lets its late sum begin.
"""

from __future__ import annotations

from collections import defaultdict

from autotune.planners.lower.body import PROGRAMS
from autotune.planners.lower.traits import Traits
from autotune.planners.passes.clip import NORM, POST_VALIDATED, norms
from autotune.planners.passes.seat import Listing, Seat
from autotune.planners.passes.subgroups import fetches, joined, moves, started
from autotune.spec.program import COMPUTE, DATA, TENSOR, Instruction


def update(listing: Listing, seat: Seat, traits: Traits) -> Listing:
    """Adds SUM_PARTIAL (over tensor ranks), SYNC (over a stage's replicas), TIE, the data ranks' sums, and OPT."""
    place, rank = traits.place, seat.rank
    ends = (place[0], place[-1]) if traits.tied and traits.ends and traits.pipe.stages > 1 else ()
    stages = traits.held(rank)
    last = {name: at for at, i in enumerate(listing) for name in i.writes if name[0] == "g"}
    sums: dict[int, list[Instruction]] = defaultdict(list)  # behind the step at this position
    tail: list[Instruction] = []
    shared: dict[tuple[int, ...], int] = {}  # ranks that share stages -> where their last sum stands
    for stage in reversed(stages):  # the order in which gradients come, which all that share stages must agree on
        owners = place[stage] if stage < len(place) else (rank,)
        waits = len(owners) > 1 or (bool(ends) and stage in (0, len(place) - 1))
        early = _sums(stage, owners, traits)
        data = _over_data(stage, traits)
        at = last.get(f"g.{stage}", len(listing) - 1)
        if len(peers := tuple(sorted(owners))) > 1:
            at = shared[peers] = max(at, shared.get(peers, 0))
        sums[at] += early + ([] if waits else data)
        tail = (data if waits else []) + tail
    if traits.sync == "late":
        sums, tail = _late(sums, tail, len(listing) - 1)
    first = stages[0] if traits.ahead else None  # whose subgroups for the device come early
    if first is not None:
        steps_at = [at for at, i in enumerate(listing) if i.op in PROGRAMS]
        at = steps_at[-min(traits.ahead, len(steps_at))] - 1
        sums[at] = [*sums.get(at, ()), *fetches(first, traits.stride)]
    out: list[Instruction] = []
    begin = 0
    for at in sorted(sums):
        out += (*listing[begin : at + 1], *sums[at])
        begin = at + 1
    out += listing[begin:]
    out += _tie(stages, ends, len(place) - 1, traits) if ends else []
    out += tail
    out += norms(rank, traits) if traits.clip else []
    complete = traits.optimizer != POST_VALIDATED or rank == traits.pipe.ranks - 1
    steps = [_step(stage, traits, complete, stage == first) for stage in stages]
    if traits.subgroups:  # the host has all its work before anything waits for it
        for stage, step in zip(stages, steps, strict=True):
            out += [step[0], *moves(stage, traits.stride, stage == first)]
        steps = [[*joined(stage, traits.stride), *step[1:]] for stage, step in zip(stages, steps, strict=True)]
    out += [i for step in steps for i in step]
    return out


def _sums(stage: int, owners: tuple[int, ...], traits: Traits) -> list[Instruction]:
    """Over tensor ranks, and over the stage's replicas: all that the same ranks share on one lane, as they share its
    link."""
    g = (f"g.{stage}",)
    found = []
    if traits.partial[stage]:
        found.append(Instruction("SUM_PARTIAL", stage, lane=TENSOR, reads=g, writes=g))
    if len(owners) > 1:
        peers = tuple(sorted(owners))
        lane, meet = f"replica:{'+'.join(map(str, peers))}", f"sync.{stage}"
        found.append(Instruction("SYNC", stage, lane=lane, reads=g, writes=g, meet=meet, peers=peers))
    return found


def _late(
    sums: dict[int, list[Instruction]], tail: list[Instruction], end: int
) -> tuple[dict[int, list[Instruction]], list[Instruction]]:
    """The same sums, all behind the rank's last step, and the first of each stage behind a token too: lanes beside
    compute look at buffers alone."""
    every = [i for at in sorted(sums) for i in sums[at]]
    tokens: dict[int, str] = {}

    def gated(instruction: Instruction) -> Instruction:
        if instruction.stage in tokens:
            return instruction
        token = tokens[instruction.stage] = f"q.{instruction.stage}"
        return instruction._replace(reads=(*instruction.reads, token), frees=(token,))

    every, tail = list(map(gated, every)), list(map(gated, tail))
    if not tokens:
        return {}, tail
    mark = Instruction("MARK", min(tokens), writes=tuple(tokens.values()))
    return {end: [mark, *every]}, tail


def _over_data(stage: int, traits: Traits) -> list[Instruction]:
    if traits.data == 1:
        return []
    g = (f"g.{stage}",)
    return [Instruction(op, stage, lane=DATA, reads=g, writes=g) for op in traits.sharding(stage).sums]


def _step(stage: int, traits: Traits, complete: bool, early: bool) -> list[Instruction]:
    """The optimizer step; where data ranks share the states each updates its share, and who keeps whole weights
    gathers the rest.

    Part 1 is a step that knows only a part of the gradients' norm. One that may be taken back leaves the gradients.
    `early`: the first subgroups that the device updates have been fetched.
    """
    w, g, o = f"w.{stage}", f"g.{stage}", f"o.{stage}"
    reads = (g, w, NORM) if traits.clip else (g, w)
    gradients = () if traits.optimizer == POST_VALIDATED else (g,)
    tokens = started(stage, traits.stride, early) if traits.subgroups else ()
    writes = (w, o, *gradients, *tokens)
    step = Instruction("OPT", stage, part=0 if complete else 1, reads=reads, writes=writes)
    spreads = traits.sharding(stage).spreads if traits.data > 1 else ()
    return [step, *(Instruction(op, stage, lane=DATA, reads=(w,), writes=(w,)) for op in spreads)]


def _tie(stages: tuple[int, ...], ends: tuple[tuple[int, ...], ...], last: int, traits: Traits) -> list[Instruction]:
    """Tied embeddings in two stages: their gradients are summed before either is updated, here or between two ranks.

    Where data ranks share the gradients, no two shares of the stages are of the same rows: te.s is the whole.
    """
    mine = [stage for stage in (0, last) if stage in stages]
    if not mine:
        return []
    shared = traits.data > 1 and traits.sharding(0).gradients
    names = tuple(f"{'te' if shared else 'g'}.{stage}" for stage in mine)
    tie = Instruction("TIE", mine[0], lane=COMPUTE, reads=names, writes=names)
    if len(mine) == 1:  # else both ends are on one rank; replicas have been summed before
        tie = tie._replace(lane="tie", meet="tie", peers=tuple(sorted({*ends[0], *ends[1]})))
    if not shared:
        return [tie]
    before = [Instruction("TIE_GATHER", s, lane=DATA, reads=(f"g.{s}",), writes=(f"te.{s}",)) for s in mine]
    own = [(s, f"g.{s}", f"te.{s}") for s in mine]
    after = [Instruction("TIE_SHARE", s, reads=(te, g), writes=(g,), frees=(te,)) for s, g, te in own]
    return [*before, tie, *after]
