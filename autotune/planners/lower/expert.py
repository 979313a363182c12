"""What ranks that divide a layer's routed experts do around them: rows go to the ranks of their experts, and back.

The ranks are neighbouring replicas (Shazeer et al., 1701.06538, section 3.1; GShard, 2006.16668): each runs the rest of
the layer on its own tokens, and has its run of the experts for the tokens of all. Every token keeps its `top_k` rows,
none is dropped and nothing padded, so ranks send and receive as many rows as the router says: they tell each other
first how many come for which expert, and the host waits for those numbers, which a collective of uneven parts wants
from it.

What comes lies by the rank that it is from, each part by expert; `by_expert` puts rows of one expert together. All of
it is linear, and the gradient of each step is another's (EXCHANGES), which is told the same (OPERANDS).

Sizes here are those of a router in balance: then as many rows come as go. Where it is not, a rank's rows, their
activations, their work and the bytes that it sends are more or fewer by the imbalance, and so is nothing else.
"""

from __future__ import annotations

from autotune.planners.lower.shape import Shape
from autotune.spec.opset import NO_NODE
from autotune.spec.program import COMPUTE, EXPERT, Instruction

EXCHANGES = {
    "to_experts": "from_experts",  # rows to the ranks of their experts
    "from_experts": "to_experts",
    "by_expert": "by_rank",  # rows as they came -> those of one expert together
    "by_rank": "by_expert",
}
# How many of the last reads say how, and are no operands of what is linear.
OPERANDS = dict.fromkeys(EXCHANGES, 1)

SPLITS = "experts.splits"  # on the host, [2, ranks]: rows that go to each rank, and that come from each
INDEX = "experts.index"  # of each row by expert where it came
COUNT_BYTES, SPLIT_BYTES = 4, 16  # of an expert's rows from a rank, and of a rank's two numbers


def _step(op: str, reads: tuple[str, ...], writes: tuple[str, ...], lane: str = COMPUTE) -> Instruction:
    return Instruction(op, part=NO_NODE, lane=lane, reads=reads, writes=writes)


def to_experts(dispatch: Instruction, shape: Shape, size: dict[str, int]) -> list[Instruction]:
    """The dispatch of this rank's tokens, and the rows of this rank's experts; adds bytes of new values to `size`.

    `v.here` is value v of this rank's tokens, `v.come` as it comes. What is read later keeps its name.
    """
    if shape.expert == 1:
        return [dispatch]
    rows, weights, order, place, ends = dispatch.writes
    here, come = ([f"{name}.{where}" for name in (rows, weights)] for where in ("here", "come"))
    ours, counts = f"{ends}.here", f"{ends}.come"
    size |= {new: size[old] for names in (here, come) for new, old in zip(names, (rows, weights), strict=True)}
    size |= {ours: size[ends], counts: size[ends], INDEX: size[order], SPLITS: SPLIT_BYTES * shape.expert}
    size[ends] //= shape.expert
    return [
        dispatch._replace(writes=(*here, order, place, ours)),
        _step("counts_to_all", (ours,), (counts,), EXPERT),
        _step("splits", (ours, counts), (SPLITS,)),
        _step("to_experts", (*here, SPLITS), tuple(come), EXPERT),
        _step("places", (counts, SPLITS), (INDEX, ends)),
        _step("by_expert", (*come, INDEX), (rows, weights)),
    ]


def from_experts(combine: Instruction, shape: Shape, size: dict[str, int]) -> list[Instruction]:
    """The combining of this rank's tokens' rows, once they are back."""
    if shape.expert == 1:
        return [combine]
    rows, *rest = combine.reads
    gone, back = f"{rows}.gone", f"{rows}.back"
    size |= dict.fromkeys((gone, back), size[rows])
    return [
        _step("by_rank", (rows, INDEX), (gone,)),
        _step("from_experts", (gone, SPLITS), (back,), EXPERT),
        combine._replace(reads=(back, *rest)),
    ]
