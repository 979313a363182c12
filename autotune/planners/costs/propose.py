"""What a round takes beside the target's pass: to propose tokens, to commit some of them, to keep what stands apart.
One line of the table a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from autotune.planners.costs.between import commit_work, lookup_work, pool_work
from autotune.planners.costs.body import NOTHING, Cost
from autotune.planners.decoding.passes import draft_passes, heads_shape
from autotune.planners.decoding.strategies import LATTICE, LONGEST, REFINES
from autotune.planners.lower.generate import ID, drafted, inference_body, text_columns, transient_bytes
from autotune.planners.lower.shape import Shape
from autotune.planners.lower.stage import canonical, cut_of, stage_blocks
from autotune.planners.simulate import memory
from autotune.spec.graph import blocks
from autotune.spec.plan import Plan
from autotune.spec.work import Matmul, Memory

if TYPE_CHECKING:
    from autotune.planners.costs.generate import PassCosts


def commit(costs: PassCosts) -> Cost:
    """Which proposals are kept."""
    return costs.piece(commit_work(costs.plan, costs.shape.batch, costs.shape.dtype))


def moved(costs: PassCosts, stage: int) -> Cost:
    """Keys and values of a stage's layers, of as many tokens as a branch has: read, written, read, written."""
    plan, model = costs.plan, costs.model
    layers = sum(block.kind == "layer" for block in stage_blocks(model, cut_of(plan, model))[stage])
    heads = model.kv_heads // plan.tensor * model.head_dim
    size = layers * costs.shape.batch * plan.speculate * heads * costs.shape.width
    return costs.piece(*(Memory("copy", 2 * size, costs.shape.dtype) for _ in range(4)))


def nothing(costs: PassCosts, first: bool) -> Cost:
    return NOTHING


def lookup(costs: PassCosts, first: bool) -> Cost:
    """Each branch looks through the whole text."""
    plan, columns = costs.plan, text_columns(costs.plan, costs.workload)
    return costs.piece(lookup_work(plan, costs.shape.batch, columns, costs.shape.dtype)).times(plan.branches)


def guesses(costs: PassCosts, first: bool) -> Cost:
    return costs.piece(Memory("copy", 2 * costs.shape.tokens * ID, costs.shape.dtype))


def pool(costs: PassCosts, first: bool) -> Cost:
    return costs.piece(pool_work(costs.plan, costs.shape.batch, 0, costs.shape.dtype))


def draft(costs: PassCosts, first: bool) -> Cost:
    """The draft's passes, over the prompt at first and those of a round; each chooses a token after all that it has
    scored."""
    passes, total = draft_passes(costs.plan, costs.workload, costs.keys + 1), NOTHING
    if first:
        total += _pass(costs, passes.prompt, head=False)
    for shape, times in passes.round:
        logits = shape.batch * shape.scored * costs.model.vocab * shape.width
        total += (_pass(costs, shape) + costs.choice(logits, 1)).times(times)
    return total


def _pass(costs: PassCosts, shape: Shape, head: bool = True) -> Cost:
    total, model = NOTHING, costs.workload.draft
    assert model is not None
    form = "prefill" if shape.queries == shape.keys else "decode"
    for block in map(canonical, blocks(model)):
        if head or block.kind != "head":
            total += costs.priced(block, shape, form)
    return total


def heads(costs: PassCosts, first: bool) -> Cost:
    """A row a sequence is taken out; each head that the proposals are as deep as sees it and ranks its tokens."""
    plan, model, batch = costs.plan, costs.workload.draft, costs.shape.batch
    assert model is not None
    shape = heads_shape(plan, costs.workload)
    total = costs.piece(Memory("copy", 2 * batch * model.hidden * costs.shape.width, costs.shape.dtype))
    for block in map(canonical, drafted(plan, model)):
        total += costs.priced(block, shape, "decode")
    logits = plan.speculate * batch * model.vocab * costs.shape.width  # of all heads, put beside one another
    total += costs.piece(Memory("copy", 2 * logits, costs.shape.dtype), Memory("pick", logits, costs.shape.dtype))
    if plan.refine != REFINES[0]:
        # Of each head's tokens and those before them every place of the text is compared, and pairs are counted.
        columns = text_columns(plan, costs.workload)
        seen = Memory("lookup", 2 * batch * LATTICE * columns * ID, costs.shape.dtype)
        product = Matmul(LATTICE, columns, LATTICE, "fp32", "fwd", batch)
        total += costs.piece(seen, product).times(plan.speculate)
        total += costs.piece(Memory("sample", logits, costs.shape.dtype))
    return total


def nowhere(costs: PassCosts, first: bool) -> int:
    return 0


def windows(costs: PassCosts, first: bool) -> int:
    """The texts beside themselves, each place with what comes before it."""
    return costs.shape.batch * text_columns(costs.plan, costs.workload) * (LONGEST + 3) * ID


def drafting(costs: PassCosts, first: bool) -> int:
    """What the draft's largest pass takes."""
    model, passes = costs.workload.draft, draft_passes(costs.plan, costs.workload)
    assert model is not None
    shapes = [shape for shape, times in passes.round if times] + [passes.prompt] * first
    return max(sum(transient_bytes(model, cut_of(Plan(), model), 0, shape)) for shape in shapes)


def ranking(costs: PassCosts, first: bool) -> int:
    """What the last head takes beside the rows and the logits of those before it, and then all logits twice."""
    model, shape = costs.workload.draft, heads_shape(costs.plan, costs.workload)
    assert model is not None
    (block,) = {canonical(block) for block in drafted(costs.plan, model)}
    peaks = memory(inference_body(block, shape).forward, lambda rank, instruction: 0)[0].get("device", ())
    one = shape.tokens * model.vocab * shape.width
    rows = shape.tokens * model.hidden * shape.width
    return rows + max(max(peaks, default=0) + (costs.plan.speculate - 1) * one, 2 * costs.plan.speculate * one)


class Proposal(NamedTuple):
    """What proposing costs, and the bytes that it takes and gives back; `first`: after the prompt's pass."""

    cost: Callable[[PassCosts, bool], Cost]
    transient: Callable[[PassCosts, bool], int] = nowhere


PROPOSALS: dict[str, Proposal] = {
    "plain": Proposal(nothing),
    "ngram": Proposal(lookup, windows),
    "jacobi": Proposal(guesses),
    "lookahead": Proposal(pool),
    "masks": Proposal(guesses),
    "draft": Proposal(draft, drafting),
    "parallel": Proposal(draft, drafting),
    "heads": Proposal(heads, ranking),
}
