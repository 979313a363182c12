"""The sharding pass: data ranks keep a share of each stage's weights and gradients, and the whole only while in use.

Fully sharded data parallelism (ZeRO-3, Rajbhandari et al., 1910.02054, section 5.3) in any schedule's order, a stage at
a time; with ZeroPP's order (2402.03791) once for each block of a scheduling unit. UNSHARD gathers a stage's weights
before a run of its forwards and backwards, on a lane of its own: MARK says when it may start. FRESH makes room for
whole gradients before a run of weight gradients; SCATTER, after it, sums them over the data ranks into their shares,
and RELEASE gives them back when that is done.

How many stages a rank holds whole at once is `traits.gathered`, and that one number says the rest (see passes.stays):
weights are gathered ahead as far as there is room for them, and dropped when the room is needed; with room for all,
each is gathered once a step. What is there is never gathered again: where a unit ends with the chunk that the next one
begins with, one gather serves both. So of v chunks and room for r of them, U units of ZeroPP take v + (2U - 1)(v - r)
gathers a rank: the first way down all, each later way what is not there from the turn. With r = v / 2 that is the
paper's U v and v / 2 more.

With `traits.gather_each` "unit" it is the paper's own rule: whole weights from a stage's first forward to the last
backward before its next forward, which is units x stages gathers, and whole gradients one stage at a time.

Buffers of stage s: w.s and g.s are this rank's shares, fw.s and fg.s the whole, p.s.n the token of the n-th gather.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from autotune.planners.lower.traits import Traits
from autotune.planners.passes.seat import Listing, Seat
from autotune.planners.passes.stays import Stay, Use, rounds, stays
from autotune.planners.passes.woven import woven
from autotune.spec.program import DATA, Instruction

GATHER_LANE, SCATTER_LANE = f"{DATA}.gather", f"{DATA}.scatter"


class Visits(NamedTuple):
    """When a rank's list needs whole weights and gradients, and while it has them."""

    weights: list[Use]
    gradients: list[Use]
    gathers: list[Stay]  # of whole weights
    sums: list[Stay]  # of whole gradients
    released: list[int | None]  # for each of these the step before which they are given back; None: at the end


def visits(listing: Listing, traits: Traits) -> Visits | None:
    """Of a list before the pass; None where data ranks share neither weights nor gradients."""
    if traits.data == 1 or not traits.sharding(0).gradients:
        return None
    weights, gradients = _users(listing, traits)
    each = traits.gather_each == "unit"
    room = 1 if each else traits.gathered
    sums = stays(gradients, room, early=False)
    gathers = rounds(weights, _units(listing, weights)) if each else stays(weights, room, early=True)
    return Visits(weights, gradients, gathers, sums, _released(sums, room))


def shard(listing: Listing, seat: Seat, traits: Traits) -> Listing:
    """Adds MARK, UNSHARD, FRESH and SCATTER where weights or gradients are sharded; their users see the whole."""
    found = visits(listing, traits)
    if found is None:
        return listing
    before: dict[int, list[Instruction]] = defaultdict(list)
    after: dict[int, list[Instruction]] = defaultdict(list)
    drops: dict[int, str] = {}  # the step that uses whole weights last
    weights, gradients, gathers, summed, released = found
    sums = _numbered(summed)
    for (stay, number), done in zip(sums, released, strict=True):
        before[len(listing) if done is None else done].append(_release(stay, number))
        after[stay.last].append(_scatter(stay, number))
    for stay, number in _numbered(gathers):
        before[stay.begin] += _gather(stay, number)
        drops[stay.last] = f"fw.{stay.thing}"
    for stay, number in sums:
        before[stay.begin].append(Instruction("FRESH", stay.thing, number, writes=(f"fg.{stay.thing}",)))
    reading, adding = {use.position for use in weights}, {use.position for use in gradients}
    seen = [
        _whole(i, at in reading, at in adding, drops.get(at)) if at in reading or at in adding else i
        for at, i in enumerate(listing)
    ]
    return woven(seen, before, after)


