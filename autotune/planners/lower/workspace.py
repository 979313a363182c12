"""Workspace: bytes that an operation takes inside itself and gives back before it ends, by operation and form.

A body program says what is alive between instructions. What an instruction needs beyond its writes depends on who
computes it, so the rules are per kind of device; an operation without a rule takes nothing. The rules follow the code
of `runners/ops` and are held against the allocator by `tests/test_workspace.py`.

On accelerators only our own temporaries are here, and those of experts and latent attention alone: the fused kernels'
are small, and the allocator's peak on H200s was within 0.4 % of dense models' programs without any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from autotune.planners.lower import workspace_mixed as mixed
from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.call import BOOL, CHUNK_BYTES, INT, Call, Site, tile_rows
from autotune.planners.lower.shape import Shape
from autotune.planners.simulate import memory
from autotune.spec.graph import Block, Node
from autotune.spec.int8_graph import OP as INT8_OP
from autotune.spec.program import Instruction
from autotune.spec.work import FEW_ROWS

__all__ = ["CHUNK_BYTES", "Site", "staging", "widened", "workspace"]

Rule = Callable[[Call], int]


def _norm(c: Call) -> int:
    """The square is gone before y is there; a narrow x is also widened, and y made wide first."""
    return 2 * c.widened(c.reads[0]) - c.reads[0] if c.narrow else 0


def _norm_dgrad(c: Call) -> int:
    """The normalised x (the result's memory), the weighted gradient, their product, and its mean a row."""
    x = c.widened(c.reads[0])
    extra = x // c.node.attr("width")
    return 2 * x + extra + (x - c.made[0] if c.narrow else 0)


def _norm_wgrad(c: Call) -> int:
    """x times its deviation, and the sum over tokens; a narrow gradient is widened on the way."""
    x = c.widened(c.reads[0])
    return 2 * x if c.narrow else x + c.node.attr("width") * c.wide


def _tables(c: Call) -> int:
    """cos and sin of the positions."""
    return 2 * c.shape.queries * c.node.attr("head_dim") * 4


def _rotary(c: Call) -> int:
    """A narrow half is widened and turned before v has been copied."""
    return _tables(c) + (max(0, c.values("heads") - c.made[2]) if c.narrow else 0)


def _rotary_dgrad(c: Call) -> int:
    """The tables are fp32: for fp64 one is there twice while it is converted."""
    if c.shape.width == 8:
        return _tables(c) * 3 // 2
    return _tables(c) + (c.values("heads") if c.narrow else 0)


def _rotary_norm(c: Call) -> int:
    """While k is normalised, the normalised q is still there; v is copied beside the normalised k."""
    q, k = c.values("heads"), c.values("kv_heads")
    if c.narrow:
        return _tables(c) + max(3 * q // 2 + 2 * k + c.per_head("kv_heads"), 2 * q) - sum(c.made)
    return _tables(c) + max(2 * q + k + c.per_head("kv_heads") - sum(c.made), k)


def _rotary_norm_dgrad(c: Call) -> int:
    """q's gradient turned back, and what the norm's gradient takes."""
    return _tables(c) + 4 * c.values("heads") + 2 * c.per_head("heads")


def _rotary_norm_wgrad(c: Call) -> int:
    """q's gradient turned back, the square of q, and its mean a row."""
    return _tables(c) + (3 if c.narrow else 2) * c.values("heads") + c.per_head("heads")


def _blocks(c: Call) -> tuple[int, int]:
    """Rows and columns of the scores that one thread of torch's CPU kernel holds (FlashAttentionKernel.cpp)."""
    rows = 256 if c.shape.queries >= 768 else 64 if c.shape.queries >= 192 else 32
    return min(rows, c.shape.queries), min(512, c.shape.keys)


def _mask(c: Call) -> int:
    """A sliding window is an added mask: one number a pair."""
    window = 0 if c.shape.masked else c.node.attr("window")  # under a mask that is given, it is in that
    return c.shape.queries * c.shape.keys * c.shape.width if 0 < window < c.shape.keys else 0


def _scores(c: Call) -> int:
    return c.per_head("heads") * c.shape.keys


def _unfolded(c: Call) -> int:
    """Of what math takes, the queries where none share keys: they need no folding. A narrow one is widened all the
    same."""
    return 0 if c.narrow or c.heads("heads") > c.heads("kv_heads") else c.values("heads")


def _attention(c: Call) -> int:
    """math: the scores and their exponentials, and folded queries until o is there; or the exponentials with the values
    laid out anew. Else each thread's block of scores, its rows' statistics and output; the log-sum-exp is laid out anew
    at the end."""
    if c.shape.attention == "math":
        widened, less = c.values("heads") // 2 if c.narrow else 0, _unfolded(c)
        return max(2 * _scores(c) + c.per_head("heads") + widened - less, (_scores(c) + less) if less else 0)
    rows, columns = _blocks(c)
    block = rows * (columns + 2 + c.node.attr("head_dim")) * c.wide + (rows * columns * c.shape.width) * c.narrow
    return _mask(c) + max(c.site.threads * block, c.per_head("heads"))


def _attention_dgrad(c: Call) -> int:
    """math: the probabilities and their gradient, q and o's gradient folded, a row's sums. Else blocks of both."""
    if c.shape.attention == "math":
        return 2 * _scores(c) + (4 if c.narrow else 2) * c.values("heads") + c.per_head("heads") - _unfolded(c)
    rows, columns = _blocks(c)
    return _mask(c) + c.site.threads * 2 * rows * columns * (c.wide + c.shape.width * c.narrow) + rows * c.wide


def _half(c: Call) -> Call:
    return replace(c, shape=replace(c.shape, keys=c.shape.keys // 2))


def _attention_more(c: Call) -> int:
    """All queries over half the keys (as much as half of them over all), their own output and log-sum-exps; then these
    merged, in a wide type."""
    c = _half(c)
    values, statistics = c.values("heads"), c.per_head("heads")
    part = values // c.wide * c.shape.width
    merged = part + 2 * statistics + values * (3 if c.narrow else 1)
    if c.shape.attention == "math":
        return max(2 * _scores(c) + values + 2 * statistics, merged)
    rows, columns = _blocks(c)
    block = rows * (columns + 2 + c.node.attr("head_dim")) * c.wide + (rows * columns * c.shape.width) * c.narrow
    return max(part + statistics + max(c.site.threads * block, statistics), merged)


def _attention_more_dgrad(c: Call) -> int:
    """All queries over half the keys, and the gradients of both before they are in their places."""
    own = (c.values("heads") + c.values("kv_heads")) // c.wide * c.shape.width
    return own + _attention_dgrad(_half(c))


def _rows(c: Call) -> tuple[int, int]:
    """(rows of the logits that go through at once, bytes of one in the type that sums are kept in)."""
    columns = c.widened(c.reads[0]) // c.shape.tokens
    return min(c.shape.tokens, max(1, CHUNK_BYTES // columns)), columns


def _row_chunk(c: Call) -> int:
    """The wide buffer of a chunk of the logits' rows; a narrow chunk is also widened into one more."""
    rows, columns = _rows(c)
    return rows * columns * (2 if c.narrow else 1)


def _loss(c: Call) -> int:
    """First the chunk, with its rows' maxima and sums; then a few numbers a token: the target's column, whether it is
    here, its logit, its loss, and between tensor ranks maxima and sums."""
    first = _row_chunk(c) + (c.shape.tokens * c.wide if c.narrow else _rows(c)[0] * 2 * c.wide)
    return max(first, c.shape.tokens * (INT + BOOL + (4 if c.shape.tensor > 1 else 3) * c.wide))


def _loss_dgrad(c: Call) -> int:
    return (_row_chunk(c) if c.narrow else 0) + c.shape.tokens * (INT + BOOL + c.wide)


def _masks(c: Call) -> int:
    """Distinct mask tokens beyond the vocabulary."""
    return c.node.weights[1].shape[0] if len(c.node.weights) > 1 else 0


def _local(c: Call) -> int:
    """Each token's row in what this rank has of the vocabulary, and whether it is elsewhere."""
    return c.shape.tokens * (INT + BOOL) if c.shape.tensor > 1 or _masks(c) else 0


def _embedding(c: Call) -> int:
    """Rows of a shard; of masks, on the first rank, the number of each, whether it is one, and its embedding."""
    return _local(c) + (c.shape.tokens * (INT + BOOL) + c.made[0] if _masks(c) else 0)


def _embedding_wgrad(c: Call) -> int:
    """A shard copies the gradient to clear rows that are elsewhere; a narrow one is widened first. Before that, which
    mask each token is, a number each."""
    gradient = c.widened(c.reads[0])
    shard = _local(c) + gradient * (c.shape.tensor > 1 or bool(_masks(c)))
    return gradient * c.narrow + max(shard, _masks(c) * (c.shape.tokens * (BOOL + c.wide) + INT))


def _linear_wgrad(c: Call) -> int:
    """The sum of a bias; a narrow weight's product before it is added to its wide gradient."""
    tokens = c.shape.tokens * c.shape.width
    inputs, outputs = c.reads[1] // tokens, c.reads[0] // tokens
    bias = outputs * c.wide if len(c.node.weights) > 1 else 0
    row = inputs * c.shape.width
    product = min(outputs, max(1, CHUNK_BYTES // row)) * row if c.narrow else 0
    return max(product, bias)


def _ahead_loss(c: Call) -> int:
    """As of any loss; of each token its place, whether it has such a target, and that target twice."""
    first = _row_chunk(c) + (c.shape.tokens * c.wide if c.narrow else _rows(c)[0] * 2 * c.wide)
    return max(first, c.shape.tokens * (3 * INT + BOOL + 3 * c.wide))


def _ahead_loss_dgrad(c: Call) -> int:
    return _loss_dgrad(c) + c.shape.tokens * (3 * INT + BOOL)


def _frozen(c: Call) -> int:
    """What another model's blocks take while they run one after another, beyond the rows that they leave."""
    return _frozen_bytes(c.node.inner, c.shape, c.site)


@lru_cache(maxsize=256)
def _frozen_bytes(inner: tuple[Block, ...], shape: Shape, site: Site) -> int:
    most = held = 0
    for block in inner:
        body = lower_block(block, shape, loss=False, train=False)

        def inside(rank: int, instruction: Instruction, block: Block = block, body: Body = body) -> int:
            return workspace(block, instruction, shape, body.sizes, site)

        series = memory(body.forward, inside)[0].get("device", ())
        most, held = max(most, held + max(series, default=0)), body.output_bytes
    return max(0, most - held)


CPU: Mapping[str, Rule] = {
    "frozen": _frozen,
    "ahead_entropy": _ahead_loss,
    "ahead_entropy.dgrad": _ahead_loss_dgrad,
    "embedding": _embedding,
    "embedding.wgrad": _embedding_wgrad,
    "rmsnorm": _norm,
    "rmsnorm.dgrad": _norm_dgrad,
    "rmsnorm.wgrad": _norm_wgrad,
    "linear.wgrad": _linear_wgrad,
    "rotary": _rotary,
    "rotary.dgrad": _rotary_dgrad,
    "rotary_norm": _rotary_norm,
    "rotary_norm.dgrad": _rotary_norm_dgrad,
    "rotary_norm.wgrad": _rotary_norm_wgrad,
    "attention_more": _attention_more,
    "attention_more.dgrad": _attention_more_dgrad,
    "cross_entropy": _loss,
    "cross_entropy.dgrad": _loss_dgrad,
    **mixed.CPU,
    "attention": mixed.padded(_attention),
    "attention.dgrad": mixed.padded_dgrad(_attention_dgrad),
}
CUDA: Mapping[str, Rule] = {
    "frozen": _frozen,
    "attention": mixed.padded(lambda c: 0),
    "attention.dgrad": mixed.padded_dgrad(lambda c: 0),
    **mixed.CUDA,
}
NUMBERED = {"places": 1.0}  # every row's number
COLLECTIVES: Mapping[str, Mapping[str, float]] = {
    "cpu": {"all_gather": 1.0, "reduce_scatter": 1.0, **NUMBERED},
    "cuda": NUMBERED,
}
RULES: Mapping[str, Mapping[str, Rule]] = {"cpu": CPU, "cuda": CUDA}


def widened(node: Node, shape: Shape, site: Site) -> int:
    """Bytes that a product with rounded weights takes inside itself: some of its rows as wide as x, where there are
    more tokens than a GPU multiplies with the weight as it lies (runners/ops/linear_int8.py); on a CPU a narrow result
    is widened too while it is scaled."""
    if node.op != INT8_OP or (site.kind == "cuda" and shape.width <= 4 and shape.tokens <= FEW_ROWS):
        return 0
    inputs = node.attr("inputs") // (shape.tensor if node.split == "row" else 1)
    outputs = node.attr("outputs") // (shape.tensor if node.split == "column" else 1)
    rows = min(outputs, tile_rows(inputs, shape.width))
    scaled = shape.tokens * rows * 4 if site.kind == "cpu" and shape.width < 4 else 0
    return max(rows * inputs * shape.width, scaled)


def staging(op: str, whole: int, site: Site) -> int:
    """Bytes that a collective's backend copies through, or that what is of no node takes; `whole` is the unsharded, or
    largest, tensor's bytes.

    gloo flattens what it gathers into a buffer of its own, and sums a copy of what it scatters; NCCL does neither.
    """
    return int(COLLECTIVES.get(site.kind, {}).get(op, 0.0) * whole)


def workspace(block: Block, instruction: Instruction, shape: Shape, sizes: Mapping[str, int], site: Site) -> int:
    """Bytes that one instruction of a body of `block` takes and gives back; `sizes` are those of its values."""
    if instruction.part < 0:
        return staging(instruction.op, max(sizes[name] for name in instruction.reads + instruction.writes), site)
    rule = RULES.get(site.kind, {}).get(instruction.op)
    if rule is None:
        return 0
    reads = tuple(sizes[name] for name in instruction.reads)
    made = tuple(sizes[name] for name in instruction.writes)
    node = block.nodes[instruction.part]
    return rule(Call(node, shape.core if node.op == "attention" else shape, site, reads, made))
