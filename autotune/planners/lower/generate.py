"""The outer programs of generation: a prefill of the whole prompt, and one decoded token a sequence.

Stage s runs on pipeline rank s. Buffers: w.s weights; kv.s keys and values of the stage's layers, for every position
there will be; x.s the stage's input; `prompt`, and `token`: the newest token of each sequence, on the first rank;
`out` all that were picked, on the last. A step ends when the picked tokens are back where the next step starts, so
that the decode program can be run again and again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from autotune.planners.lower.body import Body, lower_block
from autotune.planners.lower.shape import Shape, generation_shape
from autotune.planners.lower.stage import Cut, canonical_stages, cut_of, local_parameters, stage_blocks
from autotune.planners.passes.communicate import communicate
from autotune.planners.simulate import memory
from autotune.spec.graph import Block
from autotune.spec.model import ModelSpec
from autotune.spec.plan import Plan
from autotune.spec.program import Buffer, Instruction, Program
from autotune.spec.work import BYTES
from autotune.spec.workload import Workload

ID = 8  # bytes of a token


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward pass through one stage on one tensor rank; `parameters` in elements."""

    parameters: int
    cache: int  # keys and values of its layers, all positions
    inputs: int  # the boundary activation received (0 at the first stage)
    output: int  # the boundary activation handed on, or the logits of one token a sequence
    transient: int  # what a forward needs beyond its input and output


def inference_body(block: Block, shape: Shape) -> Body:
    """A block's forward that keeps nothing; the head's output is the logits of one token a sequence."""
    return lower_block(block, block_shape(block, shape), loss=False, train=False)


def block_shape(block: Block, shape: Shape) -> Shape:
    """What a block sees of a pass: the head only the last token of each sequence."""
    return replace(shape, queries=1, keys=1) if block.kind == "head" else shape


def pass_lengths(workload: Workload) -> tuple[tuple[int, int], ...]:
    """(new tokens, keys) of the prefill, and of a decoded token at both ends of the answer."""
    first, last = workload.prompt_length + 1, workload.prompt_length + max(1, workload.new_tokens - 1)
    return tuple(dict.fromkeys(((workload.prompt_length, workload.prompt_length), (1, first), (1, last))))


@lru_cache(maxsize=256)
def counted_blocks(model: ModelSpec, cut: Cut, stage: int) -> Mapping[Block, int]:
    """The different blocks of a stage in order, and how many of each it has."""
    return Counter(canonical_stages(model, cut)[stage])


def cache_bytes(plan: Plan, model: ModelSpec, workload: Workload, layers: int) -> int:
    """Bytes of the keys and values of `layers` layers for one replica's sequences, on one tensor rank."""
    tokens = workload.batch // plan.data * (workload.prompt_length + workload.new_tokens)
    return tokens * layers * 2 * (model.kv_heads // plan.tensor) * model.head_dim * BYTES[workload.precision]


@lru_cache(maxsize=4096)
def _transient(model: ModelSpec, cut: Cut, stage: int, shape: Shape) -> tuple[int, int]:
    """(bytes beyond input and output, bytes of the output) of a forward through a stage.

    While a block runs its input stays; the stage's own input is counted by the outer program.
    """
    most = held = 0
    for block in counted_blocks(model, cut, stage):
        body = inference_body(block, shape)
        if block.kind == "head" and shape.queries > 1:  # the last rows are copied out before the head runs
            rows = body.sizes["x"]
            most, held = max(most, held + rows), rows
        peak = max(memory(body.forward, lambda rank, instruction: 0)[0].get("device", ()), default=0)
        # A layer follows the embedding, a stage's input, or another layer.
        again = body.output_bytes if counted_blocks(model, cut, stage)[block] > 1 else 0
        most = max(most, max(held, again) + peak)
        held = body.output_bytes
    return max(0, most - held), held


@lru_cache(maxsize=1024)
def pass_sizes(plan: Plan, model: ModelSpec, workload: Workload, queries: int, keys: int) -> tuple[Pass, ...]:
    """The bytes of every stage of a pass over `queries` new tokens a sequence."""
    shape = generation_shape(plan, workload, queries, keys)
    found, cut = [], cut_of(plan, model)
    for s, blocks in enumerate(stage_blocks(model, cut)):
        layers = sum(block.kind == "layer" for block in blocks)
        transient, output = _transient(model, cut, s, shape)
        inputs = shape.tokens * model.hidden * shape.width if s else 0
        cache = cache_bytes(plan, model, workload, layers)
        found.append(Pass(local_parameters(blocks, plan.tensor), cache, inputs, output, transient))
    return tuple(found)


def _buffers(rank: int, plan: Plan, workload: Workload, sizes: tuple[Pass, ...]) -> dict[str, Buffer]:
    """What one pipeline rank holds. What crosses ranks is declared where it is written."""
    size, batch = sizes[rank], workload.batch // plan.data
    held = {
        f"w.{rank}": Buffer(size.parameters * BYTES[workload.precision], persistent=True),
        f"kv.{rank}": Buffer(size.cache, persistent=True),
    }
    if rank == 0:
        held["prompt"] = Buffer(batch * workload.prompt_length * ID, persistent=True)
        held["token"] = Buffer(batch * ID, persistent=True)
    if rank == len(sizes) - 1:
        held["out"] = Buffer(batch * workload.new_tokens * ID, persistent=True)
        held["logits"] = Buffer(size.output)
        if rank:
            held["t"] = Buffer(batch * ID)
    else:
        held[f"x.{rank + 1}"] = Buffer(size.output)
    return held


def _listing(rank: int, last: int, source: str) -> tuple[Instruction, ...]:
    """A stage's forward; the last picks, and the first takes what was picked."""
    w, kv = f"w.{rank}", f"kv.{rank}"
    x = f"x.{rank}" if rank else source
    made = "logits" if rank == last else f"x.{rank + 1}"
    out = [Instruction("F", rank, reads=(w, kv, x), writes=(kv, made), frees=(x,) if rank else ())]
    if rank == last:
        picked = "t" if last else "token"
        out.append(Instruction("PICK", rank, reads=("logits",), writes=(picked, "out"), frees=("logits",)))
    if rank == 0 and last:
        out.append(Instruction("TAKE", rank, reads=("t",), writes=("token",), frees=("t",)))
    return tuple(out)


def lower_generation(plan: Plan, model: ModelSpec, workload: Workload, queries: int, keys: int) -> Program:
    """One pass over pipeline ranks: `queries` new tokens a sequence that attend to `keys` positions, their own too.

    keys == queries is the prefill: it reads the prompt. keys > queries goes on from the cache and reads `token`. Data
    and tensor peers run the same program: `expand` makes them explicit. `plan` must be feasible (planners.feasible).
    """
    sizes = pass_sizes(plan, model, workload, queries, keys)
    last = plan.pipeline - 1
    source = "prompt" if keys == queries else "token"
    ranks = tuple(_listing(rank, last, source) for rank in range(plan.pipeline))
    buffers = tuple(_buffers(rank, plan, workload, sizes) for rank in range(plan.pipeline))
    # ahead 0: nothing is worth receiving early, since a rank's one forward waits for what it receives.
    program = communicate(Program(ranks, buffers), ahead=0)
    return replace(program, facts={"place": tuple(range(plan.pipeline))})
