"""The shape that a body is lowered for: how many tokens, over how many tensor ranks, in which precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.planners.decoding.strategies import tree_of
from autotune.planners.lower.pages import table_columns
from autotune.spec.plan import FUSED, Plan
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload


@dataclass(frozen=True)
class Shape:
    """One micro-batch on one rank. `keys` counts cached positions too; training has keys == queries x context."""

    batch: int  # sequences
    queries: int  # new tokens of each sequence on this rank
    keys: int  # positions attended to
    tensor: int = 1
    sequence_parallel: bool = False
    dtype: str = "bf16"
    attention: str = "sdpa"
    context: int = 1  # ranks that share each sequence
    ring: int = 1  # of them those that pass keys and values around
    fused: bool = False  # whether neighbours are joined (lower.fuse): of decoded tokens alone
    masked: bool = False  # whether tokens see others than those before them: a tree's, their ancestors; masks, a text
    page: int = 0  # positions of a page of the cache; 0: each sequence's lie one after another
    room: int = 0  # with pages: positions that the longest sequence's have
    expert: int = 1  # ranks that divide the routed experts
    scored: int = 1  # of a sequence's new tokens those that get logits (generation): the last, or all of a round

    @property
    def tokens(self) -> int:
        return self.batch * self.queries

    @property
    def width(self) -> int:
        """Bytes of one element of an activation."""
        return BYTES[self.dtype]

    @property
    def core(self) -> Shape:
        """The shape that attention sees at a time: where ranks share sequences, more tokens of fewer heads."""
        if self.context == 1:
            return self
        tokens, tensor = self.keys // self.ring, self.tensor * self.context // self.ring
        return replace(self, queries=tokens, keys=tokens, tensor=tensor, context=1, ring=1)

    def rows(self, sharded: bool) -> int:
        """Tokens that this rank holds where `sharded` says the sequence is split over the tensor ranks."""
        return self.tokens // self.tensor if sharded else self.tokens


def training_shape(plan: Plan, workload: Workload) -> Shape:
    """The shape of one micro-batch of a training step."""
    return Shape(
        plan.micro_batch,
        workload.rows // plan.context,
        workload.rows,
        plan.tensor,
        plan.sequence_parallel,
        workload.precision,
        plan.attention,
        plan.context,
        plan.context_ring,
        masked=bool(workload.masks),
        expert=plan.expert,
    )


SIGHT_ALIGN = 16  # kernels that take a mask want its rows to begin at so manieth elements


def sight_columns(rows: int) -> int:
    """Columns of the mask that says which rows of a training sequence see which, its padding too."""
    return -(-rows // SIGHT_ALIGN) * SIGHT_ALIGN


def generation_shape(plan: Plan, workload: Workload, queries: int, keys: int) -> Shape:
    """The shape of a pass over a prompt, or over a part of it that goes on from the cache, or of a round, which sees
    more positions than any prompt has."""
    goes_on = keys > workload.prompt_length
    fused, masked = plan.kernels == FUSED and goes_on, goes_on and not tree_of(plan).chain
    batch, scored = workload.batch // plan.data, queries if goes_on else 1
    how = (False, workload.precision, plan.attention)
    whole = table_columns(plan, workload) * plan.page if plan.page else 0
    return Shape(
        batch, queries, keys, plan.tensor, *how, fused=fused, scored=scored, masked=masked, page=plan.page, room=whole
    )
