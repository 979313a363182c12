"""The outer programs of generation: a prefill of the whole prompt, and a round, which proposes tokens, scores them in
one pass and commits some; a token decoded by itself is a round without proposals.

Stage s runs on pipeline rank s. Buffers: w.s weights; kv.s keys and values of the stage's layers, for every position
there will be; x.s the stage's input; `prompt`, and `token`: the newest token of each sequence and what is proposed
after it, on the first rank (`slate` is the same on the last, `t` on its way); `n` what a round committed; `out` the
text so far, on every rank; dw and dkv a draft model's weights and cache; `rows` the hidden rows that heads read. A step
ends when the next tokens are where the next step starts, so that the program of a round can be run again and again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

from autotune.planners.decoding.strategies import STRATEGIES, reads_rows, scored, tree_of
from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.call import Site
from autotune.planners.lower.fuse import nodes_of
from autotune.planners.lower.pages import NUMBER_BYTES, cache_positions, gathered_bytes, pages_of, room, table_bytes
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import Cut, canonical_stages, cut_of, local_bytes, stage_blocks
from autotune.planners.lower.workspace import widened
from autotune.planners.passes.communicate import communicate
from autotune.planners.simulate import memory
from autotune.spec.graph import Block, Node, kv_bytes_per_token
from autotune.spec.graph import blocks as all_blocks
from autotune.spec.model import ModelSpec
from autotune.spec.plan import PLAIN, Plan
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload

ID = 8  # bytes of a token
GPU = Site()
ENDS = ("norm", "head")  # the kinds of blocks that see only those tokens of each sequence that get logits


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward pass through one stage on one tensor rank."""

    weights: int
    cache: int  # keys and values of its layers, all positions
    inputs: int  # the boundary activation received (0 at the first stage)
    output: int  # the boundary activation handed on, or the logits of one token a sequence
    transient: int  # what a forward needs beyond its input and output


def inference_body(block: Block, shape: Shape) -> Body:
    """A block's forward that keeps nothing; the head's output is the logits of one token a sequence."""
    return lower_block(block, block_shape(block, shape), loss=False, train=False)


def block_shape(block: Block, shape: Shape) -> Shape:
    """What a block sees of a pass: the head only those tokens of each sequence that get logits."""
    return replace(shape, queries=shape.scored, keys=shape.scored) if block.kind in ENDS else shape


def prompt_parts(plan: Plan, workload: Workload) -> tuple[tuple[int, int], ...]:
    """(new tokens, keys) of each pass over a part of the prompt, in order."""
    whole, each = workload.prompt_length, plan.prompt_chunk or workload.prompt_length
    ends = (*range(each, whole, each), whole)
    return tuple((end - start, end) for start, end in pairwise((0, *ends)))


def pass_lengths(plan: Plan, workload: Workload) -> tuple[tuple[int, int], ...]:
    """(new tokens, keys) of the prefill, of its parts the first two and the last, and of a round at both ends of the
    answer."""
    first, new, parts = workload.prompt_length, scored(plan), prompt_parts(plan, workload)
    last = first + max(1, workload.new_tokens - 1) - 1
    return tuple(dict.fromkeys((*parts[:2], parts[-1], (new, first + new), (new, last + new))))


@lru_cache(maxsize=256)
def counted_blocks(model: ModelSpec, cut: Cut, stage: int) -> Mapping[Block, int]:
    """The different blocks of a stage in order, and how many of each it has."""
    return Counter(canonical_stages(model, cut)[stage])


