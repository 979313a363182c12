"""The passes of a draft model: over the prompt, and those of a round; and what heads see.

One that drafts a token after the other reads the two newest tokens and then each that it has just proposed. One that
drafts all at once reads as many as a round may have committed, and masks for all that it proposes but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from autotune.planners.decoding.strategies import STRATEGIES, reads_rows
from autotune.planners.feasible import MOST_FUSED
from autotune.planners.lower.generate import draft_room, drafted, pass_lengths
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import canonical
from autotune.spec.graph import Block, blocks
from autotune.spec.plan import LIBRARY, Plan
from autotune.spec.workload import Workload


class Reading(NamedTuple):
    """A pass of a round: its new tokens a sequence, those that get logits, positions that it fills beyond the one of
    the newest token (as a shape's keys count), and how often a round has it."""

    queries: int
    scored: int
    beyond: int
    times: int


def _one_by_one(plan: Plan) -> tuple[Reading, ...]:
    return Reading(2, 1, 0, 1), Reading(1, 1, 0, plan.speculate - 1)


def _at_once(plan: Plan) -> tuple[Reading, ...]:
    return (Reading(2 * plan.speculate, plan.speculate, plan.speculate - 1, 1),)


READINGS: Mapping[str, Callable[[Plan], tuple[Reading, ...]]] = {"draft": _one_by_one, "parallel": _at_once}


class DraftPasses(NamedTuple):
    """Shapes of a draft's passes on one rank, which has the whole of it: over the prompt, and of a round each and how
    often."""

    prompt: Shape
    round: tuple[tuple[Shape, int], ...]


def draft_passes(plan: Plan, workload: Workload, keys: int = 0) -> DraftPasses:
    """`keys`: positions that the newest token sees, its own too; 0: as many as there will be."""
    read = READINGS[plan.decoding](plan)
    most = max(one.queries for one in read)
    kernels = plan.kernels if most * workload.batch // plan.data <= MOST_FUSED else LIBRARY
    alone = Plan(data=plan.data, attention=plan.attention, kernels=kernels)
    prompt = workload.prompt_length

    def shape(one: Reading) -> Shape:
        seen = keys + one.beyond if keys else draft_room(plan, workload)
        return replace(generation_shape(alone, workload, one.queries, max(one.queries + 1, seen)), scored=one.scored)

    return DraftPasses(
        generation_shape(alone, workload, prompt, prompt), tuple((shape(one), one.times) for one in read)
    )


def heads_shape(plan: Plan, workload: Workload) -> Shape:
    """The shape that heads see on one rank, which has the whole of them: a row a sequence."""
    alone = Plan(data=plan.data, attention=plan.attention)
    return replace(generation_shape(alone, workload, 1, workload.prompt_length + 1), fused=False)


def draft_pieces(plan: Plan, workload: Workload) -> Iterator[tuple[Block, Shape]]:
    """The kinds of blocks of a plan's draft, and the shapes of their passes at both ends of the answer."""
    if workload.draft is None or not STRATEGIES[plan.decoding].draft:
        return
    if reads_rows(plan):
        shape = heads_shape(plan, workload)
        yield from ((block, shape) for block in dict.fromkeys(map(canonical, drafted(plan, workload.draft))))
        return
    kinds = dict.fromkeys(map(canonical, blocks(workload.draft)))
    for keys in dict.fromkeys(keys for _, keys in pass_lengths(plan, workload)[1:]):
        made = draft_passes(plan, workload, keys + 1)
        for shape in (made.prompt, *(shape for shape, _ in made.round)):
            yield from ((block, shape) for block in kinds)
