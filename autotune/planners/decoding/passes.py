"""The passes of a draft model: over the prompt, over the two newest tokens, over one that it has just proposed; and
what heads see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autotune.planners.decoding.strategies import STRATEGIES, reads_rows
from autotune.planners.feasible import MOST_FUSED
from autotune.planners.lower.generate import drafted, pass_lengths
from autotune.planners.lower.pages import room
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import canonical
from autotune.spec.graph import Block, blocks
from autotune.spec.plan import LIBRARY, Plan
from autotune.spec.workload import Workload


def draft_shapes(plan: Plan, workload: Workload, keys: int = 0) -> tuple[Shape, Shape, Shape]:
    """Shapes of a draft's passes on one rank, which has the whole of it. `keys`: positions that the newest token sees,
    its own too; 0: as many as there will be."""
    kernels = plan.kernels if 2 * workload.batch // plan.data <= MOST_FUSED else LIBRARY
    alone = Plan(data=plan.data, attention=plan.attention, kernels=kernels)
    prompt, keys = workload.prompt_length, keys or room(plan, workload)
    whole = generation_shape(alone, workload, prompt, prompt)
    pair = replace(generation_shape(alone, workload, 2, max(3, keys)), scored=1)
    return whole, pair, generation_shape(alone, workload, 1, max(2, keys))


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
        for shape in draft_shapes(plan, workload, keys + 1):
            yield from ((block, shape) for block in kinds)
