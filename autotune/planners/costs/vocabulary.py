"""The work of a sharded vocabulary's passes and meetings: one line of the table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autotune.planners.lower.shape import training_shape
from autotune.planners.lower.vocabulary import shard_rows, shards
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.work import BYTES, Collective, Matmul, Memory, Work
from autotune.spec.workload import Workload

Works = tuple[Work, ...]


@dataclass(frozen=True)
class ShardSizes:
    """One micro-batch beside one rank's shard."""

    tokens: int
    hidden: int
    rows: int
    ranks: int  # that shards lie on
    tensor: int  # of them, those that share a stage
    reach: int  # that a broadcast goes to: pipeline ranks, unless tensor ranks have a share of its tokens each
    dtype: str
    level: int  # the link level that joins the ranks
    inner: int  # see `Collective`, of all shards

    @classmethod
    def of(cls, plan: Plan, model: ModelSpec, workload: Workload, level: int, inner: int) -> ShardSizes:
        tokens, ranks = training_shape(plan, workload).tokens, shards(plan)
        rows = shard_rows(model.vocab, ranks)
        reach = ranks if plan.sequence_parallel else plan.pipeline
        return cls(tokens, model.hidden, rows, ranks, plan.tensor, reach, workload.precision, level, inner)

    @property
    def activation(self) -> int:
        """Bytes of [tokens, hidden]."""
        return self.tokens * self.hidden * BYTES[self.dtype]

    @property
    def logits(self) -> int:
        """Bytes of [tokens, rows]."""
        return self.tokens * self.rows * BYTES[self.dtype]

    def statistics(self, columns: int) -> int:
        """Bytes of [columns, tokens] in the type that sums are kept in."""
        return columns * self.tokens * max(4, BYTES[self.dtype])


def _product(s: ShardSizes) -> Works:
    return (Matmul(s.tokens, s.hidden, s.rows, s.dtype, "fwd"),)


def _softmax(s: ShardSizes) -> Works:
    """The shard's maximum and sum, then the exponentials in place."""
    return Memory("cross_entropy", s.logits, s.dtype), Memory("cross_entropy_bwd", 2 * s.logits, s.dtype)


def _input_gradient(s: ShardSizes) -> Works:
    return (Matmul(s.tokens, s.rows, s.hidden, s.dtype, "dgrad"),)


def _weight_gradient(s: ShardSizes) -> Works:
    """Logits' gradients in place, and the product; a narrow one is summed into fp32 (see costs.works)."""
    width = BYTES[s.dtype]
    wide = (Memory("accumulate", s.rows * s.hidden * (width + 8), s.dtype),) if width < 4 else ()
    scale = Memory("cross_entropy_bwd", 2 * s.logits, s.dtype)
    return scale, Matmul(s.rows, s.tokens, s.hidden, s.dtype, "wgrad"), *wide


def _target_rows(s: ShardSizes) -> Works:
    return (Memory("embedding", s.activation, s.dtype),)


def _gather(s: ShardSizes) -> Works:
    return (Collective("all_gather", s.statistics(2 * s.ranks), s.ranks, s.level, s.inner),)


def _reduce(s: ShardSizes) -> Works:
    """The sum of all parts: on one rank, or on each of several tensor ranks, then as an all-reduce."""
    if s.tensor == 1:
        return (Collective("reduce", s.activation, s.ranks, s.level, s.inner),)
    return (Collective("all_reduce", s.activation, s.ranks, s.level, s.inner),)


def _broadcast(s: ShardSizes) -> Works:
    inner = s.inner if s.reach == s.ranks and s.tensor > 1 else 1
    return (Collective("broadcast", s.activation, s.reach, s.level, inner),)


def _rescaled(s: ShardSizes) -> Works:
    """Between the two, the parts are rescaled: both are read and one is written."""
    return (*_gather(s), Memory("add", 3 * s.activation, s.dtype), *_reduce(s))


VOCABULARY_WORKS: dict[str, Callable[[ShardSizes], Works]] = {
    "EMBED": _target_rows,
    "EMBED_W": lambda s: (Memory("embedding_wgrad", s.activation, s.dtype),),
    "S": lambda s: (*_product(s), *_softmax(s)),
    "S_BOTH": lambda s: (*_product(s), *_softmax(s), *_input_gradient(s), *_target_rows(s)),
    "S_MAX": lambda s: (*_product(s), Memory("cross_entropy", s.logits, s.dtype)),
    "S_SUM": lambda s: (Memory("cross_entropy_bwd", 2 * s.logits, s.dtype),),
    "T": lambda s: (*_weight_gradient(s), *_input_gradient(s)),
    "T_SUMMED": lambda s: (*_weight_gradient(s), *_input_gradient(s)),
    "T_W": _weight_gradient,
    "BROADCAST": _broadcast,
    "BROADCAST_SHARES": _broadcast,
    "REDUCE": _reduce,
    "REDUCE_SHARES": _reduce,
    "GATHER": _gather,
    "GATHER_REDUCE": _rescaled,
    "GATHER_REDUCE_SHARES": _rescaled,
    "MAX": lambda s: (Collective("all_reduce", s.statistics(1), s.ranks, s.level, s.inner),),
    "SUM": lambda s: (Collective("all_reduce", s.statistics(2), s.ranks, s.level, s.inner),),
}
