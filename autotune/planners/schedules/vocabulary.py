"""Vocabulary parallelism (2411.05288): how the head's work over sharded rows is cut into passes.

Every pipeline rank holds rows of the input and of the output embedding. A micro-batch's output layer is then a few
passes on all ranks, with a barrier after each one whose results the next pass, or the last stage's backward, must have
from everybody. A backward that waits for n barriers comes n micro-batches later than it would: n activations more.

EMBED and EMBED_W are the input's two passes: each rank looks up the tokens whose rows it holds, and adds to them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """`passes` of the output layer in order; the last stage's backward waits for the first `barriers` of them.

    `together`: all ranks do all passes of a micro-batch in a row, at one place of one order (see interlaced).
    """

    passes: tuple[str, ...]
    barriers: int
    together: bool = False

    @property
    def summed(self) -> bool:
        """Whether ranks exchange sums over all shards, not each shard's own."""
        return "S_SUM" in self.passes


# S: local logits, maximum, sum and softmax; T: the gradients of input and weights, once the whole sums are known.
VOCABULARIES: dict[str, Vocabulary] = {
    "naive": Vocabulary(("S_MAX", "S_SUM", "T_SUMMED"), 3),  # section 4.1: maximum, sum and gradient one by one
    "interlaced": Vocabulary(("S_MAX", "S_SUM", "T_SUMMED"), 3, together=True),  # what the paper compares itself with
    "vocab-1": Vocabulary(("S", "T"), 2),  # Algorithm 1: local softmax first, rescaled afterwards
    "vocab-2": Vocabulary(("S_BOTH", "T_W"), 1),  # Algorithm 2: the input's gradient from local softmax too; T can wait
}
EMBED, EMBED_W = "EMBED", "EMBED_W"

# Durations for placing the passes, which must not depend on a profile: of a pass in products of activations and shard
# (each pass is made of whole ones, and of what is small beside them), everything else in forwards.
PRODUCTS = {"S": 1.0, "S_BOTH": 2.0, "T": 2.0, "T_W": 1.0, "S_MAX": 1.0, "S_SUM": 0.2, "T_SUMMED": 2.0}
LOOKUP = 0.01  # EMBED and EMBED_W
# From the last rank's end of a pass to when all may use its result. As much slack as the delayed backwards have room
# for: an order with room at its barriers stays good where durations turn out otherwise.
BARRIER = 0.5
LATE = 1.0  # EMBED_W comes so much later than it could: nobody waits for it
AHEAD = 2  # micro-batches of each direction whose embeddings are looked up before the first stage needs them