def cache_bytes(plan: Plan, model: ModelSpec, workload: Workload, layers: int) -> int:
    """Bytes of the keys and values of `layers` layers for one replica's sequences, on one tensor rank."""
    each = layers * 2 * (model.kv_heads // plan.tensor) * model.head_dim * BYTES[workload.precision]
    return cache_positions(plan, workload) * each + table_bytes(plan, workload)


def _inside(block: Block, shape: Shape, site: Site, rank: int, instruction: Instruction) -> int:
    """What an operation of a pass takes inside itself, where that is as large as a weight."""
    if instruction.part < 0:
        return 0
    shape = block_shape(block, shape)
    return max(widened(node, shape, site) + _gathered(node, shape, site) for node in nodes_of(block, instruction))


def _gathered(node: Node, shape: Shape, site: Site) -> int:
    """Keys and values that attention over pages puts side by side, where no kernel of ours takes the table: on a GPU,
    where the host does not know how many are filled, of the whole room; and the numbers of the pages."""
    on_gpu = site.kind == "cuda"
    ours = on_gpu and shape.fused and shape.width == 2  # kernels.decode takes no wider type
    if node.op != "attention" or not shape.page or shape.keys == shape.queries or ours:
        return 0
    positions, heads = shape.room if on_gpu else shape.keys, node.attr("kv_heads") // shape.tensor
    pages = pages_of(positions, shape.page)
    numbers, copied = shape.batch * pages * NUMBER_BYTES, shape.batch > 1 and pages * shape.page < shape.room
    whole = gathered_bytes(shape.batch, positions, shape.page, heads, node.attr("head_dim"), shape.dtype)
    return whole + (numbers if copied else 0)


@lru_cache(maxsize=4096)
def transient_bytes(
    model: ModelSpec, cut: Cut, stage: int, shape: Shape, head: bool = True, site: Site = GPU
) -> tuple[int, int]:
    """(bytes beyond input and output, bytes of the output) of a forward through a stage, or through all of it but the
    head.

    While a block runs its input stays; the stage's own input is counted by the outer program.
    """
    most = held = 0
    whole = True  # whether every token's row is there still
    for block in counted_blocks(model, cut, stage):
        if block.kind in ENDS and not head:
            continue
        body = inference_body(block, shape)
        if block.kind in ENDS and whole and shape.queries > shape.scored:  # the last rows are copied out before it
            rows, whole = body.sizes["x"], False
            most, held = max(most, held + rows), rows
        inside = partial(_inside, block, shape, site)
        peak = max(memory(body.forward, inside)[0].get("device", ()), default=0)
        # A layer follows the embedding, a stage's input, or another layer.
        again = body.output_bytes if counted_blocks(model, cut, stage)[block] > 1 else 0
        most = max(most, max(held, again) + peak)
        held = body.output_bytes
    return max(0, most - held), held


@lru_cache(maxsize=1024)
def pass_sizes(
    plan: Plan, model: ModelSpec, workload: Workload, queries: int, keys: int, head: bool = True, site: Site = GPU
) -> tuple[Pass, ...]:
    """The bytes of every stage of a pass over `queries` new tokens a sequence; without `head` it ends before that."""
    shape = generation_shape(plan, workload, queries, keys)
    found, cut = [], cut_of(plan, model)
    for s, blocks in enumerate(stage_blocks(model, cut)):
        layers = sum(block.kind == "layer" for block in blocks)
        transient, output = transient_bytes(model, cut, s, shape, head, site)
        inputs = shape.tokens * model.hidden * shape.width if s else 0
        cache = cache_bytes(plan, model, workload, layers)
        weights = local_bytes(blocks, plan.tensor, shape.width)
        found.append(Pass(weights, cache, inputs, output, transient))
    return tuple(found)


def text_columns(plan: Plan, workload: Workload) -> int:
    """Tokens of a sequence's text on a rank: the prompt, the answer, and what a last round commits beyond it."""
    return room(plan, workload) + 1


def news(plan: Plan, first: bool) -> int:
    """Whole numbers that say what became of a sequence's proposals: how many tokens are committed, those tokens, and of
    branches where in the cache the kept ones' keys are. `first`: of the prompt's pass, which only chooses a token."""
    if first or plan.decoding == PLAIN:
        return 2
    return 1 + (1 + plan.speculate) + (0 if tree_of(plan).chain else plan.speculate)


def draft_room(plan: Plan, workload: Workload) -> int:
    """Positions of a sequence's cache of the draft model: as many as the target's has, and never fewer than a pass that
    drafts all at once fills after the shortest prompt."""
    return max(room(plan, workload), 2 * plan.speculate)


def draft_bytes(plan: Plan, workload: Workload) -> tuple[int, int]:
    """Bytes of the draft model's weights and of its cache, whole on each rank that proposes; (0, 0) without one."""
    if not STRATEGIES[plan.decoding].draft or workload.draft is None:
        return 0, 0
    tokens = workload.batch // plan.data * draft_room(plan, workload)
    cache = tokens * kv_bytes_per_token(workload.draft, BYTES[workload.precision])
    return local_bytes(drafted(plan, workload.draft), 1, BYTES[workload.precision]), cache


def drafted(plan: Plan, draft: ModelSpec) -> tuple[Block, ...]:
    """The blocks of what proposes: all of a draft model, and of heads as many as the proposals are deep."""
    return all_blocks(draft)[: plan.speculate if reads_rows(plan) else None]


Sizes = tuple[tuple[Pass, ...], ...]  # of every pass of a program, of every stage


def program_sizes(plan: Plan, model: ModelSpec, workload: Workload, queries: int, keys: int, site: Site = GPU) -> Sizes:
    """The bytes of the passes of a program: of the prefill, one for each part of the prompt, else one."""
    parts = prompt_parts(plan, workload) if keys == queries else ((queries, keys),)
    return tuple(pass_sizes(plan, model, workload, *part, part == parts[-1], site) for part in parts)


def _buffers(
    rank: int, plan: Plan, model: ModelSpec, workload: Workload, sizes: Sizes, first: bool
) -> dict[str, Buffer]:
    """What one pipeline rank holds. What crosses ranks is declared where it is written."""
    size, batch, last = sizes[-1][rank], workload.batch // plan.data, len(sizes[-1]) - 1
    slate, width = batch * scored(plan) * ID, BYTES[workload.precision]
    held = {
        f"w.{rank}": Buffer(size.weights, persistent=True),
        f"kv.{rank}": Buffer(size.cache, persistent=True),
        "out": Buffer(batch * text_columns(plan, workload) * ID, persistent=True),
    }
    if rank == 0:
        held["prompt"] = Buffer(batch * workload.prompt_length * ID, persistent=True)
        held["token"] = Buffer(slate, persistent=True)
    if rank < last:
        return held | {boundary(rank + 1, part, sizes): Buffer(of[rank].output) for part, of in enumerate(sizes)}
    held["logits"] = Buffer(size.output)
    held["n"] = Buffer(batch * news(plan, first) * ID)
    if plan.prompt_chunk:
        held["h"] = Buffer(batch * model.hidden * width, persistent=True)
    if plan.decoding != PLAIN and last:
        held |= {"slate": Buffer(slate, persistent=True), "t": Buffer(slate)}
    weights, cache = draft_bytes(plan, workload)
    if weights:
        held["dw"] = Buffer(weights, persistent=True)
        held |= {"dkv": Buffer(cache, persistent=True)} if cache else {}
    if reads_rows(plan):
        held["rows"] = Buffer(batch * (1 if first else scored(plan)) * model.hidden * width)
    return held


def boundary(stage: int, part: int, sizes: Sequence[object]) -> str:
    """What the input of a stage is called; of a prompt in parts, of each of them."""
    return f"x.{stage}" if len(sizes) == 1 else f"x.{stage}.{part}"


def _forwards(rank: int, plan: Plan, goes_on: bool, sizes: Sizes) -> list[Instruction]:
    """A stage's forward, of a prompt in parts one after another: each leaves what follows the prompts that end in it to
    the last, which is all that the head sees."""
    last, w, kv, found = plan.pipeline - 1, f"w.{rank}", f"kv.{rank}", list[Instruction]()
    for part in range(len(sizes)):
        x = boundary(rank, part, sizes) if rank else "token" if goes_on else "prompt"
        reads, writes = [w, kv, x], [kv]
        if rank < last:
            writes.append(boundary(rank + 1, part, sizes))
        elif part < len(sizes) - 1:
            writes.append("h")
        else:
            reads += ["h"] if part else []
            writes += ["logits", *(["rows"] if reads_rows(plan) else [])]
        frees = (x,) if rank else ()
        found.append(Instruction("F", rank, part, reads=tuple(reads), writes=tuple(writes), frees=frees))
    return found


def _listing(rank: int, plan: Plan, goes_on: bool, sizes: Sizes) -> tuple[Instruction, ...]:
    """A stage's forward; the last commits tokens and proposes the next ones, and the others take what it did.
    `goes_on`: from the cache, and not from the prompt."""
    last, proposes, kv = plan.pipeline - 1, plan.decoding != PLAIN, f"kv.{rank}"
    out = _forwards(rank, plan, goes_on, sizes)
    apart = goes_on and not tree_of(plan).chain  # what is kept does not stand together in the cache
    if rank < last:
        slate = ("t",) if rank == 0 and proposes else ()
        writes, frees = ("token", "out") if rank == 0 else ("out",), slate if apart else ("n", *slate)
        out.append(Instruction("TAKE", rank, reads=("n", *slate, "out"), writes=writes, frees=frees))
        if apart:
            out.append(Instruction("MOVE", rank, reads=("n", kv), writes=(kv,), frees=("n",)))
        return tuple(out)
    slate = ("slate" if last else "token",) if proposes else ()
    reads = ("logits", "out", *(slate if goes_on else ()))
    alone = not last and not proposes
    writes = ("token", "out") if alone else ("n", "out")
    out.append(Instruction("COMMIT", rank, reads=reads, writes=writes, frees=("logits",)))
    if apart:
        out.append(Instruction("MOVE", rank, reads=("n", kv), writes=(kv,)))
    if proposes:
        heads = reads_rows(plan)
        drafts = ("dw", "rows") if heads else ("dw", "dkv") if STRATEGIES[plan.decoding].draft else ()
        writes = (*(("slate", "t") if last else ("token",)), *(drafts[1:] if not heads else ()))
        frees = ("n", *(drafts[1:] if heads else ()))
        out.append(Instruction("PROPOSE", rank, reads=("n", "out", *drafts), writes=writes, frees=frees))
    return tuple(out)


def lower_generation(plan: Plan, model: ModelSpec, workload: Workload, queries: int, keys: int) -> Program:
    """One pass over pipeline ranks: `queries` new tokens a sequence that attend to `keys` positions, their own too.

    keys == queries is the prefill: it reads the prompt. keys > queries is a round: it goes on from the cache and scores
    `token`, the newest token and what was proposed after it. Data and tensor peers run the same program: `expand` makes
    them explicit. `plan` must be feasible (planners.feasible).
    """
    sizes = program_sizes(plan, model, workload, queries, keys)
    stages = range(plan.pipeline)
    ranks = tuple(_listing(rank, plan, keys > queries, sizes) for rank in stages)
    buffers = tuple(_buffers(rank, plan, model, workload, sizes, keys == queries) for rank in stages)
    # ahead 0: nothing is worth receiving early, since a rank's one forward waits for what it receives.
    program = communicate(Program(ranks, buffers), ahead=0)
    return replace(program, facts={"place": tuple(stages)})