def _users(listing: Listing, traits: Traits) -> tuple[list[Use], list[Use]]:
    """Who reads the weights, and who adds to the gradients, of stages that share them."""
    weights, gradients = [], []
    stages = range(traits.pipe.stages + 1)
    of_weights = {s: f"w.{s}" for s in stages if traits.sharding(s).weights}
    of_gradients = {s: f"g.{s}" for s in stages if traits.sharding(s).gradients}
    for position, (_, s, _, _, _, reads, writes, *_) in enumerate(listing):
        if of_weights.get(s) in reads:
            weights.append(Use(position, s))
        if of_gradients.get(s) in writes:
            gradients.append(Use(position, s))
    return weights, gradients


def _units(listing: Listing, uses: list[Use]) -> list[int]:
    """For each use of whole weights the number of its stage's unit: one begins where a forward follows a backward."""
    unit, back = Counter[int](), dict[int, bool]()
    found = []
    for position, stage in uses:
        forward = listing[position].op == "F"
        unit[stage] += forward and back.get(stage, False)
        back[stage] = not forward
        found.append(unit[stage])
    return found


def _gather(stay: Stay, number: int) -> list[Instruction]:
    share, whole, token = f"w.{stay.thing}", f"fw.{stay.thing}", f"p.{stay.thing}.{number}"
    return [
        Instruction("MARK", stay.thing, number, writes=(token,)),
        Instruction("UNSHARD", stay.thing, number, 0, GATHER_LANE, (share, token), (whole,), (token,)),
    ]


def _numbered(found: list[Stay]) -> list[tuple[Stay, int]]:
    """Each stay with the number of those that the same stage had before."""
    earlier = Counter[int]()
    numbered = []
    for stay in found:
        numbered.append((stay, earlier[stay.thing]))
        earlier[stay.thing] += 1
    return numbered


def _released(sums: list[Stay], room: int) -> list[int | None]:
    """For each stay of whole gradients the step before which they are given back; None: at the end. The sum that was
    begun last has until the next stage but one needs room, to run beside the next one's work, if there is room for it.
    """
    found: list[int | None] = [None] * len(sums)
    open_: list[int] = []
    over: list[int] = []  # not given back yet
    for number, stay in enumerate(sums):
        over += sorted((n for n in open_ if sums[n].last < stay.begin), key=lambda n: sums[n].last)
        open_ = [n for n in open_ if sums[n].last > stay.begin]
        spare = (not room or len(open_) + 1 < room) and over and sums[over[-1]].thing != stay.thing
        done = over[:-1] if spare else over
        over = over[-1:] if spare else []
        for earlier in done:
            found[earlier] = stay.begin
        open_.append(number)
    return found


def _scatter(stay: Stay, number: int) -> Instruction:
    share, whole = f"g.{stay.thing}", f"fg.{stay.thing}"
    return Instruction("SCATTER", stay.thing, number, 0, SCATTER_LANE, (whole, share), (share,))


def _release(stay: Stay, number: int) -> Instruction:
    """Once the sum is there, which is what it waits for."""
    return Instruction("RELEASE", stay.thing, number, reads=(f"g.{stay.thing}",), frees=(f"fg.{stay.thing}",))


def _whole(instruction: Instruction, reads_weights: bool, adds: bool, dropped: str | None) -> Instruction:
    """The same step with the whole weights, which it may be the last to use, and the whole gradients, which it changes
    in place."""
    _, stage, _, _, _, reads, writes, frees, *_ = instruction
    if reads_weights:
        share = f"w.{stage}"
        reads = tuple([f"f{name}" if name == share else name for name in reads])
        frees = (*frees, dropped) if dropped else frees
    if adds:
        share = f"g.{stage}"
        writes = tuple([f"f{name}" if name == share else name for name in writes])
        reads = (*reads, f"f{share}")
    return Instruction(*instruction[:5], reads, writes, frees, *instruction[8:])
