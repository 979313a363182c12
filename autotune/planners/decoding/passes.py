"""The passes of a draft model: over the prompt, over the two newest tokens, over one that it has just proposed."""

from __future__ import annotations

from dataclasses import replace

from autotune.planners.lower.generate import room
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.spec.plan import LIBRARY, Plan
from autotune.spec.workload import Workload


def draft_shapes(plan: Plan, workload: Workload, keys: int = 0) -> tuple[Shape, Shape, Shape]:
    """Shapes of a draft's passes on one rank, which has the whole of it. `keys`: positions that the newest token sees,
    its own too; 0: as many as there will be."""
    alone = Plan(data=plan.data, attention=plan.attention, kernels=LIBRARY)
    prompt, keys = workload.prompt_length, keys or room(plan, workload)
    whole = generation_shape(alone, workload, prompt, prompt)
    pair = replace(generation_shape(alone, workload, 2, max(3, keys)), scored=1)
    return whole, pair, generation_shape(alone, workload, 1, max(2, keys))
