"""A frozen model beside a training: what it gives for the batch's tokens, and no gradient. Whole on every rank.

Decoding heads are trained on the hidden rows of their target. Rows are made batch by batch and not kept: a few passes
over the text would cost less than they take on disk (Medusa-1, 2401.10774, 2.2.1, trains so as well).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autotune.planners.lower.body import lower_block
from autotune.planners.lower.shape import Shape
from autotune.runners.body import ALONE, Call, compile_body, run_body
from autotune.runners.ops import Env
from autotune.runners.rope import tables
from autotune.runners.state import Loader, StageState
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec


@dataclass(frozen=True)
class Step:
    calls: tuple[Call, ...]
    env: Env
    source: str
    output: str


@dataclass(frozen=True)
class Frozen:
    """`rows` may be called again and again with micro-batches of one shape."""

    state: StageState
    steps: tuple[Step, ...]

    @classmethod
    def build(
        cls, target: ModelSpec, blocks: Sequence[Block], shape: Shape, load: Loader, device: torch.device
    ) -> Frozen:
        """`blocks`: of the target those that are run, the first reads tokens."""
        state = StageState.untrained(tuple(blocks), load, shape.dtype, device)
        places = torch.arange(shape.queries, device=device)
        env = Env(
            target,
            shape.batch,
            shape.queries,
            places,
            tables(target, shape.queries, device),
            {},
            attention=shape.attention,
        )
        steps = []
        for block in blocks:
            body = lower_block(block, shape, loss=False, train=False)
            own = replace(env, weights=state.of(block)[0])
            steps.append(Step(compile_body(block, body.forward), own, block.nodes[0].reads[0], body.output))
        return cls(state, tuple(steps))

    def rows(self, tokens: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, hidden]."""
        x = tokens
        for step in self.steps:
            x = run_body(step.calls, step.env, {step.source: x}, ALONE)[step.output]
        return x
