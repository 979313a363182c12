"""A rank alone: lower bounds on a step's time and memory from one rank's own list, for a share of the whole's effort.

The list is completed by the passes that look at one rank at a time, and no message is waited for: whatever meets takes
its own time alone. Of the other ranks only this is kept: no forward of a stage starts before the stages before it have
done one, and no backward before all of them have and the stages after it have gone back; after a backward the stages
before it have theirs to do. Every step of the whole program is at least as late, so the bound is admissible. It sees
what sums over a rank cannot: copies and vocabulary passes that compute waits for.

It is looked at twice. First without what data ranks share and without the update, whose passes only add to it: then
many plans have one list, and a sketch of it serves them all. What is left out is added as the sums over the rank that
it takes at least. Then whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from autotune.planners.bounds import Bounder
from autotune.planners.family import Family
from autotune.planners.lower.train import kinds_of, own_list
from autotune.planners.lower.traits import Traits, traits
from autotune.planners.passes import OWN
from autotune.planners.passes.shard import visits
from autotune.planners.predict import TooLarge, TooSlow
from autotune.planners.sketch import Around, Ends, Sketch, Together
from autotune.spec.plan import Plan

SHARED = ("offload", "join", "vocabulary")  # the passes that the lists of many plans have in common
OTHERS = tuple(name for name in OWN if name not in SHARED)
APART: dict[str, Any] = {  # the traits that nothing but the other passes looks at
    "data": 1,
    "zero": 0,
    "gathered": 0,
    "gather_each": "step",
    "sync": "eager",
    "tied": False,
    "partial": (),
    "tensor": 1,
    "clip": False,
    "divided": False,
    "optimizer": "barrier",
    "subgroups": False,
    "stride": 0,
    "ahead": 0,
}
LOOKS = 2  # at a plan: at the list that it shares with others, and at its own
MOST_INSTRUCTIONS = 300_000  # of the sketches that are kept: about 300 bytes each


def around(family: Family, gathered: float = 0.0) -> Around:
    """What the stages before and after each stage take at least, `gathered` seconds before the first has weights."""
    fill, drain = family.ends
    whole, backward = gathered + fill[-1], [0.0] * family.plan.stages
    for stage in reversed(range(family.plan.stages)):
        backward[stage] = whole + family.ways[stage]
        whole = backward[stage] + family.times[stage].drain
    return Around([gathered + time for time in fill[:-1]], backward, drain[:-1])


class _Shared(NamedTuple):
    """A sketch of the list that plans share, and what alive at once adds up to with each share of weights."""

    sketch: Sketch
    together: dict[tuple[int, int, str], Together]  # (zero, gathered, gather_each)


@dataclass
class Alone:
    """Bounds plans by their ranks alone; what plans share is kept."""

    bounder: Bounder
    allowed: int
    _known: dict[tuple[Traits, int], _Shared] = field(default_factory=dict)  # the one used last is last

    def look(
        self, plan: Plan, at: int, enough: float = float("inf"), allowed: int | None = None
    ) -> TooLarge | TooSlow:
        """The bytes that some rank needs beyond what is allowed, or seconds that no execution of the step can undercut:
        those of the first rank that shows `enough`, or the most that any of them does. `at`: the first look (0) or the
        second. `allowed`: in place of what all plans are."""
        allowed = self.allowed if allowed is None else allowed
        predictor = self.bounder.predictor
        key = traits(plan, predictor.model, predictor.workload)
        family, costs = self.bounder.family(plan), self.bounder.costs(plan)
        others = around(family, self.bounder.gathered(plan))
        most, fullest = self.bounder.time(plan), 0
        for rank in _telling(plan.pipeline):
            named = {0, *key.held(rank), plan.stages - 1}  # the ends' where a shard of the vocabulary serves them
            kinds = kinds_of(plan, predictor.model, predictor.workload, named)
            shared = self._shared(key, rank)
            sketch, together = shared.sketch, self._together(shared, key)
            if at:
                own = own_list(key, rank, OTHERS, sketch.listing)
                sketch = Sketch(own, sketch.inline)
                together = Together(sketch.moments, sketch.wholes(None))
            transient = [costs.transient(rank, instruction) for instruction in sketch.different]
            least = self.bounder.resident(plan, rank) + together.peak(kinds, transient)
            if least > allowed:
                return TooLarge(plan, least)
            fullest = max(fullest, least)
            if most < enough:
                seconds = [costs.seconds(rank, instruction) for instruction in sketch.different]
                ends = sketch.ends(seconds, others)
                most = max(most, ends.drained, ends.whole if at else self._updated(plan, rank, ends))
        return TooSlow(plan, most, at, fullest)

    def _updated(self, plan: Plan, rank: int, ends: Ends) -> float:
        """When the update is over that a shared list does not have (see `Bounder.time`)."""
        updates = self.bounder.updates(plan)
        own = [updates[stage] for stage in self.bounder.family(plan).own[rank]]
        steps = sum(step for _, step, _ in (*own, *updates[plan.stages :]))
        last = min(wait + max(step, lane) for wait, step, lane in own)
        return max(ends.whole, ends.compute + steps, ends.steps + last)

    def _shared(self, key: Traits, rank: int) -> _Shared:
        alike = replace(key, **APART)
        found = self._known.pop((alike, rank), None)
        if found is None:
            listing = own_list(alike, rank, SHARED)
            found = _Shared(Sketch(listing, self.bounder.predictor.profile.inline), {})
        self._known[alike, rank] = found
        while len(self._known) > 1 and sum(len(s.sketch.listing) for s in self._known.values()) > MOST_INSTRUCTIONS:
            del self._known[next(iter(self._known))]
        return found

    def _together(self, shared: _Shared, key: Traits) -> Together:
        which = key.zero, key.gathered, key.gather_each
        if which not in shared.together:
            found = visits(shared.sketch.listing, key)
            shared.together[which] = Together(shared.sketch.moments, shared.sketch.wholes(found))
        return shared.together[which]


def _telling(ranks: int) -> Iterator[int]:
    """The ranks that are looked at: those that wait most at the start and at the end, and one between them."""
    yield from dict.fromkeys((0, ranks - 1, ranks // 2))
