"""A rank's shard of the vocabulary: rows of the input and the output embedding, and what its passes leave in memory.

Every rank of a replica has a shard, tensor ranks included: shard p x T + t of P x T is tensor rank t's of pipeline rank
p. So nobody holds another's rows, no gradient of a row need be summed, and each pass is the same work whichever way the
ranks are divided. (Sharded over the pipeline alone, tensor ranks would hold T copies and sum T gradients; cut twice,
first by pipeline and then by tensor rank, the rows would be the same but for the padding.)

Rows are padded to a multiple of twice the ranks (2411.05288, section 6.1: products of odd shapes are slower); the rows
beyond the vocabulary are zero and stay so.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from autotune.planners.lower.shape import training_shape
from autotune.planners.schedules.vocabulary import VOCABULARIES
from autotune.spec.graph import Block, blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.workload import Workload


def shards(plan: Plan) -> int:
    """The ranks that a sharded vocabulary lies on: all of one replica."""
    return plan.pipeline * plan.tensor


def shard_of(plan: Plan, pipeline: int, tensor: int) -> int:
    """The shard that a rank of a replica holds."""
    return pipeline * plan.tensor + tensor


def shard_rows(vocab: int, ranks: int) -> int:
    """Rows of one rank's shard, padding included."""
    return -(-vocab // (2 * ranks)) * 2


@lru_cache(maxsize=64)
def vocabulary_blocks(model: ModelSpec, ranks: int) -> tuple[Block, Block]:
    """The embedding, and the head without its norm and loss, with weights of one rank's shape.

    The weights keep the names of the whole tensors: tied ones are one shard.
    """
    embed, *_, head = blocks(model)
    rows = shard_rows(model.vocab, ranks)

    def cut(block: Block, number: int) -> Block:
        node = block.nodes[number]
        weights = tuple(replace(w, shape=(rows, *w.shape[1:]), shard=None) for w in node.weights)
        return Block(block.kind, block.index, (replace(node, weights=weights),))

    return cut(embed, 0), cut(head, 1)


def shard_parameters(model: ModelSpec, ranks: int) -> int:
    """Elements of one rank's shard."""
    return shard_rows(model.vocab, ranks) * model.hidden * (1 if model.tied else 2)


def product_share(plan: Plan, model: ModelSpec, workload: Workload) -> float:
    """The work of one product of activations and shard as a share of a mean stage's forward, to two digits.

    In multiplications a token: a layer's weights, and causal attention over half of the positions, twice. Tensor ranks
    share a stage's work as they share the vocabulary's.
    """
    layers = blocks(model)[1:-1]
    weights = sum(weight.size for block in layers for weight in block.weights())
    attention = len(layers) * workload.sequence_length * model.heads * model.head_dim
    rows = shard_rows(model.vocab, shards(plan)) * plan.tensor
    share = rows * model.hidden / (weights + attention) * plan.stages
    return float(f"{share:.2g}")


def vocabulary_bytes(plan: Plan, model: ModelSpec, workload: Workload) -> dict[str, int]:
    """Bytes of every kind of buffer of the passes' own (see passes.vocabulary)."""
    if plan.vocabulary == "ends":
        return {}
    shape, v = training_shape(plan, workload), plan.stages
    tokens, wide = shape.tokens, max(4, shape.width)  # statistics are in fp32 at least
    summed = VOCABULARIES[plan.vocabulary].summed
    whole = (f"x.{v + 1}", f"d.{v}", "x.-1", "d.-2") if plan.sequence_parallel else ()
    return dict.fromkeys(whole, tokens * model.hidden * shape.width) | {
        f"y.{v}": tokens * shard_rows(model.vocab, shards(plan)) * shape.width,
        f"z.{v}": tokens * wide * (1 if summed else 2),
        f"u.{v}": tokens * wide * 2 * (1 if summed else shards(plan)),
        f"b.{v}": tokens * model.hidden * shape.width,
    }
